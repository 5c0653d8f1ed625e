"""`scanwire check`: a healthy server passes, and one that is broken in one way fails where it is broken."""

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import pytest_asyncio

from app.commands.check import Result, Wanted, check_server
from app.core.settings import hash_key
from app.follow import ClientError
from tests import faults
from tests.conftest import until
from tests.faults import Switch, list_failed
from tests.serving import Serving, serve
from tests.test_cli import find_port, run

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("trial_scanners")]

# As the defaults are.
LIMITS: dict[str, Any] = {
    "submit_per_min": 2,
    "read_burst": 20,
    "read_per_s": 5,
    "connect_burst": 10,
    "connect_per_s": 2,
}


class Skipping:
    """The time of the limits and of the check: it passes as it does, and what would be waited for is skipped."""

    def __init__(self) -> None:
        self._skipped_s = 0.0

    def clock(self) -> float:
        return time.monotonic() + self._skipped_s

    def make_sleep(self, serving: Serving) -> Callable[[float], Awaitable[None]]:
        """A wait in which whatever scan runs on this server comes to its end, but for one that is worked elsewhere."""

        def has_ended() -> bool:
            scans = serving.service.log.list_scans()
            return all(scan.state.is_terminal or scan.scanner == "external" for scan in scans)

        async def sleep(seconds: float) -> None:
            await until(has_ended)
            self._skipped_s += seconds

        return sleep


@dataclass(frozen=True, slots=True)
class Broken:
    """A server that can be broken."""

    serving: Serving
    switch: Switch
    time: Skipping

    def begin(self, **wanted: Any) -> AsyncGenerator[Result, None]:
        self.serving.service.limits._buckets.clear()
        asked = {"scanner": None, "max_scan_s": 30, "max_answer_s": 2, "as_json": False, "junit": None}
        all_wanted = Wanted(**{"url": self.serving.url, "api_key": None, **asked, **wanted})
        return check_server(all_wanted, lambda text: None, self.time.make_sleep(self.serving), self.time.clock)

    async def check(self, **wanted: Any) -> list[Result]:
        async with asyncio.timeout(60):
            return [result async for result in self.begin(**wanted)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broken(
    tmp_path_factory: pytest.TempPathFactory, sample_prices: Path, trial_scanners: None
) -> AsyncIterator[Broken]:
    switches: list[Switch] = []

    def wrap(app: Any) -> Switch:
        switches.append(Switch(app))
        return switches[0]

    async with serve(
        tmp_path_factory.mktemp("state"), sample_prices, wrap=wrap, chunk_rows=1, max_active_per_client=8, **LIMITS
    ) as serving:
        skipping = Skipping()
        serving.service.limits._clock = skipping.clock
        yield Broken(serving, switches[0], skipping)


@pytest.fixture(autouse=True)
def _mend(broken: Broken) -> Any:
    yield
    broken.switch.fault = None


async def test_a_healthy_server_passes_every_check_and_nothing_is_left_behind(broken: Broken) -> None:
    results = await broken.check()
    assert {result.check: result.evidence for result in results if result.outcome != "pass"} == {}
    assert len(results) == 26
    evidence = {result.check: result.evidence for result in results}
    assert "was refused with 429; after exactly the " in evidence["submit limit"]
    assert "completed at poll 1 of 100; " in evidence["legacy results"]
    assert " 0 rows" not in evidence["legacy results"]
    assert re.match("post 1 was taken, and post [23] refused with 429, Retry-After ", evidence["legacy rate limit"])
    assert "of 3 sent at once 2 were accepted, 1 refused" in evidence["concurrency"]
    service = broken.serving.service
    assert [scan.id for scan in service.log.list_scans() if not scan.state.is_terminal] == []
    assert service.limits.statistics().streams == 0
    assert service.sessions.statistics().streams == 0


RESUMES = {f"resume by {name}" for name in ("SSE", "NDJSON", "WebSocket", "polls")}
CASES: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "no Retry-After": (faults.drop_retry_after, {}, {"read limit", "submit limit", "legacy rate limit"}),
    "waits that are too short": (faults.promise_too_short_waits, {}, {"submit limit"}),
    "no limits": (faults.ignore_limits, {}, {"read limit", "submit limit", "legacy rate limit"}),
    "hints that do not grow": (faults.give_the_same_hint_always, {}, {"poll hints"}),
    "bad input taken": (faults.take_anything, {}, {"input validation", "legacy refusals"}),
    "refusals without a reason": (faults.refuse_without_a_word, {}, {"input validation", "legacy refusals"}),
    "nothing cancelled": (faults.cancel_nothing, {}, {"cancel"}),
    "every third answer a 500": (faults.FailNowAndThen().serve, {}, {"answer time", "read limit"}),
    "slow answers": (faults.answer_slowly, {"max_answer_s": 0.2}, {"answer time"}),
    "SSE held back": (faults.buffer_sse, {}, {"push by SSE", "resume by SSE", "cancel"}),
    "an event lost by SSE": (faults.lose_an_event_behind_the_cursor("sse"), {}, {"resume by SSE"}),
    "an event lost by NDJSON": (faults.lose_an_event_behind_the_cursor("ndjson"), {}, {"resume by NDJSON"}),
    "an event lost by WebSocket": (faults.lose_an_event_behind_the_cursor("websocket"), {}, {"resume by WebSocket"}),
    "an event lost by polls": (faults.lose_an_event_behind_the_cursor("page"), {}, {"resume by polls"}),
    "streams that leak": (faults.never_see_who_leaves, {}, {"sessions"}),
    "no single-flight": (faults.run_everything_anew, {}, {"single-flight"}),
    "more running than may": (
        faults.answer_with(200, "/v1/performance", max_running=1),
        {"scanner": "trial-slow"},
        {"concurrency"},
    ),
    "a scan that takes too long": (None, {"scanner": "trial-slow", "max_scan_s": 0.05}, {"scan time"}),
    "a scan that fails": (None, {"scanner": "trial-raising"}, {"scan time"}),
    "not ready": (faults.answer_with(503, "/readyz"), {}, {"readiness"}),
    "not healthy": (faults.answer_with(500, "/healthz"), {}, {"health"}),
    "old rows lost": (faults.lose_legacy_rows, {}, {"legacy results"}),
    "old scans that never end": (faults.never_complete_legacy, {"max_scan_s": 20}, {"legacy results"}),
    "old addresses without successors": (faults.refuse_legacy_without_successor, {}, {"legacy refusals"}),
    "old posts without a limit": (faults.ignore_legacy_limits, {}, {"legacy rate limit"}),
    "old answers slow": (faults.answer_legacy_slowly, {"max_answer_s": 0.2}, {"legacy answer time"}),
    "completed before final": (faults.say_completed_before_final, {}, {"legacy socket"}),
    "no metrics": (faults.answer_with(404, "/metrics"), {}, {"metrics", "sessions"}),
}


