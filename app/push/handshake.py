"""The opening handshake of a WebSocket (RFC 6455, 4.2), answered from the request as HTTP has parsed it.

uvicorn writes the request down again, has it parsed and judged by `websockets`, and makes the answer from objects of
that library: a third of what a connect costs. Nearly every client sends a handshake about which there is nothing to
judge, and that one is taken here as it is. All others, and with them all that are refused as no handshake, go
uvicorn's way. From the handshake on there is one way for both.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from uvicorn.protocols.http.httptools_impl import HEADER_VALUE_RE, HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import OPEN, Protocol
from websockets.utils import accept_key

_KEY = re.compile(rb"[A-Za-z0-9+/]{21}[AQgw]==")  # 16 bytes in Base64
_TOKENS = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+(, ?[-!#$%&'*+.^_`|~0-9A-Za-z]+)*")
_BODY = (b"content-length", b"transfer-encoding")
_SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"


class HttpHandshake(HttpToolsProtocol):
    """The side of HTTP, where the handshake comes in."""

    __slots__ = ()

    def handle_websocket_upgrade(self) -> None:
        if self.transport.is_closing():  # nobody would tell the other protocol that it is lost
            return
        if self.flow.write_paused or (self.cycle is not None and not self.cycle.response_complete):
            self.transport.abort()  # it would be answered before what was asked before, or in the middle of it
            return
        fields = dict(self.headers)
        if not self._is_plain(fields):
            super().handle_websocket_upgrade()
            return
        self.connections.discard(self)
        protocol: WebSocketHandshake = self.ws_protocol_class(  # type: ignore[assignment, call-arg, misc]
            config=self.config, server_state=self.server_state, app_state=self.app_state
        )
        protocol.connection_made(self.transport)
        protocol.take_handshake({**self.scope}, self.url.decode(), fields)
        self.transport.set_protocol(protocol)

    def _is_plain(self, fields: Mapping[bytes, bytes]) -> bool:
        """Whether a request that asks for an upgrade to WebSocket is all that RFC 6455 wants of it, and no more: GET
        by HTTP/1.1 without a body, version 13, a whole key, subprotocols that are tokens, no field twice."""
        return (
            self.scope["method"] == "GET"
            and self.scope["http_version"] == "1.1"
            and self.url.isascii()
            and len(fields) == len(self.headers)
            and _TOKENS.fullmatch(fields[b"connection"]) is not None
            and fields.get(b"sec-websocket-version") == b"13"
            and _KEY.fullmatch(fields.get(b"sec-websocket-key", b"")) is not None
            and _TOKENS.fullmatch(fields.get(b"sec-websocket-protocol", b"none")) is not None
            and fields.keys().isdisjoint(_BODY)
            and not self.config.ws_per_message_deflate  # nothing is to be negotiated
        )


class WebSocketHandshake(WebSocketsSansIOProtocol):
    """The side of WebSocket, where it is answered."""

    __slots__ = ()

    handshake_key: str | None = None  # of a plain handshake; it has no `request`, and no `response`

    def take_handshake(self, scope: dict[str, Any], url: str, fields: Mapping[bytes, bytes]) -> None:
        """A plain handshake has come, with the scope that HTTP made of it: the application is asked."""
        raw_path, _, query = url.partition("?")
        offered = fields.get(b"sec-websocket-protocol")
        self.handshake_key, self.handshake_initiated = fields[b"sec-websocket-key"].decode(), True
        self.conn.parser = Protocol.parse(self.conn)  # of frames: the request has been parsed
        next(self.conn.parser)
        del scope["method"]
        scope["type"], scope["scheme"] = "websocket", self.scheme
        scope["asgi"] = {"version": self.asgi_version, "spec_version": "2.4"}
        scope["path"] = self.root_path + unquote(raw_path)
        scope["raw_path"] = (self.root_path + raw_path).encode()
        scope["query_string"] = query.encode()
        scope["subprotocols"] = [] if offered is None else [token.strip() for token in offered.decode().split(",")]
        scope["extensions"] = {"websocket.http.response": {}}
        self.scope = scope  # type: ignore[assignment]
        self.queue.put_nowait({"type": "websocket.connect"})
        task = self.loop.create_task(self.run_asgi())
        task.add_done_callback(self.on_task_complete)
        self.tasks.add(task)

    async def send(self, message: Any) -> None:
        await self.writable.wait()
        if message["type"] != "websocket.accept" or not self._is_open():
            await super().send(message)
        else:
            answer = self._accept(message.get("subprotocol"), message.get("headers", ()))
            if not self.transport.is_closing():
                self.transport.write(answer)

    async def accept(self, subprotocol: str | None) -> bytes:
        """As ASGI's `websocket.accept`. Gives what has to be written before anything else, if it was not written."""
        await self.receive()  # the application is asked first
        if self._is_open():
            return self._accept(subprotocol, ())
        await self.send({"type": "websocket.accept", "subprotocol": subprotocol})
        return b""

    def _is_open(self) -> bool:
        """Whether a plain handshake has no answer yet."""
        return self.handshake_key is not None and not self.handshake_complete and self.initial_response is None

    def _accept(self, subprotocol: str | None, more: Iterable[tuple[bytes, bytes]]) -> bytes:
        fields = [
            (b"Sec-WebSocket-Accept", accept_key(self.handshake_key or "").encode()),
            *self.default_headers,
            *more,
        ]
        if subprotocol:
            fields.append((b"Sec-WebSocket-Protocol", subprotocol.encode()))
        head = [_SWITCHING]
        for name, value in fields:
            if HEADER_VALUE_RE.search(value):
                raise RuntimeError("Invalid HTTP header value.")
            head += (name, b": ", value, b"\r\n")
        self.handshake_complete = True
        self.conn.state = OPEN
        self.start_keepalive()
        return b"".join((*head, b"\r\n"))

    def forget_handshake(self) -> None:
        """The connection may be open for hours; what it was asked for with has been read."""
        if self.handshake_key is None:
            self.request.headers.clear()
            self.response.headers.clear()
