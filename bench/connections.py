"""Works that count what a connection costs: memory, time to open, and thousands of them held."""

import statistics
import time

from bench import contenders
from bench.contenders import FLOOR, NCHAN_SSE, SCANWIRE_SSE, Work
from bench.measure import print_table
from bench.rounds import Bench, push

SETTLE_S = 1.0


def idle_memory(bench: Bench) -> None:
    """Server memory for each idle connection, over 2,000 of them."""
    count, work, table = int(bench.scale(2000, 1000)), Work(rate=1, events=1), []
    for contender in bench.choose(*contenders.EVERYONE):
        with bench.attempt(f"memory: {contender.name}"), contender.start(work, bench.server_cpus) as running:
            subscription = running.open_feed().subscription
            # The first connections pay for what is loaded and allocated once.
            with bench.subscribe(running.server, subscription, connections=100):
                time.sleep(SETTLE_S)
                before_mb = running.server.memory_mb()
                with bench.subscribe(running.server, subscription, connections=count):
                    time.sleep(SETTLE_S)
                    after_mb = running.server.memory_mb()
            table.append((contender.name, (after_mb - before_mb) * 1024 / count, before_mb, after_mb))
    print_table(
        f"Memory of the server for each of {count:,} idle connections (resident; the kernel's own is not in it)",
        ("server", "KB/connection", "MB before", "MB after"),
        table,
    )


def connects(bench: Bench) -> None:
    """Connects per second, 128 at a time, each until its first bytes."""
    count, work = int(bench.scale(5000, 1000)), Work(rate=1, events=1)
    rates: dict[str, list[float]] = {}
    costs: dict[str, list[float]] = {}
    for _ in range(bench.rounds):
        for contender in bench.choose(*contenders.EVERYONE) if not rates else contenders.EVERYONE:
            if contender.needs:
                continue
            with bench.attempt(f"connects: {contender.name}"), contender.start(work, bench.server_cpus) as running:
                before = running.server.cpu_s()
                with bench.subscribe(running.server, running.open_feed().subscription, connections=count) as load:
                    rates.setdefault(contender.name, []).append(count / load.connect_s)
                    cpu_s = running.server.cpu_s() - before
                    costs.setdefault(contender.name, []).append(cpu_s / count * 1e6)
    print_table(
        f"{count:,} connects, 128 at a time ({bench.describe_rounds()})",
        ("server", "connects/s", "CPU µs/connect", "ready"),
        [
            (name, f"{statistics.median(own):,.0f}", statistics.median(costs[name]), f"{count * len(own):,}")
            for name, own in rates.items()
        ],
    )


def hold(bench: Bench) -> None:
    """15,000 connections held for 60 s with heartbeats on time; then one event reaches all."""
    count, hold_s = int(bench.scale(15_000, 3000)), bench.scale(60, 20)
    heartbeat_s, work, table = 15.0, Work(rate=1, events=1), []
    for contender in bench.choose(FLOOR, SCANWIRE_SSE, NCHAN_SSE):
        is_own = contender is SCANWIRE_SSE
        wait_s = hold_s if is_own else SETTLE_S  # the others have no heartbeats as they are set up here
        with contender.start(work, bench.server_cpus) as running:
            server, feed = running.server, running.open_feed()
            with bench.subscribe(
                server, feed.subscription, connections=count, within_s=wait_s + 60, heartbeats=True
            ) as load:
                before = server.cpu_s()
                time.sleep(wait_s)
                held_cpu_s = server.cpu_s() - before
                push(server, feed, work)
                reception = load.wait()
            memory_mb = server.memory_mb(peak=True)
        bench.check(f"hold: {contender.name}", reception)
        if is_own and (reception.fewest_beats < hold_s // heartbeat_s or reception.longest_gap_s > heartbeat_s + 1):
            gap = f"{reception.fewest_beats} heartbeats at least, {reception.longest_gap_s:.1f} s at most between two"
            bench.faults.append(f"hold: heartbeats were late: {gap}")
        beats = (reception.fewest_beats, reception.longest_gap_s, held_cpu_s / wait_s * 100) if is_own else ("",) * 3
        table.append((contender.name, f"{count / load.connect_s:,.0f}", wait_s, *beats, reception.closed,
                      reception.max_ms / 1000, memory_mb, f"{reception.received:,}"))  # fmt: skip
    print_table(
        f"{count:,} connections held, then one event to all",
        (
            "server",
            "connects/s",
            "held s",
            "fewest heartbeats",
            "longest gap s",
            "CPU % while held",
            "closed",
            "to the last, s",
            "memory MB",
            "received",
        ),
        table,
    )