@pytest.mark.parametrize("case", CASES)
async def test_what_is_broken_is_found_and_nothing_else(broken: Broken, case: str) -> None:
    broken.switch.fault, wanted, expected = CASES[case]
    results = await broken.check(**wanted)
    assert list_failed(results).keys() == expected, list_failed(results)
    assert all(list_failed(results).values())
    broken.switch.fault = None
    active = [scan.id for scan in broken.serving.service.log.list_scans() if not scan.state.is_terminal]
    assert active == []


async def test_where_the_routes_of_old_are_not_served_they_are_not_checked(broken: Broken) -> None:
    broken.switch.fault = faults.serve_no_legacy
    results = await broken.check()
    assert list_failed(results) == {}
    skipped = {result.check for result in results if result.outcome == "n/a"}
    assert skipped == {f"legacy {name}" for name in ("results", "refusals", "socket", "answer time", "rate limit")}


async def test_a_check_that_is_broken_off_leaves_nothing_behind(broken: Broken) -> None:
    coming = broken.begin()
    async for result in coming:
        if result.check == "poll hints":
            break
    service = broken.serving.service
    assert {scan.scanner for scan in service.log.list_scans() if not scan.state.is_terminal} == {"external"}
    await coming.aclose()
    assert [scan.scanner for scan in service.log.list_scans() if not scan.state.is_terminal] == []


async def test_what_is_no_scanwire_cannot_be_checked(broken: Broken) -> None:
    with pytest.raises(ClientError, match="can be reached"):
        await broken.check(url=f"http://127.0.0.1:{find_port()}")
    with pytest.raises(ClientError, match="not an address"):
        await broken.check(url="http://localhost:nowhere")
    with pytest.raises(ClientError, match="There is no scanner"):
        await broken.check(scanner="nope")
    broken.switch.fault = faults.answer_with(200, "/v1/scanners", scanners=None)
    with pytest.raises(ClientError, match="not a Scanwire server"):
        await broken.check()


async def test_on_the_command_line_a_key_opens_the_server_and_the_exit_code_tells(
    tmp_path: Path, sample_prices: Path
) -> None:
    keys: dict[str, Any] = {"api_keys": (f"ci:{hash_key('sesame')}",)}
    junit = tmp_path / "junit.xml"
    # One server for each check that goes through: neither is to see the streams and scans of the other.
    async with (
        serve(tmp_path / "first", sample_prices, **keys) as first,
        serve(tmp_path / "second", sample_prices, **keys) as second,
    ):
        none, wrong = await asyncio.gather(
            run("check", "--url", first.url), run("check", "--url", first.url, "--api-key", "wrong")
        )
        table, lines = await asyncio.gather(
            run("check", "--url", first.url, "--api-key", "sesame", "--junit", str(junit)),
            run("check", "--url", second.url, "--json", "--max-answer-s", "0.0001", SCANWIRE_API_KEY="sesame"),
        )
    assert (none.code, wrong.code, none.out + wrong.out) == (2, 2, "")
    assert "API key" in none.err
    assert "API key" in wrong.err

    assert table.code == 0, table.out
    rows = table.out.splitlines()
    assert all(row.startswith(("pass  ", "n/a   ")) for row in rows[:-1])
    assert rows[-1].startswith("23 pass, 3 n/a in ")
    suites = ElementTree.parse(junit).getroot()
    assert len(suites.findall("testsuite/testcase")) == len(rows) - 1
    assert [case.get("name") for case in suites.findall(".//testcase[skipped]")] == [
        *("read limit", "submit limit", "legacy rate limit")
    ]

    assert lines.code == 1, lines.out
    results = [json.loads(line) for line in lines.out.splitlines()]
    failed = {result["check"]: result["evidence"] for result in results if result["outcome"] == "fail"}
    assert failed.keys() == {"answer time", "legacy answer time"}
    assert all(evidence.endswith("; 0.0001 s are the target") for evidence in failed.values())
