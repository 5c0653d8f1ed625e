"""Events as bytes on the wire. In a flush each is framed once for each way in use."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from app.core.event import Event, EventType


def frame_sse(event: Event) -> bytes:
    """Server-sent event (WHATWG HTML, 9.2). Without an `id:` line for events that have no cursor.

    An EventSource heeds the `retry:` of a `bye`, though it may know nothing of that event.
    """
    if event.id is not None:
        return b"event: %b\nid: %b\ndata: %b\n\n" % (event.type.encode(), event.id.encode(), event.json)
    wait = b"\nretry: %d" % event.load_data().get("reconnect_ms", 0) if event.type is EventType.BYE else b""
    return b"event: %b\ndata: %b%b\n\n" % (event.type.encode(), event.json, wait)


def frame_ndjson(event: Event) -> bytes:
    """One line of newline-delimited JSON."""
    return event.json + b"\n"


def frame_websocket(event: Event) -> bytes:
    """The whole frame of one WebSocket text message."""
    return frame_message(event.json)


def frame_message(payload: bytes) -> bytes:
    """One text message of a server: a single frame, unmasked (RFC 6455, 5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81" + size.to_bytes(1) + payload
    if size < 65_536:
        return b"\x81\x7e" + size.to_bytes(2) + payload
    return b"\x81\x7f" + size.to_bytes(8) + payload


def chunk(data: bytes) -> bytes:
    """One chunk of an HTTP/1.1 body (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def open_sse(retry_ms: int) -> bytes:
    """The first bytes of every stream, sent at once, so that a proxy that buffers is found out."""
    return b": ok\nretry: %d\n\n" % retry_ms


HEARTBEAT_SSE = b": hb\n\n"
HEARTBEAT_NDJSON = b"\n"
PING = b"\x89\x00"


@dataclass(frozen=True, slots=True, eq=False)
class Framing:
    """One way to write events straight to a transport."""

    name: str
    frame: Callable[[Event], bytes]
    wrap: Callable[[bytes], bytes]
    heartbeat: bytes  # as it is written

    def encode(self, events: Iterable[Event]) -> bytes:
        return self.wrap(b"".join(map(self.frame, events)))


STREAM = Framing("event-stream", frame_sse, chunk, chunk(HEARTBEAT_SSE))
LINES = Framing("x-ndjson", frame_ndjson, chunk, chunk(HEARTBEAT_NDJSON))
MESSAGES = Framing("websocket", frame_websocket, bytes, PING)
