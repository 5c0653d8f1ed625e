"""Works that count what a delivery costs and how late it is."""

import contextlib
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from app.market.sample import make_synthetic
from bench import contenders
from bench.contenders import FLOOR, NCHAN_SSE, SCANWIRE_SSE, SCANWIRE_WS, SSE_STARLETTE, Contender, Work, fetch
from bench.measure import Server, print_table, serve_scanwire
from bench.peers.scanwire_many import make_scan_id
from bench.rounds import Bench, Run, compare_fanout, measure_fanout, print_fanout, push

ROWS_EACH = 100  # rows in one event of a scan that is read back
READS = 10  # of that scan: one is too short for the clock ticks that CPU time is counted in


def fan_out(bench: Bench) -> None:
    """1 scan × 500 subscribers, 50 events/s, on every server."""
    work = Work(rate=50, events=int(50 * bench.scale(10, 2)))
    compare_fanout(bench, "1 × 500 subscribers, 50 events/s", contenders.EVERYONE, work, 500)


def fan_out_fast(bench: Bench) -> None:
    """1 scan × 500 subscribers, 1,000 events/s: 500,000 deliveries a second, which needs shared writes."""
    work = Work(rate=1000, events=int(1000 * bench.scale(10, 2)))
    title = "1 × 500 subscribers, 1,000 events/s, posted every 5 ms"
    compare_fanout(bench, title, (FLOOR, SCANWIRE_SSE, SCANWIRE_WS, NCHAN_SSE), work, 500, tick_s=0.005)


def fan_out_wide(bench: Bench) -> None:
    """1 scan × 5,000 subscribers, 5 events/s."""
    work = Work(rate=5, events=int(5 * bench.scale(10, 2)))
    compare_fanout(bench, "1 × 5,000 subscribers, 5 events/s", (FLOOR, SCANWIRE_SSE, NCHAN_SSE), work, 5000)


def many_scans(bench: Bench) -> None:
    """500 scans × 1 subscriber × 20 events/s, produced in process; the floor writes as many frames."""
    work, scans = Work(rate=20, events=int(20 * bench.scale(10, 2))), 500
    runs: dict[str, list[Run]] = {FLOOR.name: [], SCANWIRE_SSE.name: [], SCANWIRE_WS.name: []}
    chosen = bench.choose(FLOOR)
    for _ in range(bench.rounds):
        for contender in chosen:
            with contender.start(work, bench.server_cpus) as running:
                runs[contender.name].append(measure_fanout(bench, running, work, scans))
        for contender in (SCANWIRE_SSE, SCANWIRE_WS):
            with bench.attempt(f"many scans: {contender.name}"):
                run = _run_many(bench, work, scans, websocket=contender is SCANWIRE_WS)
                bench.check(f"many scans: {contender.name}", run.reception)
                runs[contender.name].append(run)
    title = f"{scans} scans × 1 subscriber × 20 events/s, produced in process"
    print_fanout(bench, title, runs)


def _run_many(bench: Bench, work: Work, scans: int, *, websocket: bool) -> Run:
    options = {"--scans": scans, "--rate": work.rate, "--events": work.events}
    options["--row-bytes"] = contenders.count_row_bytes(work, websocket=websocket)
    words = ["-m", "bench.peers.scanwire_many", *(str(word) for option in options.items() for word in option)]
    subscription = contenders.subscribe_to_scan(*map(make_scan_id, range(scans)), websocket=websocket)
    with (
        serve_scanwire(command=words, cpus=bench.server_cpus, path=f"/v1/scans/{make_scan_id(scans - 1)}") as server,
        bench.subscribe(
            server, subscription, connections=scans, events=work.events, within_s=4 * work.events / work.rate + 30
        ) as load,
    ):
        before = server.cpu_s()
        os.kill(server.pid, signal.SIGUSR1)
        reception = load.wait()
        return Run(server.cpu_s() - before, reception)


def finished_scan(bench: Bench) -> None:
    """A finished scan with 100,000 matches to one subscriber, who starts from nothing."""
    work, table = Work(rate=1e6, events=int(bench.scale(100_000, 20_000)), frame_bytes=350), []
    for contender in (SCANWIRE_SSE, SCANWIRE_WS):
        with bench.attempt(f"finished: {contender.name}"):
            table.append(_read_finished(bench, work, contender))
    print_table(
        f"A finished scan with {work.events:,} matches, {ROWS_EACH} in an event, to one subscriber ({READS} times)",
        ("server", "rows/s", "CPU µs/row", "memory it took, MB", "server memory at its peak, MB", "received"),
        table,
    )


