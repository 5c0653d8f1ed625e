"""Thousands of subscribers are cut off in the same instant and are back all at once, while events go on coming.

    python -m bench.storm [--streams 5000] [--away 0 1 3]

The server has one core; the crowd (bench.crowd, a process of its own) and the producer the other. Nobody waits before
coming back, as a browser and the clients of this project would: all 5,000 connects and requests come in one burst.
Caught up is who has had an event that nobody else was ahead of. How late the event loop was is read from the server's
own histogram, over the time from the cut until all are caught up. An event that is lost, comes twice or makes a
stream start anew fails the bench, and so does a crowd that is caught up after 5 s, or a loop whose 99th percentile is
over 50 ms.
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.contenders import fetch
from bench.measure import Server, print_table, serve_scanwire

EVENTS_PER_S = 5
WEBSOCKETS = 0.1  # of all streams
CAUGHT_UP_WITHIN_S = 5.0
LOOP_P99_MS = 50.0
_LAG = re.compile(r'^scanwire_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Storm:
    """One cut and what came of it."""

    away_s: float
    p50_s: float  # from coming back to being caught up
    p99_s: float
    max_s: float
    lags: Mapping[float, float]  # seconds -> timers that were no later, from the cut on

    @property
    def loop_p99_ms(self) -> float:
        """The upper bound of the bucket that the 99th percentile is in."""
        return min(bound for bound, count in self.lags.items() if count >= 0.99 * max(self.lags.values())) * 1000


@dataclass(frozen=True, slots=True)
class Outcome:
    connect_s: float
    storms: list[Storm]
    tally: Mapping[str, Any]  # of bench.crowd
    expected: int  # deliveries
    loop_max_ms: float
    server_cpu_s: float

    @property
    def faults(self) -> list[str]:
        """What was promised and does not hold, whatever the time it took."""
        tally = self.tally
        faults = [f"{name}: {tally[name]:,}" for name in ("lost", "twice", "resets", "broken") if tally[name]]
        if tally["received"] != self.expected:
            faults.append(f"{self.expected:,} deliveries were expected, and {tally['received']:,} came")
        return faults


class _Crowd:
    """The process of the crowd, under command."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def wait(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the crowd ended early; it said why above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def order(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self.wait()


@contextlib.contextmanager
def _gather(*words: object, cpus: set[int] | None) -> Iterator[_Crowd]:
    with subprocess.Popen(
        [sys.executable, "-m", "bench.crowd", *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
    ) as process:
        try:
            yield _Crowd(process)
        finally:
            process.kill()


@contextlib.contextmanager
def _produce(server: Server) -> Iterator[tuple[str, Callable[[], int]]]:
    """A scan with EVENTS_PER_S events, and what ends it and says how many durable ones it had."""
    scan = fetch(server, "/v1/scans", {"scanner": "external", "params": {"title": "storm", "unit": "rows"}})
    headers = {"Authorization": f"Bearer {scan['producer_token']}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    is_over = threading.Event()
    last_seq = 0

    def post(event: dict[str, Any]) -> int:
        connection.request("POST", f"/v1/scans/{scan['id']}/events", json.dumps(event), headers)
        answer = connection.getresponse()
        body = json.load(answer)
        if answer.status != 202:
            raise SystemExit(f"the producer was refused: {body}")
        seq: int = body["seq"]
        return seq

    def work() -> None:
        nonlocal last_seq
        row = 0
        while not is_over.wait(1 / EVENTS_PER_S):
            post({"type": "matches", "rows": [{"row": row, "text": "x" * 60}]})
            row += 1
        last_seq = post({"type": "end", "state": "completed"})

    thread = threading.Thread(target=work)

    def finish() -> int:
        is_over.set()
        thread.join()
        return last_seq

    thread.start()
    try:
        yield scan["id"], finish
    finally:
        finish()
        connection.close()


def weather(
    streams: int, away_s: Sequence[float], *, server_cpus: set[int] | None = None, cpus: set[int] | None = None
) -> Outcome:
    """A scan is followed by so many streams through a storm for each of `away_s`, to its end."""
    with (
        serve_scanwire(cpus=server_cpus) as server,
        _produce(server) as (scan, finish),
        _gather(server.port, scan, streams, int(streams * WEBSOCKETS), cpus=cpus) as crowd,
    ):
        connect_s = crowd.wait()["connect_s"]
        storms = []
        for away in away_s:
            before = _read_lags(server)
            time.sleep(0.2)  # what reading it cost the loop is no part of the storm
            times = crowd.order(f"cut {away}")
            lags = {bound: count - before[bound] for bound, count in _read_lags(server).items()}
            storms.append(Storm(away, **times, lags=lags))
        expected = finish() * streams
        tally = crowd.order("finish")
        loop_max_ms = fetch(server, "/v1/performance")["loop_lag_ms"]["max"]
        return Outcome(connect_s, storms, tally, expected, loop_max_ms, server.cpu_s())


def _read_lags(server: Server) -> dict[float, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
        return {float(bound): float(count) for bound, count in _LAG.findall(answer.read().decode())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=5000)
    parser.add_argument("--away", type=float, nargs="+", default=[0, 0, 1, 1, 3], help="s until they are back")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    outcome = weather(options.streams, options.away, server_cpus={cores[0]}, cpus={cores[-1]})
    faults = list(outcome.faults)
    table = []
    for storm in outcome.storms:
        table.append((storm.away_s, storm.p50_s, storm.p99_s, storm.max_s, storm.loop_p99_ms))
        if storm.max_s > CAUGHT_UP_WITHIN_S:
            faults.append(f"all were caught up after {storm.max_s:.2f} s")
        if storm.loop_p99_ms > LOOP_P99_MS:
            faults.append(f"the 99th percentile of the loop's lag was {storm.loop_p99_ms:g} ms")
    share = f"{int(options.streams * WEBSOCKETS):,} of them WebSockets"
    print_table(
        f"{options.streams:,} streams ({share}) cut at once and back with their cursors, {EVENTS_PER_S} events/s",
        ("away s", "caught up: p50 s", "p99 s", "all s", "loop late, p99 ms <="),
        table,
    )
    tally = outcome.tally
    print(
        f"\n{outcome.expected:,} deliveries expected, {tally['received']:,} received, {tally['lost']} lost, "
        f"{tally['twice']} twice, {tally['broken']} connections broken.\n"
        f"First connects took {outcome.connect_s:.1f} s; "
        f"the loop was late by {outcome.loop_max_ms:.0f} ms at most; server CPU {outcome.server_cpu_s:.1f} s, "
        f"crowd CPU {tally['busy_s']:.1f} s."
    )
    print(f"Repeat with: python -m bench.storm --streams {options.streams}")
    if faults:
        raise SystemExit("FAILED\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
