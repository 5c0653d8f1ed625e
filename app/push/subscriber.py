"""One consumer of events, whatever it is connected by. It owns no queue: what it is behind, it reads from the log."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol, Self

from app.core.event import Cursor, Event
from app.log.eventlog import EventLog
from app.push.frames import Framing
from app.push.reader import Reader, Watch

logger = logging.getLogger(__name__)


class Subscriber(Reader):
    """Who watches some scans, and is woken when there is something new."""

    def __init__(self, log: EventLog, transport: str, left: Callable[[Any], None]) -> None:
        super().__init__(log)
        self.transport = transport
        self.pushed = 0  # events given so far
        self.is_leaving = False  # it was told `bye`
        self._left = left

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._left(self)

    def wake(self) -> None:
        """There may be something new."""
        raise NotImplementedError

    def close(self, farewell: Event) -> None:
        """Ends the subscription with this event."""
        raise NotImplementedError


class Wire(Protocol):
    """The way straight to one peer's transport; `app.push.wire` has it for uvicorn."""

    is_ready: bool  # False while the transport holds more than it should, and from `finish` on

    @property
    def transport(self) -> asyncio.WriteTransport: ...

    def open(self, turned: Callable[[], None]) -> None:
        """A stream begins; `turned` is called whenever `is_ready` has turned."""

    def write(self, data: bytes) -> None:
        """Hands over ready frames, as they are and in this order."""

    def beat(self, heartbeat: bytes) -> None:
        """Shows the peer that it is not forgotten."""

    def finish(self) -> None:
        """Nothing more will be written."""

    def abort(self) -> None:
        """Breaks the connection off."""


class Stand(Protocol):
    """Where a pusher stands that has read all there is; `app.push.channel` has it."""

    def part(self, pusher: "Pusher") -> None:
        """From now on it reads for itself, from here."""


class Pusher(Subscriber):
    """A subscriber that is written to, without a task of its own.

    It reads on in the log from its own cursors until it has everything. Then it is level, which the hub is told, and
    may stand in a block until it is woken. While its transport is behind it is skipped; when that has drained, it
    reads on. With `ends`, it finishes when all scans that it watches have ended.
    """

    def __init__(
        self,
        log: EventLog,
        wire: Wire,
        framing: Framing,
        *,
        left: Callable[[Any], None],
        level: Callable[["Pusher"], None],
        ends: bool,
        client: str = "",
    ) -> None:
        super().__init__(log, framing.name, left)
        self.page_bytes = min(self.page_bytes, 65_536)  # may wait in the transport, beside one frame
        self.client = client
        self.wire = wire
        self.framing = framing
        self.block: Stand | None = None
        self._level = level
        self._ends = ends
        self._reading: asyncio.Task[None] | None = None
        wire.open(self.wake)

    def watch(self, scan_id: str, cursor: Cursor | None) -> Watch:
        self._part()
        return super().watch(scan_id, cursor)

    def unwatch(self, scan_id: str) -> None:
        self._part()
        super().unwatch(scan_id)

    def _part(self) -> None:
        if self.block is not None:
            self.block.part(self)

    def start(self, opening: bytes) -> None:
        """The first write: this, and what there is to read behind it. Another write would cost as much again."""
        batch = (self.read_nowait() if self.wire.is_ready else None) or []
        self.wire.write(opening + self.framing.encode(batch) if batch else opening)
        self.pushed += len(batch)
        asyncio.get_running_loop().call_soon(self.wake)

    def wake(self) -> None:
        self._part()
        if not self.wire.is_ready or self._reading is not None:
            return
        batch = self.read_nowait()
        if batch is None:
            self._reading = asyncio.get_running_loop().create_task(self._read_on())
        elif batch:
            self.wire.write(self.framing.encode(batch))
            self.pushed += len(batch)
            asyncio.get_running_loop().call_soon(self.wake)  # a page a turn: the others have theirs to be written
        elif self._ends and self.is_done:
            self.wire.finish()
        else:
            self._level(self)

    async def _read_on(self) -> None:
        try:
            await self.fetch()
        except Exception:
            logger.exception("a stream cannot be read on", extra={"action": "stream_broken"})
            self.wire.abort()  # the client comes back with its cursor
            return
        self._reading = None
        self.wake()

    def beat(self) -> None:
        if self.wire.is_ready:
            self.wire.beat(self.framing.heartbeat)

    def close(self, farewell: Event) -> None:
        self.wire.write(self.framing.encode([farewell]))
        self.wire.finish()

    def __exit__(self, *_: object) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._ends = False  # the wire may be another's by now
        super().__exit__()
