"""The engine against a list: whatever is submitted, cancelled, killed, too slow or stopped comes to exactly one end."""

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from app.core.errors import AtCapacity, RateLimited
from app.core.event import EventType
from app.core.scan import State
from tests.conftest import Gate
from tests.test_engine import Engine

pytestmark = pytest.mark.usefixtures("trial_scanners")

CLIENTS = ("me", "you")
MAX_ACTIVE, MAX_QUEUED, MAX_RUNNING = 4, 3, 2
# What a scan is to do, and how it ends when nobody cancels it.
ENDS = {
    "finds": State.COMPLETED,
    "waits": State.COMPLETED,
    "dies once": State.COMPLETED,
    "dies": State.FAILED,
    "hangs": State.FAILED,
}


class Accepted(NamedTuple):
    id: str
    client: str
    kind: str
    gate: Gate | None


class EngineMachine(RuleBasedStateMachine):
    prices: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.loop = asyncio.Runner()
        self.accepted: list[Accepted] = []  # the oracle
        self.cancelled: set[str] = set()
        self.numbers = itertools.count()

    def do(self, work: Awaitable[Any]) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(60):
                return await work

        return self.loop.run(bounded())

    @initialize()
    def start(self) -> None:
        bounds = {"max_active_per_client": MAX_ACTIVE, "max_queued": MAX_QUEUED, "max_running": MAX_RUNNING}
        self.engine = Engine(self.folder, self.prices, workers=2, chunk_deadline_s=1.5, **bounds)
        self.context: AbstractAsyncContextManager[Engine] = self.engine.run()
        self.do(self.context.__aenter__())

    def stop(self) -> None:
        self.do(self.context.__aexit__(None, None, None))

    def find_active(self) -> list[Accepted]:
        return [one for one in self.accepted if not self.engine.log.get(one.id).state.is_terminal]

    @rule(kind=st.sampled_from(["finds", "waits", "dies once", "dies"]), client=st.sampled_from(CLIENTS))
    def submit(self, kind: str, client: str) -> None:
        number = next(self.numbers)
        asked: dict[str, Any] = {"symbols": ["AAPL", "IBM"]}
        gate = None
        if kind == "waits":
            gate = Gate(self.folder / f"gate-{number}")
            asked["gate"] = str(gate.path)
        elif kind == "dies once":
            asked["marker"] = str(self.folder / f"crashed-{number}")
        elif kind == "hangs":
            asked["how"] = "hanging"
        scanner = "trial-gated" if kind in ("finds", "waits") else "trial-crashing"
        active = self.find_active()
        try:
            scan = self.do(self.engine.submit(scanner, client, **asked))
        except (AtCapacity, RateLimited):
            assert len(active) >= MAX_RUNNING + MAX_QUEUED or sum(one.client == client for one in active) >= MAX_ACTIVE
        else:
            self.accepted.append(Accepted(scan.id, client, kind, gate))

    @precondition(lambda self: all(one.kind != "hangs" for one in self.accepted))
    @rule(client=st.sampled_from(CLIENTS))
    def submit_one_that_hangs(self, client: str) -> None:
        self.submit("hangs", client)

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.accepted))
        if not self.engine.log.get(one.id).state.is_terminal:
            self.cancelled.add(one.id)
        self.do(self.engine.runner.cancel(one.id, one.client))

    @precondition(lambda self: any(one.gate and not one.gate.path.is_file() for one in self.accepted))
    @rule()
    def let_the_first_through(self) -> None:
        next(one.gate for one in self.accepted if one.gate and not one.gate.path.is_file()).open()

    @rule()
    def pass_time(self) -> None:
        self.do(asyncio.sleep(0.05))

    @precondition(lambda self: self.accepted)
    @rule()
    def restart(self) -> None:
        self.stop()
        self.start()

    def teardown(self) -> None:
        try:
            for one in self.accepted:
                if one.gate and not one.gate.path.is_file():
                    one.gate.open()
            self.do(self.engine.until(lambda: not self.find_active()))
            for one in self.accepted:
                self.check_end(one)
            self.do(self.until_at_rest())
            assert [self.engine.runner.count_active(client) for client in CLIENTS] == [0, 0]
            # Every slot and worker is there: as many as may run do run, and come to their end.
            last = [self.do(self.engine.submit("trial-gated", "me", symbols=["AAPL"])) for _ in range(MAX_RUNNING)]
            for scan in last:
                assert self.do(self.engine.finish(scan)).state is State.COMPLETED
        finally:
            self.stop()
            self.loop.close()
            shutil.rmtree(self.folder)

    async def until_at_rest(self) -> None:
        while not self.engine.is_at_rest():  # the end is shown before the task that wrote it is over  # noqa: ASYNC110
            await asyncio.sleep(0)

    def check_end(self, one: Accepted) -> None:
        scan, events = self.engine.log.get(one.id), self.do(self.engine.events(self.engine.log.get(one.id)))
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [event.type for event in events].count(EventType.END) == 1
        assert events[-1].type is EventType.END
        assert scan.end is not None
        # One that waited at its gate for too long, or one whose worker the machine had no time for.
        is_late = scan.state is State.FAILED and "did not return within" in scan.end["error"]["detail"]
        was_cancelled = scan.state is State.CANCELLED and one.id in self.cancelled
        assert scan.state is ENDS[one.kind] or is_late or was_cancelled
        rows = self.do(self.engine.rows(scan))
        days = [(row["symbol"], row["date"]) for row in rows]
        assert scan.matches == len(rows) == len(set(days))
        if scan.state is State.COMPLETED:
            assert [symbol for symbol, _ in days] == ["AAPL", "IBM"]


def test_every_accepted_scan_comes_to_one_end_and_every_place_is_given_back(sample_prices: Path) -> None:
    EngineMachine.prices = sample_prices
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=6,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
