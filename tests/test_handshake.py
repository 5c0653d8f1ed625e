"""The opening handshake of a WebSocket: whatever comes, the answer and the scope are those of uvicorn alone."""

import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator
from itertools import combinations
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from app.core.settings import Settings
from app.push.guard import EXTENSION, Bounds
from app.push.wire import HttpConnection, WebSocketConnection
from tests.conftest import until
from tests.peers import Peer, meet
from tests.serving import run_uvicorn

PLAIN: dict[str, str] = {
    "Host": "scans.example",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
OFFERED = {"Sec-WebSocket-Protocol": "scanwire.v1,other, scanwire.key.K"}
# Other fields, each of which is as good: of browsers, proxies and old clients.
GOOD: list[dict[str, str]] = [
    {"Upgrade": "WebSocket"},
    {"Connection": "keep-alive, Upgrade"},
    {"Connection": "UPGRADE"},
    {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"},
    {"X-Name": "caf\u00e9"},
    {"X-Empty": ""},
    OFFERED,
]
# Each is something to judge, and most are wrong.
ODD: list[dict[str, str]] = [
    {"Connection": "Upgrade, @"},
    {"Sec-WebSocket-Version": "8"},
    {"Sec-WebSocket-Version": ""},
    {"Sec-WebSocket-Key": "short"},
    {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZR=="},  # bits that are not used are set
    {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ"},
    {"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="},  # a second one
    {"x-host": "a", "X-Host": "a"},
    {"Sec-WebSocket-Protocol": "a b"},
    {"Sec-WebSocket-Protocol": ""},
    {"Sec-WebSocket-Protocol": "a,,b"},
    {"Content-Length": "0"},
]
LACKING: list[str] = ["Upgrade", "Connection", "Sec-WebSocket-Version", "Sec-WebSocket-Key"]


class Asked:
    """An application that does what the path says, and keeps what it was asked with."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.plain: list[bool] = []  # whether the handshake was taken as it is
        self.bounds = Bounds(Settings(), lambda address: None, Counter())
        self.server: uvicorn.Server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            scope["state"][EXTENSION] = self.bounds
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        wire = scope.get("extensions", {}).get(EXTENSION)
        self.plain.append(getattr(wire, "handshake_key", None) is not None)
        told = {name: value for name, value in scope.items() if name not in ("client", "server", "state")}
        told["headers"] = list(scope["headers"])
        told["extensions"] = sorted(set(scope.get("extensions", {})) - {EXTENSION})
        self.scopes.append(told)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
            await send({"type": "http.response.body"})
            return
        assert await receive() == {"type": "websocket.connect"}
        match scope["path"]:
            case "/leave":
                return
            case "/fail":
                raise RuntimeError("on purpose")
            case "/close":
                await send({"type": "websocket.close"})
            case "/refuse":
                headers = [(b"content-type", b"text/plain")]
                await send({"type": "websocket.http.response.start", "status": 418, "headers": headers})
                await send({"type": "websocket.http.response.body", "body": b"no"})
            case "/inject":
                await send({"type": "websocket.accept", "headers": [(b"x-a", b"b\r\nx-c: d")]})
            case "/twice":
                await send({"type": "websocket.accept"})
                await send({"type": "websocket.accept"})
            case _:
                subprotocol = next(iter(scope["subprotocols"]), None)
                headers = [(b"x-own", b"caf\xe9")]
                await send({"type": "websocket.accept", "subprotocol": subprotocol, "headers": headers})
                while (message := await receive())["type"] == "websocket.receive":
                    await send({"type": "websocket.send", "text": message["text"]})


@contextlib.asynccontextmanager
async def serve(http: Any, ws: Any, **options: Any) -> AsyncIterator[tuple[str, Asked]]:
    app = Asked()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options |= {"http": http, "ws": ws, "lifespan": "on", "log_level": "critical", "date_header": False}
        async with run_uvicorn(app, listener, **options) as app.server:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", app


@contextlib.asynccontextmanager
async def serve_both(**options: Any) -> AsyncIterator[list[tuple[str, Asked]]]:
    """uvicorn alone, and what is tested."""
    async with (
        serve(HttpToolsProtocol, WebSocketsSansIOProtocol, **options) as theirs,
        serve(HttpConnection, WebSocketConnection, **options) as ours,
    ):
        yield [theirs, ours]


def write_head(fields: dict[str, str], path: str = "/a%20b?x=1&y=%C3%A9", method: str = "GET", v: str = "1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{v}", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


async def talk(peer: Peer, head: bytes) -> tuple[bytes, dict[bytes, bytes], bytes] | bytes:
    """What is answered; when that is a handshake, with what comes for a ping, a text and a close."""
    await peer.send(head)
    try:
        status, fields = await peer.read_head()
    except EOFError as end:
        return bytes(end.args[0])
    fields.pop(b"date", None)
    if b"x-own" in fields and b"sec-websocket-extensions" not in fields:
        await peer.send(b"\x89\x81\0\0\0\0p\x81\x82\0\0\0\0hi")
        said = await peer.read_until(b"hi")
        await peer.send(b"\x88\x82\0\0\0\0\x03\xe8")
        return status, fields, said + await peer.read_rest()
    return status, fields, b"" if b"x-own" in fields else await peer.read_rest()


async def compare(servers: list[tuple[str, Asked]], head: bytes) -> tuple[Any, bool | None]:
    """The answer, which is the same of both, and whether the handshake was taken as it is; None: nobody was asked."""
    answers, scopes = [], []
    for url, app in servers:
        app.scopes.clear()
        app.plain.clear()
        async with meet(url) as peer:
            answers.append(await talk(peer, head))
        scopes.append(list(app.scopes))
    assert answers[0] == answers[1], head
    assert scopes[0] == scopes[1], head
    return answers[1], next(iter(servers[1][1].plain), None)


async def test_a_handshake_about_which_there_is_nothing_to_judge_is_taken_as_it_is_and_answered_as_by_uvicorn() -> None:
    async with serve_both(ws_per_message_deflate=False) as servers:
        for some in ({}, *GOOD, *({**a, **b} for a, b in combinations(GOOD, 2))):
            (status, fields, rest), is_plain = await compare(servers, write_head(PLAIN | some))
            assert (status.split()[1], is_plain) == (b"101", True)
            assert fields[b"sec-websocket-accept"] == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455, 1.3
            assert fields.get(b"sec-websocket-protocol") == (
                b"scanwire.v1" if OFFERED.items() <= some.items() else None
            )
            assert rest == b"\x8a\x01p\x81\x02hi\x88\x02\x03\xe8"


async def test_where_compression_may_be_negotiated_all_go_the_way_of_uvicorn() -> None:
    async with serve_both() as servers:
        for some in ({}, *GOOD):
            (status, _, _), is_plain = await compare(servers, write_head(PLAIN | some))
            assert (status.split()[1], is_plain) == (b"101", False)


async def test_any_other_goes_the_way_of_uvicorn_and_is_refused_as_there() -> None:
    async with serve_both(ws_per_message_deflate=False) as servers:
        for some in (*ODD, *({**a, **b} for a, b in combinations(ODD, 2)), *({**a, **b} for a in ODD for b in GOOD)):
            _, is_plain = await compare(servers, write_head(PLAIN | some))
            assert not is_plain or not any(odd.items() <= some.items() for odd in ODD)
        for count in (1, 2, 3):
            for names in combinations(LACKING, count):
                kept = {name: value for name, value in PLAIN.items() if name not in names}
                _, is_plain = await compare(servers, write_head(kept))
                assert not is_plain
        for head in (
            write_head(PLAIN, method="POST"),
            write_head(PLAIN, method="HEAD"),
            write_head(PLAIN, v="1.0"),
        ):
            _, is_plain = await compare(servers, head)
            assert not is_plain


@pytest.mark.parametrize("path", ["/", "/%E9/%00", "//x//", "http://other/x?y", "/?", "/x?y?z", "/x#y", "*"])
async def test_the_address_is_read_as_by_uvicorn(path: str) -> None:
    async with serve_both(ws_per_message_deflate=False, root_path="/root") as servers:
        await compare(servers, write_head(PLAIN, path=path))


@pytest.mark.parametrize("path", ["/leave", "/fail", "/close", "/refuse", "/inject", "/twice"])
async def test_an_application_that_does_not_accept_is_answered_for_as_by_uvicorn(path: str) -> None:
    async with serve_both(ws_per_message_deflate=False) as servers:
        answer, is_plain = await compare(servers, write_head(PLAIN, path=path))
        assert is_plain is True
        assert answer[0].split()[1] == {"/refuse": b"418", "/close": b"403", "/twice": b"101"}.get(path, b"500")


async def test_own_fields_of_the_server_are_in_the_answer() -> None:
    async with serve_both(ws_per_message_deflate=False, headers=[("x-server", "1")]) as servers:
        (_, fields, _), is_plain = await compare(servers, write_head(PLAIN))
        assert (fields[b"x-server"], is_plain) == (b"1", True)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (write_head(PLAIN | {"Content-Length": "3"}), b"400"),
        (write_head(PLAIN | {"Transfer-Encoding": "chunked"}), b"400"),
        (write_head(PLAIN, path="/caf\u00e9"), b"400"),
        (write_head(PLAIN, method="POST") + b"{}", b"405"),
        (write_head({f"X-{number}": "" for number in range(124)} | PLAIN | {"Content-Length": "0"}), b"431"),
        (write_head(PLAIN | {"X-Long": "x" * 8200, "Content-Length": "0"}), b"431"),
    ],
)
async def test_what_cannot_be_read_as_a_handshake_is_refused_where_uvicorn_alone_would_wait_for_ever(
    head: bytes, status: bytes
) -> None:
    async with serve(HttpConnection, WebSocketConnection) as (url, app), meet(url) as peer:
        await peer.send(head)
        line, _, _ = await peer.read_answer()
        assert line.split()[1] == status
        assert await peer.read_rest() == b""
        assert app.scopes == []


@pytest.mark.parametrize("more", [{}, {"Connection": "Upgrade, @"}])
async def test_a_handshake_whose_peer_is_gone_before_its_turn_makes_no_websocket(more: dict[str, str]) -> None:
    async with serve(HttpConnection, WebSocketConnection) as (url, app):
        turns, connections = app.bounds.turns, app.server.server_state.connections
        async with meet(url) as peer:
            await until(lambda: connections)
            turns._left = 0  # others have the turn
            await peer.send(write_head(PLAIN | more))
            await until(lambda: len(turns._waiting) == 1)
        await until(lambda: len(turns._waiting) == 2)
        turns._turn()
        await until(lambda: not connections)
        assert app.scopes == []
