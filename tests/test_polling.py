"""Rules for clients that ask: a long poll waits for what is worth it, gives its place back, and hints are true."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from app.core.scan import Progress, State
from app.push import reader as reader_module
from tests.conftest import until
from tests.legacy.clients import Clock
from tests.peers import meet
from tests.serving import Serving, serve
from tests.test_bad_input import check_problem
from tests.test_push import add_scan
from tests.test_scan import QUEUED, STARTED, ended, found

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("both_paths")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(
    tmp_path_factory: pytest.TempPathFactory, sample_prices: Path, both_paths: None
) -> AsyncIterator[Serving]:
    async with serve(tmp_path_factory.mktemp("state"), sample_prices) as serving:
        yield serving


async def test_a_long_poll_of_events_waits_though_there_is_progress(serving: Serving) -> None:
    log = serving.service.log
    await add_scan(log, "s_progress", QUEUED, STARTED)
    log.publish("s_progress", Progress(done=1, total=5, unit="symbols"))
    cursor = f"{log.epoch}-{log.shown_n}"
    asking = asyncio.create_task(
        serving.http.get(f"/v1/scans/s_progress/events?after={cursor}", headers={"Prefer": "wait=25"})
    )
    await until(lambda: serving.service.limits.statistics().streams == 1 or asking.done())
    assert not asking.done()
    await log.append("s_progress", found(2))
    answer = await asking
    assert answer.headers["preference-applied"] == "wait=25"
    assert [event["type"] for event in answer.json()["events"]] == ["matches"]
    await log.append("s_progress", ended(State.COMPLETED))


@pytest.mark.parametrize("tail", ["", "/events"])
async def test_a_long_poll_whose_client_has_left_gives_its_place_back(serving: Serving, tail: str) -> None:
    log, name = serving.service.log, f"s_left{len(tail)}"
    await add_scan(log, name, QUEUED, STARTED)
    async with meet(serving.url) as peer:
        await peer.ask(f"/v1/scans/{name}{tail}?after={log.epoch}-{log.shown_n}", "Prefer: wait=60")
        await until(lambda: serving.service.limits.statistics().streams == 1)
    await until(lambda: serving.service.limits.statistics().streams == 0)
    assert serving.service.sessions.statistics().streams == 0
    await until(lambda: serving.service.hub.statistics().subscribers == {})


async def test_the_hints_of_long_polls_without_news_grow(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, long_poll_max_s=0.01) as serving:
        log = serving.service.log
        await add_scan(log, "s_a", QUEUED, STARTED)
        for tail in ("", "/events"):
            address = f"/v1/scans/s_a{tail}?after={log.epoch}-{log.shown_n}"
            hints = [
                (await serving.http.get(address, headers={"Prefer": "wait=1"})).json()["poll_after_s"] for _ in range(5)
            ]
            assert all(later >= earlier * 1.19 for earlier, later in itertools.pairwise(hints))


async def test_a_hint_aims_just_behind_the_end_that_is_expected_by_now(tmp_path: Path, sample_prices: Path) -> None:
    clock = Clock()
    async with serve(tmp_path, sample_prices, clock=clock, producer_timeout_s=600) as serving:
        scan = await serving.submit("external", total=60)
        token = {"Authorization": f"Bearer {scan['producer_token']}"}

        async def ask() -> float:
            hint: float = (await serving.http.get(scan["links"]["self"])).json()["poll_after_s"]
            return hint

        for passes_s, done, least in ((6, 6, 27.0), (24, 30, 30.0), (0, 30, 30.0), (10, None, 20.4), (15, None, 5.25)):
            await clock.sleep(passes_s)
            if done is not None:
                posted = await serving.http.post(
                    scan["links"]["events"], json={"type": "progress", "done": done}, headers=token
                )
                assert posted.status_code == 202
            # Anew each time: that a hint grows while nothing changes is another rule.
            serving.service.sessions._scans.clear()
            assert least - 0.01 <= await ask() <= least + 1.01


async def test_who_pages_through_events_is_not_told_to_wait_while_there_is_more(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "READ_BYTES", 1000)
    log = serving.service.log
    await add_scan(log, "s_paged", QUEUED, STARTED, *[found(20)] * 20)
    cursor = ""
    hints: list[float] = []
    seqs: list[int] = []
    while not seqs or seqs[-1] < 22:
        page = (await serving.http.get("/v1/scans/s_paged/events", params={"after": cursor} if cursor else {})).json()
        seqs += [event["seq"] for event in page["events"]]
        cursor = page["cursor"]
        hints.append(page["poll_after_s"])
    assert seqs == list(range(1, 23))
    assert len(hints) > 5
    assert hints[:-1] == [0] * (len(hints) - 1)
    assert hints[-1] >= 1  # now there is something to wait for


async def test_a_body_that_trickles_in_is_refused_when_its_time_is_over(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, body_wait_s=0.2) as serving, meet(serving.url) as peer:
        await peer.ask("/v1/scans", "Content-Type: application/json", "Content-Length: 20", method="POST", body=b'{"sc')
        status, fields, body = await peer.read_answer()
        assert status.split()[1] == b"408"
        assert fields[b"content-type"] == b"application/problem+json"
        assert json.loads(body)["type"].endswith("slow-request")
        check_problem(await serving.http.post("/v1/scans", json={"scanner": "nothing"}), 422)
