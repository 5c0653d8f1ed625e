"""What a scan is: its states, the facts it was submitted with, and what its durable events make of it."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Self

import orjson

from app.core.errors import WrongState
from app.core.event import EventType


class State(StrEnum):
    is_terminal: bool

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"

    def __init__(self, name: str) -> None:
        self.is_terminal = name in ("completed", "failed", "cancelled", "lost")


_TERMINAL = frozenset(state for state in State if state.is_terminal)
_NEXT: dict[State, frozenset[State]] = {
    # Queued again: its position changed.
    State.QUEUED: frozenset({State.QUEUED, State.RUNNING, State.CANCELLED, State.LOST}),
    # Queued again: a restart found the scan unfinished, and it waits for a slot once more.
    State.RUNNING: _TERMINAL | {State.CANCELLING, State.QUEUED},
    State.CANCELLING: _TERMINAL,
}


def check_transition(old: State, new: State) -> None:
    """Raises WrongState unless a scan may go from `old` to `new`."""
    allowed = _NEXT.get(old, frozenset())
    if new not in allowed:
        expected = ", ".join(sorted(allowed)) or "nothing, it has ended"
        raise WrongState(f"A scan that is {old} can become {expected}; it cannot become {new}.")


# To look up the member of an enum takes as long as half of `fold` for the events that are most.
_MATCHES, _RUNNING, _CANCELLING = EventType.MATCHES, State.RUNNING, State.CANCELLING

Row = Mapping[str, Any]  # one match: JSON values only


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """Rows of one symbol that a scan left out, and why."""

    symbol: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Work done so far. It comes from chunks that are finished, never from a clock."""

    done: int
    total: int | None  # None: nobody knows yet
    unit: str
    rate: float | None = None  # units per second
    eta_s: tuple[float, float] | None = None  # low and high, in seconds
    matches: int = 0
    phase: str = "scanning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Producer:
    """The program elsewhere that works on an external scan: what it may show, and what it has appended."""

    token_hash: str  # SHA-256 of its token, in hex
    seq: int = 0  # of its last numbered request
    done: int = 0
    total: int | None = None
    dropped: int = 0  # rows it sent that were not kept


class Scan(NamedTuple):
    """One run of one scanner with one set of parameters: what was asked, and what its events made of it.

    It never changes; `fold` gives the scan after one more event. So what is committed and what is still on its way
    into the journal are two values, and nobody can be shown the wrong one. A tuple, and what changes most at its end:
    one more event costs a copy of it.
    """

    # What was asked.
    id: str
    scanner: str
    params: Mapping[str, Any]  # normalised: every default filled in
    client: str
    created_ts: int  # milliseconds since 1970
    data_version: str
    same_key: str  # equal for scans that must find the same rows; see single-flight
    cost_rows: int  # price rows to be read
    chunk_rows: int  # the size its chunks were planned with; checkpoints count these chunks
    idempotency: tuple[str, str] | None = None  # the key it was submitted with, and the hash of that body
    cancel_when_unwatched_s: float | None = None
    producer: Producer | None = None  # of an external scan

    # What its events made of it.
    state: State = State.QUEUED
    attempt: int = 0  # counts the runs: 1 at the first, more after restarts
    started_ts: int | None = None
    finished_ts: int | None = None
    position: int | None = None  # in the queue; 1 is next
    eta_s: tuple[float, float] | None = None  # until the start, while queued
    end: Mapping[str, Any] | None = None
    is_trimmed: bool = False  # past retention: of its events only the end is left
    matches: int = 0
    seq: int = 0  # of the last durable event
    n: int = 0  # of the last durable event, in the service-wide order

    def fold(self, type: EventType, data: Mapping[str, Any], ts: int, n: int) -> "Scan":
        """The scan after one more durable event. Raises WrongState for one that may not come now."""
        if type is _MATCHES:  # as most events are
            if self.state is not _RUNNING and self.state is not _CANCELLING:
                raise WrongState(f"Matches can come while a scan is running; this one is {self.state}.")
            changed = (self.matches + len(data["rows"]), self.seq + 1, n)
            return tuple.__new__(Scan, self[:-3] + changed)
        here: dict[str, Any] = {"seq": self.seq + 1, "n": n}
        match type:
            case EventType.QUEUED:
                here |= {"state": State.QUEUED, "position": data["position"], "eta_s": data["eta_s"]}
            case EventType.STARTED:
                here |= {"state": State.RUNNING, "position": None, "eta_s": None, "attempt": data["attempt"]}
                here |= {"started_ts": self.started_ts or ts}
            case EventType.CANCELLING:
                here |= {"state": State.CANCELLING}
            case EventType.END:
                here |= {"state": State(data["state"]), "position": None, "eta_s": None}
                here |= {"finished_ts": ts, "end": data}
            case _:
                raise WrongState(f"A {type} event is not durable; it does not belong in the log.")
        if "state" in here:
            check_transition(self.state, here["state"])
        return self._replace(**here)

    def to_record(self) -> bytes:
        """The scan as the journal keeps it."""
        return orjson.dumps(self._asdict())

    @classmethod
    def from_record(cls, record: bytes) -> Self:
        values = orjson.loads(record)
        for name in ("idempotency", "eta_s"):
            values[name] = None if values[name] is None else tuple(values[name])
        if (producer := values.get("producer")) is not None:
            if "found" in producer:  # as it was recorded once: rows it sent, kept or not
                producer["dropped"] = producer.pop("found") - values["matches"]
            values["producer"] = Producer(**producer)
        return cls(**values | {"state": State(values["state"])})


