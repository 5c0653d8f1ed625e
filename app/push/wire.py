"""The way straight to a peer's transport: uvicorn's protocols, with little added.

Pass the classes to uvicorn as `http=` and `ws=`. They offer the ASGI scope extension `scanwire.wire`, a `Connection`:

- `write` hands ready frames to the transport, which under uvloop is one system call;
- `is_ready` is False while the transport holds more than `high_water_bytes`, and `drained` is called when it has
  drained; a peer that keeps it from draining for `stall_s` is aborted;
- `rest` is what goes on after the application has returned. A stream waits there for its end, and all the layers of
  the application that it came through are gone, with their memory.

The bounds come from the lifespan state, under the name of the extension. Built on private parts of uvicorn; the range
of versions in pyproject.toml is the one that was tested.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from app.core.errors import InvalidRequest

EXTENSION = "scanwire.wire"
FINISH = "scanwire.finish"  # type of the message that a WebSocket receives when its subscriber has finished


class Bounds(NamedTuple):
    high_water_bytes: int
    stall_s: float


class Connection(asyncio.Protocol):
    """What both protocols share."""

    # Of uvicorn's protocols.
    app: ASGIApp
    app_state: dict[str, Any]
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport

    # Slots, since a connection has one attribute less than makes its dictionary a kilobyte larger.
    __slots__ = ("_app", "_bounds", "_drained", "_is_behind", "_send", "_stalling", "is_ready", "rest")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._app, self.app = self.app, self._serve
        self._send: Send  # of the request that is being served
        self._bounds: Bounds = self.app_state[EXTENSION]
        self._drained: Callable[[], None] | None = None  # of the stream that is open
        self._is_behind = False
        self._stalling: asyncio.TimerHandle | None = None
        self.is_ready = False  # a stream is open, and its peer takes what is written
        self.rest: Callable[[Receive, Send], Awaitable[None]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=self._bounds.high_water_bytes)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        extensions = scope.setdefault("extensions", {})
        extensions[EXTENSION] = self
        self._send = send
        await self._app(scope, receive, send)
        del extensions[EXTENSION]
        if self.rest is not None:
            self._let_go(scope)
            rest, self.rest = self.rest, None
            await rest(receive, send)

    def _let_go(self, scope: Scope) -> None:
        """A stream may be open for hours; what it was asked for with has been read."""
        scope["headers"].clear()

    def open(self, drained: Callable[[], None]) -> None:
        """A stream begins. `drained` is called when the transport has drained, after `is_ready` was False."""
        if not self.transport.is_closing():
            self._drained, self.is_ready = drained, not self._is_behind

    def finish(self) -> None:
        """The stream is over: what was written still goes out."""
        self._drained, self.is_ready = None, False
        if not self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.loop.call_later(self._bounds.stall_s, self._abort_if_closing)

    def _abort_if_closing(self) -> None:
        """A peer that reads nothing must not keep a closed connection for ever, however little is left for it."""
        if self.transport.is_closing():
            self.transport.abort()

    def write(self, data: bytes) -> None:
        """Hands over ready frames, whole and in order; never waits. Nothing happens when the peer is gone."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def beat(self, heartbeat: bytes) -> None:
        self.write(heartbeat)

    def abort(self) -> None:
        self.transport.abort()

    # A peer that does not read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._is_behind, self.is_ready = True, False
        self._watch_stall()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._is_behind = False
        self._unwatch_stall()
        if self._drained is not None:
            self.is_ready = True
            self._drained()

    def _watch_stall(self) -> None:
        held = self.transport.get_write_buffer_size()
        self._stalling = self.loop.call_later(self._bounds.stall_s, self._judge_stall, held)

    def _unwatch_stall(self) -> None:
        if self._stalling is not None:
            self._stalling.cancel()
            self._stalling = None

    def _judge_stall(self, held: int) -> None:
        """A stream that is behind for so long is cut off. Any other answer may take its time, as long as some goes."""
        if self._drained is not None or self.transport.get_write_buffer_size() >= held:
            self.transport.abort()
        else:
            self._watch_stall()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch_stall()
        self.finish()
        super().connection_lost(exc)


class HttpConnection(Connection, HttpToolsProtocol):
    __slots__ = ("_finished",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._finished: asyncio.Future[None] | None = None

    @property
    def finished(self) -> asyncio.Future[None]:
        """Done when the stream that is open was finished, or the connection lost."""
        self._finished = self.loop.create_future()
        if self._drained is None:
            self._finished.set_result(None)
        return self._finished

    def finish(self) -> None:
        super().finish()
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, for what is no HTTP: as a problem that says what to do."""
        advice = "Header fields, such as Last-Event-ID, hold neither line breaks nor control characters."
        problem = orjson.dumps(InvalidRequest(f"{msg} {advice}").to_problem())
        fields = (b"HTTP/1.1 400 Bad Request", b"content-type: application/problem+json", b"connection: close")
        self.write(b"\r\n".join((*fields, b"content-length: %d" % len(problem), b"", problem)))
        self.transport.close()

    def take_body(self) -> bytes | None:
        """The body of the request that is being served, if all of it is here."""
        cycle: RequestResponseCycle = self._send.__self__  # type: ignore[attr-defined]
        return None if cycle.more_body else bytes(cycle.body)

    def respond(self, status: int, fields: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """The whole answer to the request that is being served, in one write. The fields must be fit to be sent."""
        cycle: RequestResponseCycle = self._send.__self__  # type: ignore[attr-defined]
        parts = [STATUS_LINE[status]]
        for name, value in (*cycle.default_headers, *fields):
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n", body)
        cycle.response_started = cycle.response_complete = True
        self.write(b"".join(parts))
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()


class WebSocketConnection(Connection, WebSocketsSansIOProtocol):
    __slots__ = ("_is_silent",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_silent = False  # nothing has come since the last heartbeat

    def _let_go(self, scope: Scope) -> None:
        super()._let_go(scope)
        self.request.headers.clear()
        self.response.headers.clear()

    def finish(self) -> None:
        if self._drained is not None:
            self.queue.put_nowait({"type": FINISH})  # type: ignore[misc, arg-type]
        super().finish()

    def pause_writing(self) -> None:
        super().pause_writing()
        if not self.read_paused:  # else the pongs to a peer that does not read have no bound
            self.read_paused = True
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self.transport.resume_reading()

    async def until_ready(self) -> None:
        """Returns when the transport takes more."""
        await self.writable.wait()

    def beat(self, heartbeat: bytes) -> None:
        """Pings; a peer that has said nothing since the last ping is gone."""
        if self._is_silent and not self.read_paused:
            self.abort()
            return
        self._is_silent = True
        self.write(heartbeat)

    def data_received(self, data: bytes) -> None:
        self._is_silent = False
        super().data_received(data)


def find_wire(scope: Scope) -> Any:
    """The HttpConnection or WebSocketConnection that a request came on; None where the server has no such thing."""
    return scope.get("extensions", {}).get(EXTENSION)
