"""What subscribers see: events, and the cursors that say how far one has read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Self

import orjson

from app.core.errors import InvalidCursor

CURSOR_PATTERN = re.compile(r"([a-z0-9]{4,16})-(0|[1-9][0-9]{0,17})", re.ASCII)


class EventType(StrEnum):
    # Durable: in the journal before anyone sees them.
    QUEUED = "queued"
    STARTED = "started"
    MATCHES = "matches"
    CANCELLING = "cancelling"
    END = "end"
    # Ephemeral: the latest wins.
    PROGRESS = "progress"
    # Of the connection, not of the scan.
    RESET = "reset"
    THROTTLED = "throttled"
    BYE = "bye"


class Cursor(NamedTuple):
    """A position in the service-wide order of durable events: all events with a number up to `n` have been read.

    The epoch names the log's life. Without it, a cursor from a log that was deleted would point into the middle of
    a new one, and a client would silently miss what came before.
    """

    epoch: str
    n: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.n}"

    @classmethod
    def parse(cls, text: str, field: str = "after") -> Self:
        """Raises InvalidCursor, naming the field that held the text."""
        match = CURSOR_PATTERN.fullmatch(text)
        if match is None:
            raise InvalidCursor(
                f"{field}: {text[:40]!r} is not a cursor. Send one that this service gave you, such as 'k3f9-1042', "
                "or none to read from the start.",
                errors=[{"field": field, "message": "not a cursor; it looks like 'k3f9-1042'"}],
            )
        return cls(match[1], int(match[2]))


@dataclass(slots=True, eq=False)  # not frozen: that takes three times as long to make, and is done for every event
class Event:
    """One event, turned into JSON once; it never changes. `n` is its place in the service-wide order; 0 for ephemeral
    ones."""

    type: EventType
    scan: str
    seq: int
    n: int
    id: str | None  # the cursor that stands right behind this event
    json: bytes
    ts: int  # milliseconds since 1970

    def load_data(self) -> dict[str, Any]:
        """The event's `data`, read back from its JSON."""
        data: dict[str, Any] = orjson.loads(self.json)["data"]
        return data


def _take_json(value: Any) -> orjson.Fragment:
    """What was turned into JSON before, such as `app.core.scan.Rows`, goes in as it is."""
    return orjson.Fragment(value.json)


def make_event(
    type: EventType, scan: str, seq: int, data: Mapping[str, Any], ts: int, cursor: tuple[str, int] | None = None
) -> Event:
    """Encodes one event; without a `Cursor` it has no `id`. Events of the connection belong to no scan: `scan` is ""
    here and null on the wire."""
    name = str(type)  # orjson takes three times as long for an enum
    if cursor is None:
        whole = {"scan": scan or None, "seq": seq, "type": name, "ts": ts, "data": data}
        return Event(type, scan, seq, 0, None, orjson.dumps(whole, default=_take_json), ts)
    epoch, n = cursor
    id = f"{epoch}-{n}"
    whole = {"id": id, "scan": scan, "seq": seq, "type": name, "ts": ts, "data": data}
    # A copy: orjson writes into 4 KB of new memory, and what is behind the end is lost while the bytes are kept.
    return Event(type, scan, seq, n, id, b"".join((orjson.dumps(whole, default=_take_json), b"")), ts)
