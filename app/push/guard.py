"""What keeps a peer from holding what it does not use: the deadlines and bounds that uvicorn's protocols lack.

A peer that stalls, trickles, floods or is gone without a word costs its connection alone, and that for a bounded time:

- a request head must be whole within `head_wait_s` and `max_head_bytes`, the rest of the request within `body_wait_s`;
- what the kernel could not deliver of a stream for `stall_s` breaks the connection (TCP_USER_TIMEOUT), which finds a
  peer that is gone, and one whose window stays closed; so does being behind for that long;
- any other answer is aborted when the peer takes it at less than `min_send_bytes_per_s`;
- a WebSocket that says nothing between two heartbeats is gone; its pings between two of them, and the fragments of a
  message, are bounded;
- connections are bounded in all and for each client.

The bounds come from the lifespan state, under EXTENSION.
"""

import asyncio
import contextlib
import socket
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from websockets.frames import Frame

from app.core.errors import AtCapacity, HeadTooLarge, InvalidRequest, ScanwireError, SlowRequest
from app.core.settings import Settings
from app.push.handshake import HttpHandshake, WebSocketHandshake

EXTENSION = "scanwire.wire"
_GRACE_S = 1  # for the application, which has the same deadline for a body and a better answer
_PER_TURN = 32  # pieces of data, and ends of connections; each is work for 0.1 to 0.2 ms
_RETRY_S = 10  # what a peer is told when every connection is taken


