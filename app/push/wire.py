"""The way straight to a peer's transport: uvicorn's protocols, with little added.

Pass the classes to uvicorn as `http=` and `ws=`. They offer the ASGI scope extension `scanwire.wire`, a `Connection`:

- `write` hands ready frames to the transport, which under uvloop is one system call;
- `is_ready` is False while the transport holds more than `high_water_bytes`, or anything once `app.push.channel` has
  told it so; `turned` is called when it turns;
- `rest` is what goes on after the application has returned. A stream waits there for its end, and all the layers of
  the application that it came through are gone, with their memory.

What a peer may do is held by `app.push.guard`; what is answered in one write, without ASGI, by `app.push.plain`. Built
on private parts of uvicorn; the range of versions in pyproject.toml is the one that was tested.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from app.push.guard import EXTENSION, Guard, WebSocketGuard
from app.push.plain import PlainAnswers

FINISH = "scanwire.finish"  # type of the message that a WebSocket receives when its subscriber has finished


class Connection(Guard):
    """What both protocols share."""

    app: ASGIApp  # of uvicorn's protocols

    __slots__ = ("_app", "_is_behind", "_send", "_turned", "is_ready", "rest")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._app, self.app = self.app, self._serve
        self._send: Send  # of the request that is being served
        self._turned: Callable[[], None] | None = None  # of the stream that is open
        self._is_behind = False
        self.is_ready = False  # a stream is open, and its peer takes what is written
        self.rest: Callable[[Receive, Send], Awaitable[None]] | None = None

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("extensions", {})[EXTENSION] = self
        self._send = send
        await self._app(scope, receive, send)
        del scope["extensions"][EXTENSION]
        if self.rest is not None:
            self._let_go(scope)
            rest, self.rest = self.rest(receive, send), None
            await rest

    def _let_go(self, scope: Scope) -> None:
        """A stream may be open for hours; what it was asked for with has been read."""
        scope["headers"].clear()

    def open(self, turned: Callable[[], None]) -> None:
        """A stream begins; `turned` is called whenever `is_ready` has turned."""
        if not self.transport.is_closing():
            self._turned, self.is_ready = turned, not self._is_behind
            self.expect_delivery()

    def finish(self) -> None:
        """The stream is over: what was written still goes out."""
        turned, self._turned, self.is_ready = self._turned, None, False
        if turned is not None:
            turned()
        self.end_delivery()

    def write(self, data: bytes) -> None:
        """Hands over ready frames, whole and in order; never waits. Nothing happens when the peer is gone."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def beat(self, heartbeat: bytes) -> None:
        self.write(heartbeat)

    def abort(self) -> None:
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._turn(is_behind=True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._turn(is_behind=False)

    def _turn(self, *, is_behind: bool) -> None:
        self._is_behind = is_behind
        if self._turned is not None:
            self.is_ready = not is_behind
            self._turned()

    def is_streaming(self) -> bool:
        return self._turned is not None

    def end_connection(self, exc: Exception | None) -> None:
        self.finish()
        super().end_connection(exc)
        self.let_be_freed()

    def let_be_freed(self) -> None:
        """Nothing uses it any more. What is left refers to itself nowhere, else it would stay until a full collection
        of the garbage collector, which hardly ever comes."""
        self.app = self._app


class HttpConnection(Connection, PlainAnswers):
    __slots__ = ("_came", "_finished", "_known")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._finished: asyncio.Future[None] | None = None
        self._came = self._known = None

    @property
    def finished(self) -> asyncio.Future[None]:
        """Done when the stream that is open was finished, or the connection lost."""
        self._finished = self.loop.create_future()
        if self._turned is None:
            self._finished.set_result(None)
        return self._finished

    def finish(self) -> None:
        super().finish()
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)

    def handle_websocket_upgrade(self) -> None:
        super().handle_websocket_upgrade()
        self.let_be_freed()

    def let_be_freed(self) -> None:
        super().let_be_freed()
        self.parser = self._known = None  # type: ignore[assignment]


class WebSocketConnection(Connection, WebSocketGuard):
    __slots__ = ()

    def _let_go(self, scope: Scope) -> None:
        super()._let_go(scope)
        self.forget_handshake()

    def finish(self) -> None:
        if self._turned is not None:
            self.queue.put_nowait({"type": FINISH})  # type: ignore[misc, arg-type]
        super().finish()

    def let_be_freed(self) -> None:
        super().let_be_freed()
        self._send = None  # type: ignore[assignment]
        self.conn.parser.close()

    def beat(self, heartbeat: bytes) -> None:
        self.check_life()
        self.write(heartbeat)


def find_wire(scope: Scope) -> Any:
    """The HttpConnection or WebSocketConnection that a request came on; None where the server has no such thing."""
    return scope.get("extensions", {}).get(EXTENSION)
