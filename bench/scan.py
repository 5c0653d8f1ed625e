"""One scan over 10 million rows through the real server, beside the same setup in pandas symbol by symbol.

    python -m bench.scan [--symbols 8000] [--days 1250] [--rounds 3] [--prices FILE]

Everything is measured from outside: a scan is submitted over HTTP and followed over SSE. Then two scans run at the
same time, and the server's own measure of how late its event loop is tells whether streams would notice.
"""

import argparse
import http.client
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from app.market.sample import make_synthetic
from bench.measure import Server, print_table, read_memory_mb, serve
from bench.peers import pandas_gap_up

SETTINGS = {
    "SCANWIRE_SUBMIT_PER_MIN": "100000",
    "SCANWIRE_SUBMIT_HEAVY_PER_HOUR": "100000",
    "SCANWIRE_CONNECT_BURST": "1000",
    "SCANWIRE_READ_BURST": "1000",
}


@dataclass(frozen=True, slots=True)
class Run:
    whole_s: float
    first_match_s: float
    rows: list[dict[str, Any]]
    total: int


def submit(server: Server) -> str:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)) as connection:
        body = json.dumps({"scanner": "gap-up", "reuse": "never"})
        connection.request("POST", "/v1/scans", body, {"Content-Type": "application/json"})
        answer = json.load(connection.getresponse())
        scan_id: str = answer["id"]
        return scan_id


def follow(server: Server, scan_id: str) -> Iterator[dict[str, Any]]:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)) as connection:
        connection.request("GET", f"/v1/scans/{scan_id}/events", headers={"Accept": "text/event-stream"})
        for line in connection.getresponse():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


def run_scan(server: Server) -> Run:
    started = time.perf_counter()
    first, rows, total = None, [], 0
    for event in follow(server, submit(server)):
        if event["type"] == "started":
            total = event["data"]["total"]
        elif event["type"] == "matches":
            first = first or time.perf_counter() - started
            rows += event["data"]["rows"]
        elif event["type"] == "end" and (event["data"]["state"], event["data"]["matches"]) != ("completed", len(rows)):
            raise SystemExit(f"the scan went wrong: {event['data']}")
    return Run(time.perf_counter() - started, first or float("nan"), rows, total)


def read_performance(server: Server) -> dict[str, Any]:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
        connection.request("GET", "/v1/performance")
        performance: dict[str, Any] = json.load(connection.getresponse())
        return performance


def run_pandas(prices: Path, symbols: int, found: list[dict[str, Any]]) -> float:
    """Rows per second of the peer on the first symbols; what it finds must be what the server found."""
    table = pd.read_parquet(prices, filters=[("symbol", "<=", sorted({row["symbol"] for row in found})[symbols])])
    table = table.astype(dict.fromkeys(("open", "high", "low", "close", "volume"), "float64"))
    started = time.perf_counter()
    matches = pandas_gap_up.scan(table)
    took_s = time.perf_counter() - started
    names = set(table["symbol"])
    expected = [row for row in found if row["symbol"] in names]
    got = matches.assign(date=matches["date"].astype(str).str[:10]).to_dict("records")
    if len(got) != len(expected) or not all(_is_same(*pair) for pair in zip(got, expected, strict=True)):
        raise SystemExit(f"the peer found {len(got)} rows where the server found {len(expected)}, or others")
    return len(table) / took_s


def _is_same(one: dict[Any, Any], other: dict[str, Any]) -> bool:
    return all(
        math.isclose(value, other[name], rel_tol=1e-5, abs_tol=1e-5)
        if isinstance(value, float)
        else value == other[name]
        for name, value in one.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--symbols", type=int, default=8000)
    parser.add_argument("--days", type=int, default=1250)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prices", type=Path, help="keep the synthetic table here, or use what is there")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        prices = options.prices or Path(folder) / "synthetic.parquet"
        if not prices.exists():
            print(f"making {options.symbols:,} symbols × {options.days:,} days …", flush=True)
            make_synthetic(prices, symbols=options.symbols, days=options.days)
        env = SETTINGS | {"SCANWIRE_PRICES": str(prices), "SCANWIRE_STATE_DIR": folder}
        with serve("app.application:create_app", factory=True, env=env) as server:
            runs = [run_scan(server) for _ in range(options.rounds)]
            rows = options.symbols * options.days
            rate = rows / statistics.median(run.whole_s for run in runs)
            peer_rate = run_pandas(prices, 150, runs[0].rows)
            for _ in range(max(options.rounds, 5)):
                both = [submit(server), submit(server)]
                for scan_id in both:
                    for _event in follow(server, scan_id):
                        pass
            lag = read_performance(server)["loop_lag_ms"]
            workers = [pid for pid in server.children() if pid != server.pid]
            server_mb = server.memory_mb(peak=True)
            all_mb = server_mb + sum(read_memory_mb(pid, "VmHWM") for pid in workers)
        print_table(
            f"gap-up over {rows:,} rows ({options.symbols:,} symbols), {len(runs[0].rows):,} matches, "
            f"median of {options.rounds} runs",
            ("what", "measured", "must be"),
            [
                ("whole universe, submit to end", f"{statistics.median(run.whole_s for run in runs):.2f} s", "< 3 s"),
                (
                    "submit to first match",
                    f"{statistics.median(run.first_match_s for run in runs) * 1000:.0f} ms",
                    "< 150 ms",
                ),
                ("rows per second", f"{rate:,.0f}", ""),
                ("pandas, symbol by symbol, rows per second", f"{peer_rate:,.0f}", ""),
                ("ratio to pandas", f"{rate / peer_rate:.0f} ×", ">= 50 ×"),
                ("event loop late while two scans run, p99", f"{lag['p99']:.1f} ms", "< 5 ms"),
                ("event loop late while two scans run, max", f"{lag['max']:.1f} ms", "< 20 ms"),
                ("peak memory of the server process", f"{server_mb:.0f} MB", "< 200 MB"),
                (f"peak memory of all {1 + len(workers)} processes", f"{all_mb:.0f} MB", "< 1500 MB"),
            ],
        )


if __name__ == "__main__":
    main()