def _read_finished(bench: Bench, work: Work, contender: Contender) -> tuple[object, ...]:
    rates, growths, costs = [], [], []
    is_websocket = contender is SCANWIRE_WS
    with serve_scanwire(cpus=bench.server_cpus) as server:
        feed = contenders.open_external_scan(server, work, websocket=is_websocket, rows=ROWS_EACH)
        push(server, feed, work, tick_s=0.01)
        feeding_mb = server.memory_mb(peak=True)
        for _ in range(READS):
            before_mb, before_s = server.memory_mb(), server.cpu_s()
            server.forget_peak()
            with bench.subscribe(server, feed.subscription, connections=1, events=work.events) as load:
                reception = load.wait()
            bench.check(f"finished: {contender.name}", reception)
            rates.append(reception.received / reception.whole_s)
            growths.append(server.memory_mb(peak=True) - before_mb)
            costs.append((server.cpu_s() - before_s) / reception.received * 1e6)
        peak_mb = max(feeding_mb, server.memory_mb(peak=True))
    rate, cost = statistics.median(rates), statistics.mean(costs)
    return contender.name, f"{rate:,.0f}", cost, max(growths), peak_mb, f"{work.events:,}"


def beside_scans(bench: Bench) -> None:
    """1 × 500 subscribers, 50 events/s, while two market scans use all cores; nothing is pinned."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    free = replace(bench, server_cpus=None, load_cpus=None)
    prices = bench.folder / "synthetic.parquet"
    make_synthetic(prices, symbols=int(bench.scale(4000, 500)), days=1250)
    work = Work(rate=50, events=int(50 * bench.scale(10, 2)))
    quiet, busy = "nothing beside it", "two scans beside it"
    for contender in (SCANWIRE_SSE, SCANWIRE_WS):
        runs: dict[str, list[Run]] = {f"{contender.name}, {words}": [] for words in (quiet, busy)}
        env = {"SCANWIRE_PRICES": str(prices)}
        with contenders.start_scanwire(work, None, websocket=contender is SCANWIRE_WS, env=env) as running:
            finished = 0
            for _ in range(free.rounds):
                for name, own in runs.items():
                    with _keep_scanning(running.server, 2 * name.endswith(busy)) as done:
                        own.append(measure_fanout(free, running, work, 500))
                    free.check(name, own[-1].reception)
                    finished += len(done)
        print_fanout(
            free, f"1 × 500 subscribers, 50 events/s, nothing pinned, {finished} scans finished meanwhile", runs
        )


@contextlib.contextmanager
def _keep_scanning(server: Server, scans: int) -> Iterator[list[str]]:
    """So many market scans run at any time until the block is left; gives the ids of those that finished."""
    finished: list[str] = []
    leaving = threading.Event()

    def scan() -> None:
        while not leaving.is_set():
            snapshot = fetch(server, "/v1/scans", {"scanner": "gap-up", "reuse": "never"})
            while snapshot["end"] is None:
                time.sleep(0.05)
                snapshot = fetch(server, f"/v1/scans/{snapshot['id']}")
            finished.append(snapshot["id"])

    threads = [threading.Thread(target=scan) for _ in range(scans)]
    for thread in threads:
        thread.start()
    try:
        yield finished
    finally:
        leaving.set()
        for thread in threads:
            thread.join()


def stalled_client(bench: Bench) -> None:
    """Clients that stop reading among 500 that do not: what they cost, and whether the others notice."""
    stalled = 5
    # Large frames: what the kernel holds for a connection must be full before the server holds anything.
    work = Work(rate=100, events=int(100 * bench.scale(12, 6)), frame_bytes=8192)
    table = []
    for contender in bench.choose(SCANWIRE_SSE, SCANWIRE_WS, NCHAN_SSE, SSE_STARLETTE):
        runs: dict[int, list[Run]] = {0: [], stalled: []}
        growths: dict[int, list[float]] = {0: [], stalled: []}
        with contender.start(work, bench.server_cpus) as running:
            measure_fanout(bench, running, work, 500)  # takes the memory that every later run takes again
            for _ in range(bench.rounds):
                for count, own in runs.items():
                    before_mb = running.server.memory_mb()
                    running.server.forget_peak()
                    own.append(measure_fanout(bench, running, work, 500, stalled=count))
                    growths[count].append(running.server.memory_mb(peak=True) - before_mb)
                    bench.check(f"stalled client: {contender.name}", own[-1].reception)
        table.append(_compare_stalled(contender, runs, growths, stalled))
    print_table(
        f"{stalled} clients that stop reading among 500, 100 events/s of {work.frame_bytes:,} bytes",
        ("server", "p99 ms without", "p99 ms with", "ratio", "server memory for each, KB", "received"),
        table,
    )


def _compare_stalled(
    contender: Contender, runs: dict[int, list[Run]], growths: dict[int, list[float]], stalled: int
) -> tuple[object, ...]:
    without, beside = ([run.reception.p99_ms for run in runs[count]] for count in (0, stalled))
    more_mb = statistics.median(b - a for a, b in zip(growths[0], growths[stalled], strict=True))
    return (
        contender.name,
        statistics.median(without),
        statistics.median(beside),
        statistics.median(b / a for a, b in zip(without, beside, strict=True)),
        more_mb * 1024 / stalled,
        f"{sum(run.reception.received for own in runs.values() for run in own):,}",
    )