class Turns:
    """What comes from thousands of peers at once is taken for a few of them in each turn of the loop, in order.

    In between, all else has its turn: timers, heartbeats, and the peers that are connected already.
    """

    def __init__(self) -> None:
        self._left = _PER_TURN  # 0 while anything waits
        self._waiting: deque[Callable[[], None]] = deque()

    def take(self, work: Callable[[], None]) -> bool:
        """True when there is room in this turn; else the work is done by itself when its turn comes."""
        if not self._left:
            self._waiting.append(work)
            return False
        if self._left == _PER_TURN:
            asyncio.get_running_loop().call_soon(self._turn)
        self._left -= 1
        return True

    def _turn(self) -> None:
        loop, count = asyncio.get_running_loop(), min(len(self._waiting), _PER_TURN)
        for _ in range(count):
            loop.call_soon(self._waiting.popleft())
        self._left = 0 if count else _PER_TURN  # whoever comes now is behind those
        if count:
            loop.call_soon(self._turn)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the guards of all connections share."""

    settings: Settings
    name_client: Callable[[str], str | None]  # who connections from an address are counted for; None: for nobody
    connections: Counter[str]  # that are open, by client
    turns: Turns = field(default_factory=Turns)


class Guard(asyncio.Protocol):
    """What holds for both protocols."""

    # Of uvicorn's protocols.
    app_state: dict[str, Any]
    client: tuple[str, int] | None
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport

    # Slots, since a connection has one attribute less than makes its dictionary a kilobyte larger.
    __slots__ = ("_bounds", "_count", "_deadline", "_held", "_is_in_head", "_is_silent", "_stalling")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._bounds: Bounds = self.app_state[EXTENSION]
        self._stalling: asyncio.TimerHandle | None = None
        # Of the request that is coming in; HTTP alone.
        self._deadline: asyncio.TimerHandle | None = None
        self._is_in_head = False
        # Bytes that came since the last part of a body or the end of a request, hence of a head, or of trailers; of a
        # WebSocket, pings since the last heartbeat.
        self._count = 0
        self._is_silent = False  # nothing has come since the last heartbeat; WebSocket alone
        self._held: bytes | None = None  # what came and has to wait; then little more is read

    def data_received(self, data: bytes) -> None:
        if self._held is not None:
            self._held += data
            self.transport.pause_reading()  # now, since for one piece it would cost more than it spares
        elif self._bounds.turns.take(self.release):
            self.take_data(data)
        else:
            self._held = data

    def hold(self) -> None:
        """From now on what comes is held, until `release`."""
        self._held = b""

    def release(self) -> None:
        """What was held is taken, though its peer may be gone: it is heard all the same."""
        data, self._held = self._held, None
        if not self.is_reading_paused() and not self.transport.is_closing():
            self.transport.resume_reading()
        if data:
            self.take_data(data)

    def is_reading_paused(self) -> bool:
        """Whether uvicorn wants nothing to be read just now."""
        raise NotImplementedError

    def take_data(self, data: bytes) -> None:
        """Data has come, and it is its turn."""
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        end = partial(self.end_connection, exc)
        if self._bounds.turns.take(end):
            end()

    def end_connection(self, exc: Exception | None) -> None:
        """The connection is lost, and it is its turn."""
        self._unwatch_stall()
        if (client := self._find_client()) is not None:
            connections = self._bounds.connections
            connections[client] -= 1
            if not connections[client]:
                del connections[client]
        super().connection_lost(exc)

    def _find_client(self) -> str | None:
        return self._bounds.name_client(self.client[0]) if self.client else None

    def expect_delivery(self) -> None:
        """From now on a peer that is gone, or whose window stays closed, is found out by the kernel, however little
        is on its way to it. Not for downloads: at a window that hardly opens, the kernel sees no progress in one."""
        self._set_user_timeout(max(1, int(self._bounds.settings.stall_s * 1000)))

    def end_delivery(self) -> None:
        """The stream is over, and nothing more is written; or answers are, which may be taken as slowly as any."""
        if not self.transport.is_closing():
            self._set_user_timeout(0)
        self.expect_close()

    def _set_user_timeout(self, within_ms: int) -> None:
        with contextlib.suppress(OSError, AttributeError):  # not TCP, or a system that has no such option
            tcp = self.transport.get_extra_info("socket")
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, within_ms)

    def is_streaming(self) -> bool:
        """Whether what is written has no end: being behind is then a matter of time alone."""
        raise NotImplementedError

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch_stall()

    def _watch_stall(self) -> None:
        held = self.transport.get_write_buffer_size()
        self._stalling = self.loop.call_later(self._bounds.settings.stall_s, self._judge_stall, held)

    def _unwatch_stall(self) -> None:
        if self._stalling is not None:
            self._stalling.cancel()
            self._stalling = None

    def _judge_stall(self, held: int) -> None:
        settings = self._bounds.settings
        taken = held - self.transport.get_write_buffer_size()
        if self.is_streaming() or taken < settings.min_send_bytes_per_s * settings.stall_s:
            self.transport.abort()
        else:
            self._watch_stall()

    def expect_close(self) -> None:
        """Nothing more is written. A peer that reads nothing must not keep a connection that is being closed for
        ever, however little is left for it."""
        if not self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.loop.call_later(self._bounds.settings.stall_s, self._abort_if_closing)

    def _abort_if_closing(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()


def encode_refusal(error: ScanwireError) -> bytes:
    """The whole answer of a connection that is closed behind it."""
    problem = orjson.dumps(error.to_problem())
    head = STATUS_LINE[error.status] + b"content-type: application/problem+json\r\nconnection: close\r\n"
    if error.retry_after_s is not None:
        head += b"retry-after: %d\r\n" % error.retry_after_s
    return head + b"content-length: %d\r\n\r\n" % len(problem) + problem


class HttpGuard(Guard, HttpHandshake):
    __slots__ = ()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        settings, connections = self._bounds.settings, self._bounds.connections
        self.transport.set_write_buffer_limits(high=settings.high_water_bytes)
        if (client := self._find_client()) is not None:
            connections[client] += 1
        if client is not None and connections[client] > settings.max_connections_per_client:
            limit = settings.max_connections_per_client
            self.refuse(
                AtCapacity(f"One client may hold {limit} connections. Close one first.", retry_after_s=_RETRY_S)
            )
        elif len(self.connections) > settings.max_connections:
            self.refuse(AtCapacity("Every connection is taken. Try again later.", retry_after_s=_RETRY_S))
        else:
            self._is_in_head = True
            self._expect(settings.head_wait_s)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.cycle is not None:  # now: to write to it before its turn comes would be an error
            self.cycle.disconnected = True
        super().connection_lost(exc)

    def end_connection(self, exc: Exception | None) -> None:
        self._expect(None)
        self._unset_keepalive_if_required()  # which uvicorn does for orderly ends alone
        super().end_connection(exc)

    def refuse(self, error: ScanwireError) -> None:
        """Answers whatever came, or did not come, with a problem, and closes."""
        if self.transport.is_closing():
            return
        self.transport.write(encode_refusal(error))
        self.expect_close()
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, for what is no HTTP: as a problem that says what to do."""
        if self._is_in_head and self._count > self._bounds.settings.max_head_bytes:
            self._refuse_head()
        else:
            advice = "Header fields, such as Last-Event-ID, hold neither line breaks nor control characters."
            self.refuse(InvalidRequest(f"{msg} {advice}"))

    def _refuse_head(self) -> None:
        limit = self._bounds.settings.max_head_bytes
        self.refuse(HeadTooLarge(f"The address and the header fields may have {limit} bytes. Send less."))

    def is_reading_paused(self) -> bool:
        return self.flow.read_paused

    def take_data(self, data: bytes) -> None:
        self._count += len(data)
        super().take_data(data)
        settings = self._bounds.settings
        if self._is_in_head:
            if self._count > settings.max_head_bytes:
                self._refuse_head()
            elif self._deadline is None:
                self._expect(settings.head_wait_s)
        elif self._count > settings.max_head_bytes:  # trailers, or an extension of a chunk, without end
            self.transport.abort()
        elif self._deadline is None and self.cycle is not None and self.cycle.more_body:
            self._expect(settings.body_wait_s + _GRACE_S)

    def on_message_begin(self) -> None:
        self._is_in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        # What was counted may be less than the head, behind another request, and more, with the body of this one.
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._bounds.settings.max_head_bytes:
            self._count = size
            raise HeadTooLarge("The parser stops here, and `send_400_response` answers.")
        self._count, self._is_in_head = 0, False
        self._expect(None)
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # trailers are not for the application
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._count = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._count = 0  # of what follows in the same piece the parser does not say how much it is
        self._expect(None)
        super().on_message_complete()

    def _expect(self, within_s: float | None) -> None:
        """What is coming must be whole in this time; None when it is."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if within_s is None else self.loop.call_later(within_s, self._give_up)

    def _give_up(self) -> None:
        self._deadline = None
        if self._is_in_head and (self.cycle is None or self.cycle.response_complete):
            wait_s = self._bounds.settings.head_wait_s
            self.refuse(SlowRequest(f"No whole request came within {wait_s:g} s. Send its head in one go."))
        else:
            self.transport.abort()


class WebSocketGuard(Guard, WebSocketHandshake):
    __slots__ = ()

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

    def is_reading_paused(self) -> bool:
        return self.read_paused

    def take_data(self, data: bytes) -> None:
        self._is_silent = False
        super().take_data(data)
        if not self.handshake_initiated:  # all of the request was there, and it is none that `websockets` can read
            self._refuse_handshake()

    def check_life(self) -> None:
        """At a heartbeat: a peer that has said nothing since the last one is gone."""
        if self._is_silent and not self.read_paused:
            self.transport.abort()
        self._is_silent, self._count = True, 0

    def handle_ping(self) -> None:
        self._count += 1
        if self._count <= self._bounds.settings.max_pings_per_heartbeat:
            super().handle_ping()
        else:
            self._fail(1008, "too many pings")

    def handle_cont(self, event: Frame) -> None:
        # An empty fragment adds nothing to the size that is bounded elsewhere, and yet something to what is held.
        if len(self.frames) < self._bounds.settings.max_fragments_per_message:
            super().handle_cont(event)
        else:
            self._fail(1009, "too many fragments")

    def _refuse_handshake(self) -> None:
        """uvicorn would keep the connection for ever, and send nothing; not even the answer that may be ready."""
        advice = "This is no handshake of a WebSocket: GET by HTTP/1.1, without a body (RFC 6455, 4.1)."
        self.transport.write(b"".join(self.conn.data_to_send()) or encode_refusal(InvalidRequest(advice)))
        self.expect_close()
        self.transport.close()

    def _fail(self, code: int, reason: str) -> None:
        if not self.close_sent:
            self.conn.fail(code, reason)
            self.handle_parser_exception()
            self.expect_close()
