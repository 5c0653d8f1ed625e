"""Where the log is kept: the interface of a journal, and what goes into it."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from app.core.event import Event
from app.core.scan import Scan, Skipped

# For a journal that does not hold what was written.
ADVICE = (
    "`scanwire journal check` says what is wrong, and `scanwire journal salvage` makes a new journal of all that "
    "can be read."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One chunk is done. It is written in the same transaction as the matches of that chunk."""

    chunk: int
    found: int = 0  # matches, kept or not
    skipped: tuple[Skipped, ...] = ()


Forgets = Literal["events", "scan"]  # "events": all but the end, and the checkpoints


@dataclass(slots=True, eq=False)  # not frozen, as events are not
class Write:
    """What becomes durable together: some events of one scan, the scan after them, and perhaps a checkpoint.

    What it says never changes.
    """

    scan: Scan
    events: Sequence[Event]
    committed: "asyncio.Future[Scan]"  # its own; a caller that is cancelled may have cancelled it
    checkpoint: Checkpoint | None = None
    is_told: bool = True  # whether the events tell all that is new in the scan
    forgets: Forgets | None = None


class Kept(NamedTuple):
    """What a journal holds when it is opened. The latest matches of a scan may not be in its record yet."""

    epoch: str
    last_n: int
    scans: list[Scan]


class Journal(Protocol):
    """Keeps events in the order given, and says when they are safe.

    `submit` never blocks and is called on one thread only. `committed` is called, on a thread of the journal's own,
    with the writes of one transaction, in the order of their submission. A write that fails is tried again until it
    succeeds or the journal is closed: what was submitted is never skipped over.
    """

    # Why nothing can be written just now, as a sentence; None while all is well.
    fault: str | None

    def open(self, committed: Callable[[Sequence[Write]], None]) -> Kept: ...

    def submit(self, writes: Sequence[Write]) -> None: ...

    def read(self, scan: str, after: int, max_bytes: int) -> list[Event]:
        """Durable events of one scan behind `after`, oldest first: at least one if there is one, and then no more
        than `max_bytes` of JSON. Blocks; safe on any thread."""
        ...

    def read_checkpoints(self, scan: str) -> list[Checkpoint]:
        """The chunks of a scan that are done. Blocks; safe on any thread."""
        ...

    def close(self) -> Sequence[Write]:
        """Writes what is left and closes; gives back what could not be written. Blocks."""
        ...
