"""Rules of requests that are like the one before on their connection: they are answered the same, and nothing that
differs in anything that was checked is taken for one."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from app.api.security import Security
from app.log.sqlite import SqliteJournal
from app.push.plain import Head, PlainAnswers
from tests.conftest import until
from tests.peers import Peer, meet
from tests.serving import Serving, serve

on_one_loop = pytest.mark.asyncio(loop_scope="module")

# What a head may be

VALUES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20).map(str.encode)
NAMES = st.sampled_from((b"Host", b"Accept", b"Authorization", b"X-Any"))
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=4)
NUMBERS = st.integers(1, 10**9)


def make_head(fields: list[tuple[bytes, bytes]], size: int | None, number: int | None) -> bytes:
    lines = [b"POST /v1/scans/s_a/events HTTP/1.1", *(name + b": " + value for name, value in fields)]
    lines += [] if number is None else [b"producer-seq: %d" % number]
    lines += [] if size is None else [b"Content-Length: %d" % size]
    return b"\r\n".join(lines) + b"\r\n\r\n"


@given(FIELDS, st.binary(max_size=50), st.binary(max_size=50), NUMBERS, NUMBERS)
def test_a_request_with_the_same_head_is_known_whatever_its_body_and_number(
    fields: list[tuple[bytes, bytes]], first: bytes, body: bytes, number: int, other: int
) -> None:
    head = Head(make_head(fields, len(first), number) + first)
    assert head.is_whole
    varying = {b"content-length": b"%d" % len(body), b"producer-seq": b"%d" % other}
    assert head.match(make_head(fields, len(body), other) + body) == (varying, body)
    assert head.match(make_head(fields, len(first), number) + first) is not None


@given(FIELDS, FIELDS, st.binary(max_size=50))
def test_a_request_that_differs_in_any_other_field_is_not_known(
    fields: list[tuple[bytes, bytes]], others: list[tuple[bytes, bytes]], body: bytes
) -> None:
    head = Head(make_head(fields, len(body), None) + body)
    assert (head.match(make_head(others, len(body), None) + body) is None) == (others != fields)
    assert head.match(make_head(fields, None, None) + body) is None
    assert head.match(make_head(fields, len(body), 1) + body) is None


@given(FIELDS, st.binary(min_size=1, max_size=50), st.data())
def test_what_is_not_one_whole_request_is_not_known(
    fields: list[tuple[bytes, bytes]], body: bytes, data: st.DataObject
) -> None:
    whole = make_head(fields, len(body), 7) + body
    head = Head(whole)
    for cut in range(len(whole)):
        assert head.match(whole[:cut]) is None
        assert not Head(whole[:cut]).is_whole
    assert head.match(whole + data.draw(st.binary(min_size=1))) is None
    assert not Head(whole + whole).is_whole


@pytest.mark.parametrize("value", [b"1\n", b"1\rHost: b", b"\x00", b"+1", b"1_0", b"-1", b"\xb2", b"1" * 300, b""])
@pytest.mark.parametrize("field", [b"content-length", b"Producer-Seq"])
def test_a_value_that_the_parser_should_see_is_not_known(field: bytes, value: bytes) -> None:
    line = b"GET / HTTP/1.1\r\n" + field + b": "
    request = line + value + b"\r\n\r\nx"
    if field == b"content-length" or not value.isascii() or len(value) > 256 or min(value, default=32) < 32:
        assert Head(line + b"1\r\n\r\nx").match(request) is None


# What comes of it


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(tmp_path_factory: pytest.TempPathFactory, sample_prices: Path) -> AsyncIterator[Serving]:
    settings: dict[str, Any] = {"read_per_s": 1000.0, "read_burst": 1000, "max_events_body_bytes": 4096}
    async with serve(tmp_path_factory.mktemp("state"), sample_prices, **settings) as serving:
        yield serving


class Checks:
    def __init__(self) -> None:
        self.count = 0


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    """How many requests were checked."""
    checks, check = Checks(), Security.check

    def counted(security: Security, scope: Any) -> str:
        checks.count += 1
        return check(security, scope)

    monkeypatch.setattr(Security, "check", counted)
    return checks


class Caller:
    """Sends each request in one piece."""

    def __init__(self, peer: Peer, snapshot: dict[str, Any]) -> None:
        self.peer = peer
        self.path = snapshot["links"]["self"]
        self.events = snapshot["links"]["events"]
        self.token = f"Authorization: Bearer {snapshot['producer_token']}"

    async def poll(self, *fields: str) -> tuple[int, dict[bytes, bytes], Any]:
        await self.peer.ask(self.path, *fields)
        return await self.read()

    async def send_row(self, number: int | None = None, rows: str = '{"a":1}', token: str | None = None) -> None:
        body = f'{{"type":"matches","rows":[{rows}]}}'.encode()
        fields = [token or self.token, "Content-Type: application/json", f"Content-Length: {len(body)}"]
        fields += [] if number is None else [f"Producer-Seq: {number}"]
        await self.peer.ask(self.events, *fields, method="POST", body=body)

    async def post(self, *args: Any, **options: Any) -> tuple[int, Any]:
        await self.send_row(*args, **options)
        status, _, answer = await self.read()
        return status, answer

    async def read(self) -> tuple[int, dict[bytes, bytes], Any]:
        line, fields = await self.peer.read_head()
        body = await self.peer.read_exactly(int(fields.get(b"content-length", b"0")))
        return int(line.split()[1]), fields, json.loads(body) if body else None


@pytest_asyncio.fixture(loop_scope="module")
async def caller(serving: Serving) -> AsyncIterator[Caller]:
    snapshot = await serving.submit("external")
    async with meet(serving.url) as peer:
        yield Caller(peer, snapshot)


@on_one_loop
async def test_polls_with_the_same_head_are_checked_twice_and_answered_for_ever(caller: Caller, checks: Checks) -> None:
    answers = [await caller.poll() for _ in range(10)]
    assert checks.count == 2  # of the first on a connection nobody knows whether another one follows
    assert {status for status, _, _ in answers} == {200}
    assert {answer["cursor"] for _, _, answer in answers} == {answers[0][2]["cursor"]}
    hints = [answer["poll_after_s"] for _, _, answer in answers]
    assert hints == sorted(hints)
    assert hints[-1] > hints[0]


@on_one_loop
async def test_a_poll_that_has_the_same_head_but_an_etag_is_answered_with_what_is_new(
    caller: Caller, checks: Checks
) -> None:
    etag = (await caller.poll())[1][b"etag"].decode()
    for _ in range(3):
        assert (await caller.poll(f"If-None-Match: {etag}"))[0] == 304
    checked = checks.count
    assert (await caller.post())[0] == 202
    status, fields, snapshot = await caller.poll(f"If-None-Match: {etag}")
    assert (status, snapshot["matches"]) == (200, 1)
    for _ in range(3):
        assert (await caller.poll(f"If-None-Match: {fields[b'etag'].decode()}"))[0] == 304
    assert checks.count == checked + 2


@on_one_loop
async def test_posts_with_the_same_head_are_appended_in_order_and_each_number_is_looked_at(
    serving: Serving, caller: Caller, checks: Checks
) -> None:
    for number in (1, 2, 3, 4):
        status, answer = await caller.post(number, f'{{"number":{number}}}')
        assert (status, answer["seq"]) == (202, number + 1)
    assert checks.count == 2
    assert (await caller.post(4))[0] == 202  # again
    status, problem = await caller.post(6)
    assert (status, problem["expected"]) == (409, 5)
    assert (await caller.post(5, "1"))[0] == 422
    assert (await caller.post(5))[1]["seq"] == 6
    assert checks.count == 2
    rows = (await serving.http.get(caller.path + "/matches")).json()["rows"]
    assert [row.get("number") for row in rows] == [1, 2, 3, 4, None]


@on_one_loop
async def test_what_differs_from_the_request_before_is_checked(caller: Caller) -> None:
    for _ in range(3):
        assert (await caller.post())[0] == 202
    assert (await caller.post(token="Authorization: Bearer wrong"))[0] == 401
    assert (await caller.post(token="X-Other: 1"))[0] == 401
    assert (await caller.post())[0] == 202
    assert (await caller.post(rows='{"a":"' + "x" * 5000 + '"}'))[0] == 413


@on_one_loop
async def test_posts_that_come_while_one_is_being_committed_are_answered_in_their_order(
    serving: Serving, caller: Caller
) -> None:
    for _ in range(3):
        await caller.post()
    for place in range(20):  # each in a piece of its own, or several in one, as the network likes
        await caller.send_row(rows=f'{{"place":{place}}}')
    seqs = [(await caller.read())[2]["seq"] for _ in range(20)]
    assert seqs == list(range(5, 25))
    rows = (await serving.http.get(caller.path + "/matches")).json()["rows"]
    assert [row["place"] for row in rows if "place" in row] == list(range(20))


@on_one_loop
async def test_a_post_that_is_cut_in_two_is_appended_once(serving: Serving, caller: Caller) -> None:
    for _ in range(3):
        await caller.post()
    body = b'{"type":"matches","rows":[{"a":2}]}'
    fields = [caller.token, "Content-Type: application/json", f"Content-Length: {len(body)}"]
    await caller.peer.ask(caller.events, *fields, method="POST", body=body[:9])
    await asyncio.sleep(0)
    await caller.peer.send(body[9:])
    assert (await caller.read())[2]["seq"] == 5
    assert (await caller.post())[1]["seq"] == 6


@on_one_loop
async def test_a_producer_that_leaves_while_its_post_is_committed_has_posted(serving: Serving) -> None:
    snapshot = await serving.submit("external")
    async with meet(serving.url) as peer:
        caller = Caller(peer, snapshot)
        for _ in range(3):
            await caller.post()
        await caller.send_row()
    await until(lambda: serving.service.log.get(snapshot["id"]).matches == 4)


@on_one_loop
async def test_a_journal_that_cannot_be_written_refuses_and_the_next_post_is_taken(
    serving: Serving, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2, 3):
        await caller.post(number)
    journal = serving.service.log._journal
    assert isinstance(journal, SqliteJournal)
    monkeypatch.setattr(journal, "fault", "The journal cannot be written (disk full).")
    assert (await caller.post(4))[0] == 503
    monkeypatch.undo()
    assert (await caller.post(4))[1]["seq"] == 5


@on_one_loop
async def test_a_request_that_came_behind_another_is_not_known_by_the_head_of_an_earlier_one(
    serving: Serving, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = (await serving.submit("external"))["links"]["self"]
    journal, kept = serving.service.log._journal, list[Any]()
    submit, take, taken = journal.submit, PlainAnswers.take_data, list[bytes]()

    def note(wire: PlainAnswers, data: bytes) -> None:
        take(wire, data)
        taken.append(data)

    monkeypatch.setattr(PlainAnswers, "take_data", note)
    await caller.peer.ask("/healthz")
    await caller.read()
    monkeypatch.setattr(journal, "submit", kept.append)
    await caller.peer.ask(other, method="DELETE")  # waits for the journal
    await until(lambda: kept)
    await caller.peer.ask(caller.path)
    await until(lambda: taken[-1].startswith(f"GET {caller.path}".encode()))
    monkeypatch.undo()
    for writes in kept:
        submit(writes)
    about = [(await caller.read())[2]["links"]["self"] for _ in range(2)]
    assert about == [other, caller.path]
    await caller.peer.ask(other, method="DELETE")
    assert (await caller.read())[2]["links"]["self"] == other


@on_one_loop
async def test_a_request_that_comes_before_the_last_one_has_left_its_layers_goes_the_long_way(
    serving: Serving, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, kept, may_leave = serving.service.log._journal, list[Any](), asyncio.Event()
    submit, wait = journal.submit, asyncio.wait

    async def wait_on(*args: Any, **options: Any) -> Any:
        done = await wait(*args, **options)
        await may_leave.wait()
        return done

    for _ in range(3):
        await caller.post(token=f"{caller.token} ")  # of another head
    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "wait", wait_on)
        assert (await caller.post())[0] == 202
        patch.setattr(journal, "submit", kept.append)
        await caller.send_row()
        await until(lambda: kept)
        may_leave.set()
        await until(lambda: all("wait_on" not in repr(task.get_stack()) for task in asyncio.all_tasks()))
    for writes in kept:
        submit(writes)
    assert (await caller.read())[2]["seq"] == 6
    assert (await caller.post())[1]["seq"] == 7


@on_one_loop
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_request_whose_body_was_not_read_yet_is_not_known(caller: Caller, method: str) -> None:
    path = caller.path if method == "GET" else "/v1/nothing"
    statuses = []
    for _ in range(4):
        await caller.peer.ask(path, "Transfer-Encoding: chunked", method=method)
        statuses.append((await caller.read())[0])
        await caller.peer.send(b"0\r\n\r\n")
        assert (await caller.poll())[0] == 200
    assert statuses == [200 if method == "GET" else 404] * 4


@on_one_loop
async def test_answers_to_the_same_request_have_the_date_of_their_own_second(caller: Caller) -> None:
    first = (await caller.poll())[1][b"date"]
    async with asyncio.timeout(10):
        while (await caller.poll())[1][b"date"] == first:
            pass


@on_one_loop
async def test_a_connection_on_which_nothing_more_comes_is_closed(caller: Caller, serving: Serving) -> None:
    for _ in range(3):
        await caller.poll()
        await caller.post()
    assert await caller.peer.read_some() == b""  # uvicorn's own 5 s
