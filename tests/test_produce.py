"""The producer's side of the client: what was done is told once, whatever becomes of the connection."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from app.client import Client, Production, RequestRefused, Unreachable
from app.core.scan import digest_rows
from app.produce import PART_BYTES, PART_ROWS, split_rows
from tests.conftest import until
from tests.serving import Serving, serve

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROWS: list[dict[str, Any]] = [{"page": "a", "errors": 2}, {"page": "b", "errors": None}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(tmp_path_factory: pytest.TempPathFactory, sample_prices: Path) -> AsyncIterator[Serving]:
    async with serve(tmp_path_factory.mktemp("state"), sample_prices) as serving:
        yield serving


class Breaking(httpx.AsyncHTTPTransport):
    """Breaks some requests: before they arrive, or when they were answered and the answer is on its way."""

    def __init__(self, *, path: str = "/events", before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> None:
        super().__init__()
        self._path, self._before, self._after = path, before, after
        self.numbers: list[str | None] = []  # of the requests that were made
        self.count = 0
        self.port: int | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.port is not None:
            request.url = request.url.copy_with(port=self.port)
        if request.method != "POST" or not request.url.path.endswith(self._path):
            return await super().handle_async_request(request)
        self.count += 1
        self.numbers.append(request.headers.get("producer-seq"))
        if self.count in self._before:
            raise httpx.ConnectError("broken before", request=request)
        answer = await super().handle_async_request(request)
        if self.count in self._after:
            await answer.aread()
            raise httpx.ReadError("broken after", request=request)
        return answer


async def hurry(seconds: float) -> None:
    """Waits for no time, except for signs of life, which no test is about."""
    await asyncio.sleep(3600 if seconds == 15 else 0)


def connect(serving: Serving, **options: Any) -> Client:
    return Client(serving.url, **({"sleep": hurry} | options))


async def read_end(serving: Serving, scan: Production) -> dict[str, Any]:
    end: dict[str, Any] = (await serving.http.get(f"/v1/scans/{scan.id}")).json()["end"]
    return end


async def read_rows(serving: Serving, scan: Production) -> list[Any]:
    return list((await serving.http.get(f"/v1/scans/{scan.id}/matches")).json()["rows"])


async def test_leaving_the_block_completes_the_scan(serving: Serving) -> None:
    async with connect(serving) as client:
        async with client.produce("Report", total=2, unit="pages") as scan:
            assert scan.url == f"{serving.url}/v1/scans/{scan.id}"
            await scan.progress(1, phase="reading")
            told = (await serving.http.get(f"/v1/scans/{scan.id}")).json()
            assert told["params"] == {"title": "Report", "total": 2, "unit": "pages"}
            assert (told["progress"]["done"], told["progress"]["phase"]) == (1, "reading")
            await scan.matches(ROWS)
            assert await read_rows(serving, scan) == ROWS
        result = await client.scan(scan.id).result()
    assert (result.end["state"], result.rows) == ("completed", ROWS)
    assert scan.state == "completed"


async def test_an_exception_fails_the_scan_with_its_message_and_without_a_traceback(serving: Serving) -> None:
    async with connect(serving) as client:
        with pytest.raises(ZeroDivisionError):
            async with client.produce("Report") as scan:
                await scan.progress(1 // 0)
    end = await read_end(serving, scan)
    assert (end["state"], end["error"]["detail"]) == (
        "failed",
        "ZeroDivisionError: integer division or modulo by zero",
    )


async def test_a_cancellation_cancels_the_scan(serving: Serving) -> None:
    ready = asyncio.Event()

    async def work(client: Client) -> None:
        async with client.produce("Report") as scan:
            scans.append(scan)
            await scan.matches(ROWS)
            ready.set()
            await asyncio.Event().wait()

    scans: list[Production] = []
    async with connect(serving) as client:
        task = asyncio.create_task(work(client))
        await ready.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    end = await read_end(serving, scans[0])
    assert (end["state"], end["matches"]) == ("cancelled", 2)


async def test_an_end_in_the_block_is_the_end(serving: Serving) -> None:
    async with connect(serving) as client:
        async with client.produce("Report") as scan:
            await scan.end("failed", "There is nothing to report.")
        with pytest.raises(RequestRefused) as refused:
            await scan.progress(1)
    assert refused.value.problem["state"] == "failed"
    assert (await read_end(serving, scan))["error"]["detail"] == "There is nothing to report."


async def test_over_breaking_connections_everything_is_appended_once_and_in_order(serving: Serving) -> None:
    transport = Breaking(before=(1, 4, 5, 9), after=(2, 6, 7, 11, 13))
    rows = [{"number": number} for number in range(5)]
    async with connect(serving, transport=transport) as client, client.produce("Report") as scan:
        for row in rows:
            await scan.matches([row])
    assert await read_rows(serving, scan) == rows
    assert (await read_end(serving, scan))["digest"] == digest_rows(rows)
    assert sorted(transport.numbers, key=lambda number: int(number or 0)) == transport.numbers
    assert len(transport.numbers) > len(set(transport.numbers)) == 6


@pytest.mark.parametrize("is_late", [False, True])
async def test_what_was_cut_off_is_settled_before_the_end(serving: Serving, is_late: bool) -> None:
    """Nobody knows whether a request arrived whose sender was cancelled: it is sent again under its number."""
    arrived = asyncio.Event()

    class Holding(httpx.AsyncHTTPTransport):
        is_holding = True

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if self.is_holding and b"matches" in await request.aread():
                self.is_holding = False
                if is_late:
                    await (await super().handle_async_request(request)).aread()
                arrived.set()
                await asyncio.Event().wait()
            return await super().handle_async_request(request)

    async with connect(serving, transport=Holding()) as client, client.produce("Report") as scan:
        posting = asyncio.create_task(scan.matches(ROWS))
        await arrived.wait()
        posting.cancel()
        await asyncio.gather(posting, return_exceptions=True)
    end = await read_end(serving, scan)
    assert (end["state"], end["matches"]) == ("completed", 2)
    assert await read_rows(serving, scan) == ROWS


async def test_a_refused_event_has_not_happened_and_the_next_ones_go_on(serving: Serving) -> None:
    async with connect(serving) as client, client.produce("Report", total=3) as scan:
        with pytest.raises(RequestRefused) as refused:
            await scan.progress(4)
        assert refused.value.problem["errors"][0]["field"] == "events.0.done"
        with pytest.raises(TypeError):
            await scan.matches([{"page": object()}])
        await scan.progress(3)
        await scan.matches(ROWS)
    assert (await read_end(serving, scan))["state"] == "completed"


async def test_a_producer_is_told_that_its_scan_was_cancelled(serving: Serving) -> None:
    scans: list[Production] = []

    async def work(client: Client) -> None:
        async with client.produce("Report") as scan:
            scans.append(scan)
            await client.scan(scan.id).cancel()
            await scan.progress(1)

    async with connect(serving) as client:
        with pytest.raises(RequestRefused) as refused:
            await work(client)
    (scan,) = scans
    assert (refused.value.status, refused.value.problem["state"], scan.state) == (409, "cancelled", "cancelled")


async def test_a_lost_answer_to_the_submission_leaves_no_second_scan_behind(serving: Serving) -> None:
    before = {scan.id for scan in serving.service.log.list_scans()}
    transport = Breaking(path="/v1/scans", after=(1,))
    async with connect(serving, transport=transport) as client, client.produce("Report") as scan:
        await scan.matches(ROWS)
    made = [one for one in serving.service.log.list_scans() if one.id not in before]
    assert {(one.id == scan.id, str(one.state)) for one in made} == {(True, "completed"), (False, "cancelled")}


async def test_a_restart_of_the_server_is_survived(tmp_path: Path, sample_prices: Path) -> None:
    transport = Breaking()
    async with asyncio.timeout(40), Client("http://127.0.0.1:1", transport=transport, sleep=hurry) as client:
        async with serve(tmp_path, sample_prices) as before:
            transport.port = httpx.URL(before.url).port
            production = client.produce("Report")
            scan = await production.__aenter__()
            await scan.matches(ROWS[:1])
        posting = asyncio.create_task(scan.matches(ROWS[1:]))
        await until(lambda: transport.count >= 3)  # it tries in vain
        async with serve(tmp_path, sample_prices) as after:
            transport.port = httpx.URL(after.url).port
            await posting
            await production.__aexit__(None, None, None)
            assert await read_rows(after, scan) == ROWS
            assert (await read_end(after, scan))["state"] == "completed"


async def test_patience_has_an_end(serving: Serving) -> None:
    now = [0.0]

    async def sleep(seconds: float) -> None:
        if seconds == 15:
            await asyncio.Event().wait()
        now[0] += seconds

    transport = Breaking(before=tuple(range(2, 1000)))
    client = Client(serving.url, transport=transport, sleep=sleep, clock=lambda: now[0], random=lambda: 1.0)
    scan = client.produce("Report")

    async def work() -> None:
        async with client, scan:
            await scan.matches(ROWS)
            await scan.matches(ROWS)

    with pytest.raises(Unreachable):
        await work()
    assert 200 < now[0] <= 700  # once for the rows, and once for the end that could not be told
    assert await read_rows(serving, scan) == ROWS


async def test_a_producer_with_nothing_to_say_gives_signs_of_life(serving: Serving) -> None:
    said = asyncio.Event()

    async def sleep(seconds: float) -> None:
        if said.is_set():
            await asyncio.Event().wait()

    class Listening(httpx.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.url.path.endswith("/events") and await request.aread() == b"[]":
                said.set()
            return await super().handle_async_request(request)

    async with (
        asyncio.timeout(20),
        connect(serving, transport=Listening(), sleep=sleep) as client,
        client.produce("Report") as scan,
    ):
        await said.wait()
    assert (await read_end(serving, scan))["last_seq"] == 2


async def test_many_rows_are_split_by_number_and_by_size() -> None:
    small = [{"number": number} for number in range(2 * PART_ROWS + 1)]
    parts = list(split_rows(iter(small)))
    assert [len(part) for part in parts] == [PART_ROWS, PART_ROWS, 1]
    assert [row for part in parts for row in part] == small
    large = [{"text": "x" * (PART_BYTES // 3)}] * 7
    assert [len(part) for part in split_rows(large)] == [2, 2, 2, 1]
    assert list(split_rows([])) == []
    assert all(len(json.dumps(part)) < 2**20 for part in split_rows(large))
