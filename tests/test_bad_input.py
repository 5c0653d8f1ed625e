"""Bad input gets a clear refusal that names what is wrong, and nothing is lost or held by it."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.typing import Subprotocol

from tests.serving import IS_WIRED, Serving, serve

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("both_paths", "nothing_is_held")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(
    tmp_path_factory: pytest.TempPathFactory, sample_prices: Path, both_paths: None
) -> AsyncIterator[Serving]:
    async with serve(tmp_path_factory.mktemp("state"), sample_prices) as serving:
        yield serving


@pytest_asyncio.fixture(loop_scope="module")
async def nothing_is_held(serving: Serving) -> AsyncIterator[None]:
    """A refusal takes no slot, no session, no stream, no submit token, and makes no scan."""
    service = serving.service
    scans, sessions = service.log.statistics().scans, service.sessions.statistics()
    submit = service.limits.headers("submit", "ip:127.0.0.1")
    yield
    assert service.log.statistics().scans == scans
    assert service.sessions.statistics() == sessions
    assert service.limits.headers("submit", "ip:127.0.0.1") == submit
    assert (service.runner.active, service.limits.statistics().streams) == (0, 0)
    assert service.hub.statistics().subscribers == {}


def check_problem(answer: httpx.Response, status: int, *fields: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == status
    assert problem["type"]
    assert problem["title"]
    assert len(problem["detail"]) > 10
    for secret in ("/work", "/tmp", "Traceback", ".py", "site-packages"):
        assert secret not in answer.text
    if fields:
        assert {error["field"] for error in problem["errors"]} == set(fields)
    return problem


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"scanner": "gap-upp"}, "scanner"),
        ({"scanner": 7}, "scanner"),
        ({}, "scanner"),
        ({"scanner": "gap-up", "extra": 1}, "extra"),
        ({"scanner": "gap-up", "params": []}, "params"),
        ({"scanner": "gap-up", "reuse": "sometimes"}, "reuse"),
        ({"scanner": "gap-up", "cancel_when_unwatched_s": -1}, "cancel_when_unwatched_s"),
        ({"scanner": "gap-up", "params": {"gap_pct": 1}}, "gap_pct"),
        ({"scanner": "gap-up", "params": {"gap_pct_min": "much"}}, "gap_pct_min"),
        ({"scanner": "gap-up", "params": {"gap_pct_min": True}}, "gap_pct_min"),
        ({"scanner": "gap-up", "params": {"volume_min": -5}}, "volume_min"),
        ({"scanner": "gap-up", "params": {"volume_min": 1e300}}, "volume_min"),
        ({"scanner": "gap-up", "params": {"start": "2012-02-30"}}, "start"),
        ({"scanner": "gap-up", "params": {"start": "yesterday"}}, "start"),
        ({"scanner": "gap-up", "params": {"start": 20120101}}, "start"),
        ({"scanner": "gap-up", "params": {"start": "2012-02-02", "end": "2012-02-01"}}, "start"),
        ({"scanner": "gap-up", "params": {"symbols": ["AAPL", "NOSUCH"]}}, "symbols"),
        ({"scanner": "gap-up", "params": {"symbols": []}}, "symbols"),
        ({"scanner": "gap-up", "params": {"symbols": ["'; DROP TABLE scans"]}}, "symbols"),
        ({"scanner": "gap-up", "params": {"preset": "wild"}}, "preset"),
        ({"scanner": "gap-up", "params": {"where": "gap_pct >"}}, "where"),
        ({"scanner": "gap-up", "params": {"where": "gap_size > 1"}}, "where"),
        ({"scanner": "gap-up", "params": {"where": "close IN (SELECT 1)"}}, "where"),
        ({"scanner": "gap-up", "params": {"where": "close + 1"}}, "where"),
        ({"scanner": "gap-up", "params": {"where": "max(close) > 1"}}, "where"),
        ({"scanner": "gap-up", "params": {"where": "(" * 900 + "1" + ")" * 90}}, "where"),
        ({"scanner": "gap-up", "params": {"where": "x" * 2000}}, "where"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
async def test_a_wrong_submission_is_refused_and_names_the_field(
    serving: Serving, body: dict[str, Any], field: str
) -> None:
    problem = check_problem(await serving.http.post("/v1/scans", json=body), 422)
    assert problem["errors"][0]["field"].partition(".")[0] == field


async def test_a_member_that_is_missing_or_unknown_is_told_in_plain_words_what_there_is(serving: Serving) -> None:
    missing = check_problem(await serving.http.post("/v1/scans", json={}), 422, "scanner")
    assert 'scanner: is needed, such as {"scanner":"gap-up"}' in missing["detail"]
    unknown = check_problem(
        await serving.http.post("/v1/scans", json={"scanner": "gap-up", "start": "x"}), 422, "start"
    )
    assert "there are: scanner, params, reuse, cancel_when_unwatched_s. What a scanner takes goes" in unknown["detail"]


async def test_every_wrong_field_is_named_at_once(serving: Serving) -> None:
    body = {"scanner": "gap-up", "params": {"gap_pct_min": "much", "volume_min": -1, "nonsense": 1}}
    check_problem(await serving.http.post("/v1/scans", json=body), 422, "gap_pct_min", "volume_min", "nonsense")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"not json",
        b"[]",
        b"null",
        b'"gap-up"',
        b'{"scanner":"gap-up","params":{"gap_pct_min":NaN}}',
        b'{"scanner":"gap-up","params":{"gap_pct_min":1e999}}',
        b'{"a":' * 1000 + b"1" + b"}" * 1000,
        b"[" * 5000,
        b'{"scanner":"\xff\xfe"}',
        b'{"scanner":"gap-up"',
    ],
    ids=lambda content: repr(content[:30]),
)
async def test_a_body_that_cannot_be_read_is_refused(serving: Serving, content: bytes) -> None:
    answer = await serving.http.post("/v1/scans", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    check_problem(answer, answer.status_code)


@pytest.mark.parametrize("depth", [300, 900, 1100])
async def test_parameters_nested_too_deeply_are_refused_over_http_and_websocket(serving: Serving, depth: int) -> None:
    """The JSON library reads 1024 levels and writes 254, so what could be read could not be hashed."""
    params = '"scanner":"gap-up","params":{"gap_pct_min":' + "[" * depth + "]" * depth + "}}"
    headers = {"Content-Type": "application/json"}
    answer = await serving.http.post("/v1/scans", content="{" + params, headers=headers)
    assert answer.status_code in (400, 422)
    check_problem(answer, answer.status_code)
    async with open_socket(serving) as socket:
        assert (await ask(socket, '{"op":"submit",' + params))["error"]["status"] == answer.status_code
        assert (await ask(socket, '{"op":"ping"}'))["ok"] is True


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_64_kib_is_refused(serving: Serving, chunked: bool) -> None:
    body = b'{"scanner":"gap-up","params":{"where":"' + b"x" * 70_000 + b'"}}'

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    answer = await serving.http.post(
        "/v1/scans", content=pieces() if chunked else body, headers={"Content-Type": "application/json"}
    )
    check_problem(answer, 413)


async def test_a_body_of_another_type_is_refused(serving: Serving) -> None:
    answer = await serving.http.post("/v1/scans", data={"scanner": "gap-up"})
    assert "application/json" in check_problem(answer, 415)["detail"]


@pytest.mark.parametrize(
    "cursor",
    [
        "garbage",
        "abcd-",
        "abcd--1",
        "abcd-01",
        "-1",
        "ABCD-1",
        "abcd-1e3",
        "a" * 10_000,
        "абвг-1",
        "abcd-" + "9" * 19,
    ],
    ids=lambda cursor: cursor[:20],
)
async def test_a_cursor_that_is_garbage_is_refused_and_the_field_named(serving: Serving, cursor: str) -> None:
    scan = next(iter(serving.service.log.list_scans()), None)
    scan_id = scan.id if scan else (await _one_scan(serving))
    for address in (f"/v1/scans/{scan_id}/events", f"/v1/scans/{scan_id}"):
        check_problem(await serving.http.get(address, params={"after": cursor}), 400, "after")
    headers = [(b"Last-Event-ID", cursor.encode()), (b"Accept", b"text/event-stream")]
    answer = await serving.http.get(f"/v1/scans/{scan_id}/events", headers=headers)
    check_problem(answer, 400, "Last-Event-ID")


async def _one_scan(serving: Serving) -> str:
    snapshot = await serving.submit("gap-up")
    await serving.finish(snapshot["id"])
    return str(snapshot["id"])


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def finished(serving: Serving) -> str:
    return await _one_scan(serving)


@pytest.mark.parametrize("value", ["abcd-1\r\nX-Injected\nmore: 1", "abcd\n-1", "abcd\r-1", "abcd\0-1"])
async def test_line_breaks_in_a_header_do_not_get_through(serving: Serving, finished: str, value: str) -> None:
    host, port = serving.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"GET /v1/scans/{finished}/events HTTP/1.1\r\nHost: {host}:{port}\r\nLast-Event-ID: {value}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 400")
    if IS_WIRED[0]:  # else it is uvicorn's own answer
        head_bytes, _, body = answer.partition(b"\r\n\r\n")
        assert b"content-type: application/problem+json" in head_bytes
        assert "Last-Event-ID" in json.loads(body)["detail"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("scan_id", ["s_nobody", "x" * 5000, "..%2f..%2fetc%2fpasswd", "%00", "s_%0d%0aSet-Cookie:x"])
async def test_an_unknown_scan_is_404(serving: Serving, method: str, scan_id: str) -> None:
    check_problem(await serving.http.request(method, f"/v1/scans/{scan_id}"), 404)
    if method == "GET":
        for tail in ("events", "matches", "matches.csv"):
            check_problem(await serving.http.get(f"/v1/scans/{scan_id}/{tail}"), 404)


async def test_other_wrong_requests_say_what_would_be_right(serving: Serving, finished: str) -> None:
    http = serving.http
    check_problem(await http.get("/v1/nothing"), 404)
    assert "GET" in check_problem(await http.put("/v1/scans"), 405)["detail"]
    check_problem(await http.get("/v1/events"), 422, "scan")
    check_problem(await http.get("/v1/events?" + "&".join(f"scan=s{number}" for number in range(101))), 422, "scan")
    check_problem(await http.get(f"/v1/events?scan={finished}&scan=s_nobody"), 404)
    check_problem(await http.get("/v1/scans?limit=0"), 422, "limit")
    check_problem(await http.get("/v1/scans?limit=many"), 422, "limit")
    check_problem(await http.get("/v1/scans?before=s_nobody"), 422, "before")
    check_problem(await http.get(f"/v1/scans/{finished}/events", headers={"Accept": "image/png"}), 406)
    check_problem(await http.get(f"/v1/scans/{finished}/matches", headers={"Accept": "image/png"}), 406)
    check_problem(await http.get(f"/v1/scans/{finished}/matches.xlsx"), 422, "suffix")
    check_problem(
        await http.post("/v1/scans", json={"scanner": "gap-up"}, headers={"Idempotency-Key": "k" * 300}),
        422,
        "Idempotency-Key",
    )
    check_problem(await http.get("/v1/scans", headers={"Host": "evil.example"}), 400)


# WebSocket


def open_socket(serving: Serving, query: str = "", **options: Any) -> Any:
    address = serving.url.replace("http", "ws") + "/v1/ws" + (f"?{query}" if query else "")
    return connect(address, subprotocols=[Subprotocol("scanwire.v1")], **options)


async def ask(socket: ClientConnection, message: str | bytes) -> dict[str, Any]:
    await socket.send(message)
    answer: dict[str, Any] = json.loads(await socket.recv())
    return answer


@pytest.mark.parametrize(
    ("message", "status", "field"),
    [
        (b'{"op":"ping"}', 400, None),
        ("not json", 400, None),
        ("[]", 400, None),
        ("[" * 2000, 400, None),
        ('{"op":"ping","a":NaN}', 400, None),
        ("{}", 422, "op"),
        ('{"op":"dance"}', 422, "op"),
        ('{"op":["ping"]}', 422, "op"),
        ('{"op":"ping","more":1}', 422, "more"),
        ('{"op":"ping","ref":{"a":1}}', 422, "ref"),
        ('{"op":"subscribe"}', 422, "scan"),
        ('{"op":"subscribe","scan":7}', 422, "scan"),
        ('{"op":"subscribe","scan":"s_nobody"}', 404, None),
        ('{"op":"subscribe","scan":"s_nobody","after":7}', 422, "after"),
        ('{"op":"subscribe","scan":"s_nobody","after":"garbage"}', 400, "after"),
        ('{"op":"unsubscribe"}', 422, "scan"),
        ('{"op":"cancel","scan":"s_nobody"}', 404, None),
        ('{"op":"submit","scanner":"nothing"}', 422, "scanner"),
        ('{"op":"submit","scanner":"gap-up","params":{"gap_pct_min":"x"}}', 422, "gap_pct_min"),
        ('{"op":"submit","scanner":"gap-up","idempotency_key":1}', 422, "idempotency_key"),
    ],
)
async def test_a_wrong_message_is_answered_and_the_connection_goes_on(
    serving: Serving, message: str | bytes, status: int, field: str | None
) -> None:
    async with open_socket(serving) as socket:
        error = (await ask(socket, message))["error"]
        assert error["status"] == status
        if field:
            assert error["errors"][0]["field"] == field
        assert (await ask(socket, '{"op":"ping","ref":"still here"}'))["ref"] == "still here"


async def drain(socket: ClientConnection) -> None:
    while True:
        await socket.recv()


async def test_a_message_that_is_too_long_closes_with_1009(serving: Serving) -> None:
    async with open_socket(serving) as socket:
        await socket.send(json.dumps({"op": "ping", "ref": "x" * 70_000}))
        with pytest.raises(ConnectionClosedError) as closed:
            await drain(socket)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009


async def test_too_many_messages_close_with_4429(tmp_path: Path, sample_prices: Path) -> None:
    async with (
        serve(tmp_path, sample_prices, message_burst=3, message_per_s=0.01) as serving,
        open_socket(serving) as socket,
    ):
        for _ in range(3):
            assert (await ask(socket, '{"op":"ping"}'))["ok"] is True
        assert (await ask(socket, '{"op":"ping"}'))["error"]["limit"] == "message"
        with pytest.raises(ConnectionClosedError) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4429


async def test_a_page_of_another_site_cannot_open_a_websocket(serving: Serving) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await open_socket(serving, origin="https://evil.example").__aenter__()
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ("scan=s_nobody", 404, None),
        ("scan={finished}&scan=s_nobody", 404, None),
        ("scan={finished}&after=garbage", 400, "after"),
        ("after=abcd-1", 422, "scan"),
        ("&".join(f"scan=s_{number}" for number in range(101)), 422, "scan"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_websocket_to_a_wrong_scan_or_cursor_is_refused_before_the_handshake(
    serving: Serving, finished: str, query: str, status: int, field: str | None
) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await open_socket(serving, query.format(finished=finished)).__aenter__()
    response = refused.value.response
    answer = httpx.Response(
        response.status_code, headers=list(response.headers.raw_items()), content=bytes(response.body or b"")
    )
    check_problem(answer, status, *([field] if field else []))


async def test_a_websocket_that_names_scans_in_its_address_gets_their_events_at_once(
    serving: Serving, finished: str
) -> None:
    every = (await serving.http.get(f"/v1/scans/{finished}/events")).json()["events"]
    async with open_socket(serving, f"scan={finished}&scan={finished}") as socket:
        assert [json.loads(await socket.recv()) for _ in every] == every
        assert (await ask(socket, json.dumps({"op": "unsubscribe", "scan": finished})))["ok"] is True
    async with open_socket(serving, f"scan={finished}&after={every[-2]['id']}") as socket:
        assert json.loads(await socket.recv()) == every[-1]
        assert (await ask(socket, '{"op":"ping"}'))["ok"] is True


async def test_a_peer_that_speaks_another_subprotocol_is_refused(serving: Serving) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await connect(serving.url.replace("http", "ws") + "/v1/ws", subprotocols=[Subprotocol("mqtt")]).__aenter__()
    assert refused.value.response.status_code == 400


async def test_commands_over_the_websocket_do_what_they_do_over_http(serving: Serving, finished: str) -> None:
    async with open_socket(serving) as socket:
        subscribed = await ask(socket, json.dumps({"op": "subscribe", "scan": finished, "ref": 1}))
        assert (subscribed["ref"], subscribed["ok"], subscribed["snapshot"]["state"]) == (1, True, "completed")
        types: list[str] = []
        while not types or types[-1] != "end":
            types.append(json.loads(await socket.recv())["type"])
        assert types[0] == "queued"
        cancelled = await ask(socket, json.dumps({"op": "cancel", "scan": finished, "ref": 2}))
        assert (cancelled["ref"], cancelled["snapshot"]["state"]) == (2, "completed")
        joined = await ask(socket, json.dumps({"op": "submit", "scanner": "gap-up", "ref": 3, "idempotency_key": "w1"}))
        assert joined["ok"] is True
        assert (await ask(socket, json.dumps({"op": "unsubscribe", "scan": finished, "ref": 4})))["ok"] is True


async def test_a_reply_that_is_ready_while_events_are_sent_goes_out(serving: Serving, finished: str) -> None:
    """Its wake-up came between the reading of a batch and the wait for the next one, and was lost."""
    for _ in range(40):
        async with open_socket(serving) as socket, asyncio.timeout(10):
            await socket.send(json.dumps({"op": "subscribe", "scan": finished, "ref": "s"}))
            await socket.send('{"op":"ping","ref":"p"}')
            awaited = {"s", "p"}
            while awaited:
                awaited.discard(json.loads(await socket.recv()).get("ref"))