def make_end(
    state: State,
    *,
    matches: int,
    found: int,
    last_seq: int,
    digest: str,
    elapsed_s: float,
    skipped: Sequence[Mapping[str, str]] = (),
    skipped_symbols: int = 0,
    error: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The data of an `end` event. `found` counts the matches that were not kept too."""
    return {
        "state": state,
        "matches": matches,
        "last_seq": last_seq,
        "digest": digest,
        "elapsed_s": round(elapsed_s, 3),
        "skipped": skipped,
        "skipped_symbols": skipped_symbols,
        "error": error,
        "truncated": found > matches,
    }


def canonical_row(row: Row) -> bytes:
    """One match as JSON with sorted keys and no white space: the form that digests are made of."""
    return orjson.dumps(row, option=orjson.OPT_SORT_KEYS)


def digest_rows(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows in canonical order, in hex: `end.digest`.

    The canonical order is that of the events (by seq, and within an event as listed), which for market scans is by
    symbol and date. Each row goes in as `canonical_row` and a line feed, so a reader can hash while rows arrive.
    """
    digest = hashlib.sha256()
    feed_digest(digest, rows)
    return digest.hexdigest()


def feed_digest(digest: "hashlib._Hash", rows: Iterable[Row]) -> None:
    """Puts more rows into a digest that is being made; see `digest_rows`."""
    for row in rows:
        digest.update(canonical_row(row) + b"\n")


class Rows:
    """The match rows of one event, turned into JSON where they were found, so that the event loop need not."""

    __slots__ = ("canonical", "count", "json")

    def __init__(self, count: int, json: bytes, canonical: bytes) -> None:
        self.count = count
        self.json = json  # the array of rows
        self.canonical = canonical  # what the digest is fed; see `digest_rows`

    def __len__(self) -> int:
        return self.count


def pack_rows(rows: Sequence[Row]) -> Rows:
    return Rows(len(rows), orjson.dumps(rows), b"".join(canonical_row(row) + b"\n" for row in rows))


SYNTHETIC = "synthetic-"  # what the data version of invented prices begins with
SYNTHETIC_MARK = "SYNTHETIC, not real prices"


def is_synthetic(data_version: str) -> bool:
    """Whether these prices are invented: what was found in them is marked wherever it is shown."""
    return data_version.startswith(SYNTHETIC)


def make_same_key(scanner: str, params: Mapping[str, Any], data_version: str) -> str:
    """Equal for two submissions that must find the same rows."""
    text = orjson.dumps([scanner, params, data_version], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(text).hexdigest()
