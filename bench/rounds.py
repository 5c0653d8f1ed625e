"""Rounds of one work over several servers that take turns, and the table that comes of them."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.contenders import FLOOR, Contender, Feed, Running, Work
from bench.measure import Server, print_table
from bench.producer import produce
from bench.subscribers import Load, LoadFailed, Reception, Subscription, subscribe


@dataclass(frozen=True, slots=True)
class Run:
    """One server, once: what it cost and what arrived."""

    cpu_s: float
    reception: Reception

    @property
    def cpu_us(self) -> float:
        """CPU time of the server process for each delivery."""
        return self.cpu_s / max(1, self.reception.received) * 1e6


@dataclass(slots=True)
class Bench:
    """What all works share."""

    folder: Path
    load: Path  # the compiled load
    server_cpus: set[int] | None
    load_cpus: set[int] | None
    rounds: int
    is_quick: bool
    faults: list[str] = field(default_factory=list)  # anything here fails the bench
    costs: dict[str, dict[str, float]] = field(default_factory=dict)  # for the plot: work -> server -> µs a delivery

    def scale(self, full: float, quick: float) -> float:
        return quick if self.is_quick else full

    def describe_rounds(self) -> str:
        return "one round" if self.rounds == 1 else f"medians of {self.rounds} rounds"

    def choose(self, *wanted: Contender) -> list[Contender]:
        """Those that can run here; the others are named."""
        for contender in wanted:
            if contender.needs:
                print(f"left out: {contender.name} (not installed: {', '.join(contender.needs)})")
        return [contender for contender in wanted if not contender.needs]

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """A server that cannot do the work fails the bench, not the other servers' runs."""
        try:
            yield
        except LoadFailed as failure:
            self.faults.append(f"{name}: {failure}")

    def check(self, name: str, reception: Reception) -> None:
        if reception.fault:
            self.faults.append(f"{name}: {reception.fault}")

    def subscribe(
        self,
        server: Server,
        subscription: Subscription,
        *,
        connections: int,
        events: int = 1,
        within_s: float = 60,
        concurrent: int = 128,
        stalled: int = 0,
        heartbeats: bool = False,
    ) -> contextlib.AbstractContextManager[Load]:
        return subscribe(
            self.load,
            server.port,
            subscription,
            connections=connections,
            events=events,
            within_s=within_s,
            cpus=self.load_cpus,
            concurrent=concurrent,
            stalled=stalled,
            heartbeats=heartbeats,
        )


def push(server: Server, feed: Feed, work: Work, tick_s: float = 0) -> None:
    """Produces the events of a work into a feed."""
    events = 1 if feed.makes_events else work.events
    produce(server.port, feed.make_post, rate=work.rate, events=events, tick_s=tick_s, last=feed.last)


def measure_fanout(
    bench: Bench, running: Running, work: Work, connections: int, *, tick_s: float = 0, stalled: int = 0
) -> Run:
    """All events of a new feed to so many subscribers, from the first event to the last delivery."""
    feed, server = running.open_feed(), running.server
    within_s = 4 * work.events / work.rate + 30
    with bench.subscribe(
        server, feed.subscription, connections=connections, events=work.events, within_s=within_s, stalled=stalled
    ) as load:
        time.sleep(0.3)
        before = server.cpu_s()
        push(server, feed, work, tick_s)
        reception = load.wait()
        return Run(server.cpu_s() - before, reception)


def compare_fanout(
    bench: Bench, title: str, wanted: Sequence[Contender], work: Work, connections: int, tick_s: float = 0
) -> None:
    """The table of a fan-out. The servers take turns, and the ratio to the floor is taken within each round."""
    chosen = bench.choose(*wanted)
    runs: dict[str, list[Run]] = {contender.name: [] for contender in chosen}
    with contextlib.ExitStack() as stack:
        started = [
            (contender.name, stack.enter_context(contender.start(work, bench.server_cpus))) for contender in chosen
        ]
        for _ in range(bench.rounds):
            for name, running in started:
                with bench.attempt(f"{title}: {name}"):
                    run = measure_fanout(bench, running, work, connections, tick_s=tick_s)
                    bench.check(f"{title}: {name}", run.reception)
                    runs[name].append(run)
    print_fanout(bench, title, runs)


def print_fanout(bench: Bench, title: str, runs: dict[str, list[Run]]) -> None:
    """Prints the table, of those servers that did every round."""
    floor = runs.get(FLOOR.name)
    rows = []
    for name, own in runs.items():
        if len(own) < bench.rounds:
            continue
        receptions = [run.reception for run in own]
        speed = statistics.median(reception.received / max(reception.events_s, 1e-3) for reception in receptions)
        ratio: float | str = ""
        if floor:
            ratio = statistics.median(run.cpu_us / least.cpu_us for run, least in zip(own, floor, strict=True))
        cpu_us = statistics.median(run.cpu_us for run in own)
        bench.costs.setdefault(title, {})[name] = cpu_us
        rows.append(
            (
                name,
                cpu_us,
                ratio,
                statistics.median(reception.p50_ms for reception in receptions),
                statistics.median(reception.p99_ms for reception in receptions),
                max(reception.max_ms for reception in receptions),
                f"{sum(reception.expected for reception in receptions):,}",
                f"{sum(reception.received for reception in receptions):,}",
                f"{speed:,.0f}",
                f"{max(reception.load_cpu_s / max(reception.whole_s, 1e-3) for reception in receptions):.0%}",
                f"{receptions[-1].bytes / max(1, receptions[-1].received):.0f}",
            )
        )
    headers = ("server", "CPU µs/delivery", "× floor", "p50 ms", "p99 ms", "max ms", "expected", "received")
    print_table(f"{title} ({bench.describe_rounds()})", (*headers, "deliveries/s", "load busy", "bytes each"), rows)
