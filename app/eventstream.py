"""From bytes to events on the reading side. Sans-I/O: bytes go in, events come out, nothing here waits.

`SseDecoder` and `NdjsonDecoder` take a body in whatever pieces it arrives. `Sequence` says of each event whether it
is new, and finds what is missing.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

import orjson

from app.core.event import EventType

MAX_FRAME_BYTES = 16 * 2**20  # of one event; the service's largest have some 200 KB
MAX_RETRY_MS = 10 * 60_000  # no server may send a client away for longer than this
_LINE_ENDS = re.compile(rb"\r\n|\r|\n")
_BOM = b"\xef\xbb\xbf"


class Garbled(Exception):
    """The bytes are not what Scanwire sends: too long, not JSON, or not an event."""


class Gap(Exception):
    """An event came whose predecessors did not: read again from the last good cursor."""

    def __init__(self, scan: str, expected: int, got: int) -> None:
        super().__init__(f"After event {expected - 1} of {scan} came event {got}.")
        self.place = (scan, expected, got)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanEvent:
    """One event as it was received. Durable ones have an `id`; see DESIGN 8 for what `data` holds by type."""

    type: str  # an EventType, or one that a later server knows
    scan: str | None  # None for events of the connection
    seq: int
    ts: int  # milliseconds since 1970, on the server's clock
    id: str | None  # the cursor that stands right behind this event; None for ephemeral ones
    data: dict[str, Any]
    json: bytes  # unchanged

    @property
    def n(self) -> int | None:
        """The place in the service-wide order of durable events."""
        return None if self.id is None else int(self.id.rpartition("-")[2])

    @classmethod
    def parse(cls, json: bytes) -> Self:
        """Raises Garbled."""
        try:
            body = orjson.loads(json)
            event = cls(
                type=body["type"],
                scan=body.get("scan"),
                seq=body["seq"],
                ts=body["ts"],
                id=body.get("id"),
                data=body["data"],
                json=json,
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Garbled(f"This is not an event: {json[:80]!r}") from None
        is_event = isinstance(event.type, str) and isinstance(event.seq, int) and isinstance(event.data, dict)
        is_placed = event.id is None or (isinstance(event.id, str) and event.id.rpartition("-")[2].isdigit())
        if not is_event or not is_placed:
            raise Garbled(f"This is not an event: {json[:80]!r}")
        return event


class Decoder(Protocol):
    """What both stream formats offer. `retry_s` is the wait that the server asked for, if any."""

    retry_s: float | None

    def feed(self, data: bytes) -> Iterator[ScanEvent]: ...


class _Lines:
    """Cuts a body into lines, however it was cut into pieces. Line ends are CR, LF and CRLF alone, which is why this
    is not `str.splitlines`; they are single bytes in UTF-8, so no character is cut."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pending: list[bytes] = []  # the pieces of the line that has not ended yet
        self._size = 0
        self._after_cr = False  # a line feed that comes next belongs to the line end before it
        self._is_first = True

    def feed(self, data: bytes) -> list[bytes]:
        if not data:
            return []
        if self._after_cr and data[:1] == b"\n":
            data = data[1:]
        self._after_cr = data[-1:] == b"\r"
        *lines, rest = _LINE_ENDS.split(data)
        if lines:
            lines[0] = b"".join([*self._pending, lines[0]])
            self._pending, self._size = [], 0
            if self._is_first:
                lines[0] = lines[0].removeprefix(_BOM)
                self._is_first = False
        if rest:
            self._pending.append(rest)
            self._size += len(rest)
        if max(self._size, *map(len, lines), 0) > self._max_bytes:
            raise Garbled(f"A line is longer than {self._max_bytes} bytes.")
        return lines


class SseDecoder:
    """Server-sent events (WHATWG HTML, 9.2.6), of which Scanwire's `data` is the whole event.

    An event that is cut off by the end of the body is never given.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.retry_s: float | None = None
        self._lines = _Lines(max_frame_bytes)
        self._max_bytes = max_frame_bytes
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[ScanEvent]:
        """The events that are complete now. Raises Garbled when it comes to one that is none or too long."""
        return map(ScanEvent.parse, self.feed_frames(data))

    def feed_frames(self, data: bytes) -> list[bytes]:
        """The `data` of the events that are complete now, its lines joined by line feeds."""
        frames = []
        for line in self._lines.feed(data):
            if not line:
                if self._data:
                    frames.append(b"\n".join(self._data))
                self._data, self._size = [], 0
                continue
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                self._data.append(value)
                self._size += len(value) + 1
                if self._size > self._max_bytes:
                    raise Garbled(f"An event is longer than {self._max_bytes} bytes.")
            elif field == b"retry" and value.isdigit() and len(value) < 12:
                self.retry_s = min(int(value), MAX_RETRY_MS) / 1000
        return frames


class NdjsonDecoder:
    """One event a line; empty lines are heartbeats. A line without its end is never given."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.retry_s: float | None = None
        self._lines = _Lines(max_frame_bytes)

    def feed(self, data: bytes) -> Iterator[ScanEvent]:
        """The events that are complete now. Raises Garbled when it comes to one that is none."""
        return (ScanEvent.parse(line) for line in self._lines.feed(data) if line.strip())


class Sequence:
    """How far the events of some scans have been read: each durable event is let through once, in order.

    `cursor` is where to go on after a break. It stands behind the last event that was let through, so nothing that
    was lost on the way is ever skipped.
    """

    def __init__(self, scans: Iterable[str], after: str | None) -> None:
        self.cursor = after
        # Read to their end; or gone, which a `reset` without a snapshot says.
        self.closed: set[str] = set()
        self._scans = tuple(dict.fromkeys(scans))
        # The seq of the last event of each scan. None: whatever comes first is the first.
        self._last: dict[str, int | None] = dict.fromkeys(self._scans, 0 if after is None else None)

    @property
    def open(self) -> tuple[str, ...]:
        """The scans that something may still come of."""
        return tuple(scan for scan in self._scans if scan not in self.closed)

    def admit(self, event: ScanEvent) -> bool:
        """Whether the event is to be shown: not a repetition, not of another scan, not of the connection.

        Raises Gap when an event before it is missing.
        """
        scan = event.scan
        if scan is None or scan not in self._last or scan in self.closed:
            return False
        if event.type == EventType.RESET:
            # Everything that is kept is told again from here; what was received counts for nothing.
            self.cursor, self._last[scan] = None, 0
            if event.data.get("snapshot") is None:
                self.closed.add(scan)
            return True
        last = self._last[scan]
        if event.id is None:
            return last is None or event.seq >= last
        if last is not None and event.seq <= last:
            return False
        # Of a scan past its retention only the end is left, and that is not a gap.
        is_all_there_is = last == 0 and event.type == EventType.END
        if last is not None and event.seq != last + 1 and not is_all_there_is:
            raise Gap(scan, last + 1, event.seq)
        self._last[scan] = event.seq
        self.cursor = event.id
        if event.type == EventType.END:
            self.closed.add(scan)
        return True
