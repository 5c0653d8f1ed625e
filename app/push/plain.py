"""Plain requests, answered in one write and without ASGI; the next one that is like the last is known by its head.

Clients that poll, and producers that post, send the same head thousands of times on one connection, but for the values
of a few fields. What was parsed, checked and looked up for one of them holds for all that follow.
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from app.push.guard import HttpGuard

VARYING = frozenset((b"content-length", b"producer-seq", b"if-none-match"))
_VALUE = re.compile(rb"[\x20-\x7e]{0,256}")
_LENGTH = re.compile(rb"[0-9]{1,12}")


def encode_fields(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Header fields as they are sent."""
    return b"".join([b"%b: %b\r\n" % field for field in fields])


_encode_usual = lru_cache(maxsize=4)(encode_fields)  # those of all answers, which change once a second


class Head:
    """The head of a request that came whole in one piece, to know others by."""

    __slots__ = ("_fields", "_lines", "_places", "_size", "_whole")

    def __init__(self, data: bytes) -> None:
        head, end, _ = data.partition(b"\r\n\r\n")
        self._whole, self._size = head + end, len(data)
        self._fields: dict[bytes, bytes] = {}
        self._lines = head.split(b"\r\n")
        self._places: list[tuple[int, bytes, bytes]] = []  # the beginning of such a line, and the name of its field
        for place, line in enumerate(self._lines):
            start = line[: line.find(b":") + 1]
            if (name := start[:-1].lower()) in VARYING:
                self._places.append((place, start, name))
                self._fields[name] = line[len(start) :].strip()
                self._lines[place] = b""

    def match(self, data: bytes) -> tuple[dict[bytes, bytes], bytes] | None:
        """The varying fields and the body, if this is one whole request with such a head and nothing else."""
        if len(data) == self._size and data.startswith(self._whole):
            return self._fields, data[len(self._whole) :]
        head, _, body = data.partition(b"\r\n\r\n")
        lines, fields = head.split(b"\r\n"), dict[bytes, bytes]()
        if len(lines) != len(self._lines):
            return None
        for place, start, name in self._places:
            line = lines[place]
            if not line.startswith(start) or not _VALUE.fullmatch(line, len(start)):
                return None
            fields[name] = line[len(start) :].strip()
            lines[place] = b""
        length = fields.get(b"content-length", b"0")
        if lines != self._lines or not _LENGTH.fullmatch(length) or int(length) != len(body):
            return None
        return fields, body

    @property
    def is_whole(self) -> bool:
        """Whether the request that it was made of came whole, and alone: else others cannot be told by it."""
        length = self._fields.get(b"content-length", b"0")
        if not self._whole.endswith(b"\r\n\r\n") or not _LENGTH.fullmatch(length):
            return False
        return self._size == len(self._whole) + int(length)


# Is given the varying fields and the body, and answers; False when this request has to go the long way.
Repeat = Callable[[Mapping[bytes, bytes], bytes], bool]


class PlainAnswers(HttpGuard):
    """A connection that can be answered in one write, and whose next request may be like the last."""

    __slots__ = ()

    _send: Send  # of the request that is being served, or was the last one
    _came: bytes | None  # the data that it began with, when there was one before it
    _known: tuple[Head, Repeat] | None

    def take_data(self, data: bytes) -> None:
        is_fresh = self.cycle is not None and not self._is_in_head and self._is_over()
        if (
            is_fresh
            and self._known is not None
            and (request := self._known[0].match(data))
            and self._known[1](*request)
        ):
            return
        self._came = data if is_fresh else None  # never that of another request than the one that it begins
        super().take_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if (send := getattr(self, "_send", None)) is not None:  # uvicorn tells the last one that came, and no other
            send.__self__.disconnected = True
        super().connection_lost(exc)

    def _is_over(self) -> bool:
        """Whether nothing of the last request is left: no answer, no body that has to be read, and no step of its
        task, which would find it unanswered again. When that ends, uvicorn takes `on_response` away."""
        cycle = self.cycle
        return cycle.response_complete and not cycle.more_body and cycle.on_response != self.on_response_complete

    def take_body(self) -> bytes | None:
        """The body of the request that is being served, if all of it is here."""
        cycle: RequestResponseCycle = self._send.__self__  # type: ignore[attr-defined]
        return None if cycle.more_body else bytes(cycle.body)

    def repeat_with(self, repeat: Repeat) -> None:
        """Whatever request comes next that is like this one, but for its body and VARYING fields, goes to `repeat`."""
        came, self._came = self._came, None
        cycle: RequestResponseCycle = self._send.__self__  # type: ignore[attr-defined]
        if came is not None and not cycle.more_body:
            head = Head(came)
            self._known = (head, repeat) if head.is_whole else None

    def hold_until(self, answered: "asyncio.Future[Any]") -> None:
        """A repeated request is answered when this is done; no other one is served before."""
        self._unset_keepalive_if_required()
        self.cycle.response_complete = False  # so that uvicorn knows that something is being served
        self.hold()
        answered.add_done_callback(self._go_on)

    def _go_on(self, _: object) -> None:
        if self.transport.is_closing():
            self._held = None  # it came behind the last one that is answered here
        self.release()

    def begin(self, status: int, fields: bytes) -> bytes:
        """The head of an answer, to be written before anything else. Its body follows in chunks, as
        `app.push.frames.chunk` makes them, and ASGI's `send` ends it."""
        cycle: RequestResponseCycle = self._send.__self__  # type: ignore[attr-defined]
        cycle.response_started = cycle.chunked_encoding = True
        self._came = None
        return self._make_head(cycle, status, fields + b"transfer-encoding: chunked\r\n")

    def respond(self, status: int, fields: bytes, body: bytes) -> None:
        """The whole answer to the request that is being served, in one write. `fields` are as by `encode_fields`."""
        cycle: RequestResponseCycle = self._send.__self__  # type: ignore[attr-defined]
        cycle.response_started = cycle.response_complete = True
        if not self.transport.is_closing():
            self.transport.write(self._make_head(cycle, status, fields) + body)
            if not cycle.keep_alive:
                self.transport.close()
        self.on_response_complete()

    def _make_head(self, cycle: RequestResponseCycle, status: int, fields: bytes) -> bytes:
        usual = _encode_usual(tuple(self.server_state.default_headers))
        end = b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n"
        return b"".join((STATUS_LINE[status], usual, fields, end))
