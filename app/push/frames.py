"""Events as bytes on the wire, one function per format. Each event is framed once per format in use."""

from functools import lru_cache

from app.core.event import Event

_CACHED = 512  # events whose frames are at hand; every caught-up subscriber needs the same few


@lru_cache(maxsize=_CACHED)
def frame_sse(event: Event) -> bytes:
    """Server-sent event (WHATWG HTML, 9.2). Without an `id:` line for events that have no cursor."""
    id_line = b"" if event.id is None else b"id: " + event.id.encode() + b"\n"
    return b"event: " + event.type.encode() + b"\n" + id_line + b"data: " + event.json + b"\n\n"


def frame_ndjson(event: Event) -> bytes:
    """One line of newline-delimited JSON."""
    return event.json + b"\n"


@lru_cache(maxsize=_CACHED)
def frame_text(event: Event) -> str:
    """The payload of one WebSocket text message."""
    return event.json.decode()


def open_sse(retry_ms: int) -> bytes:
    """The first bytes of every stream, sent at once, so that a proxy that buffers is found out."""
    return b": ok\nretry: %d\n\n" % retry_ms


HEARTBEAT_SSE = b": hb\n\n"
HEARTBEAT_NDJSON = b"\n"
