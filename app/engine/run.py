"""What the runner knows of a scan while it is queued or running."""

import asyncio
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from app.core.estimate import Range
from app.core.scan import Rows, Skipped
from app.engine.worker import ChunkJob
from app.market.store import Chunk


@dataclass(slots=True, eq=False, kw_only=True)
class Run:
    """One admitted scan on its way through queue and slot."""

    scan_id: str
    client: str
    cost_rows: int
    attempt: int
    data_version: str
    job: ChunkJob  # without slices
    chunks: tuple[Chunk, ...]
    is_accepted: bool = False  # its first event is committed
    position: int = 0
    started: float | None = None  # on the runner's clock
    rest_s: Range | None = None  # what is left, by its own progress
    cancelled_by: str | None = None
    task: asyncio.Task[None] | None = None
    # What was found so far, for the end.
    is_counted: bool = False  # what an earlier attempt found is in here
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    kept: int = 0  # matches that became events
    found: int = 0  # matches, those over `max_matches` too
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def note_kept(self, rows: Rows) -> None:
        self.kept += rows.count
        self.digest.update(rows.canonical)

    def note_skipped(self, skipped: Iterable[Skipped]) -> None:
        for one in skipped:
            self.skipped.setdefault(one.symbol, []).append(one.reason)
