"""A consumer that asks for what is new: polls, and streams on any ASGI server."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from app.core.event import Event
from app.log.eventlog import EventLog
from app.push.subscriber import Subscriber


class Puller(Subscriber):
    """A subscriber that is woken, and then reads for itself."""

    def __init__(
        self, log: EventLog, transport: str, left: Callable[["Puller"], None], note_lag: Callable[[float], None]
    ) -> None:
        super().__init__(log, transport, left)
        self._note_lag = note_lag
        self._since_ms = log.now_ms()
        self._awake = asyncio.Event()
        self._farewell: Event | None = None

    def wake(self) -> None:
        self._awake.set()

    def close(self, farewell: Event) -> None:
        self._farewell = farewell
        self.wake()

    async def read(self) -> list[Event]:
        """What is new, oldest first, about `page_bytes` at the most; empty when there is nothing."""
        while (batch := self.read_nowait()) is None:
            await self.fetch()
        return batch

    async def batches(
        self, *, heartbeat_s: float | None = None, ends: bool = True
    ) -> AsyncGenerator[list[Event], None]:
        """Everything from the cursors on, oldest first.

        An empty batch means that `heartbeat_s` passed without an event. With `ends` it stops when all watched scans
        have ended and all was given; without, it goes on, and gives an empty batch at each `wake` too. After `close`
        the farewell comes as the last event.
        """
        while True:
            was_woken = self._awake.is_set()
            self._awake.clear()
            if self._farewell is not None:
                yield [self._farewell]
                return
            batch = await self.read()
            if batch:
                yield batch
                self._note(batch)
            elif was_woken and not ends:
                yield []
            elif ends and self.is_done:
                return
            else:
                try:
                    async with asyncio.timeout(heartbeat_s):
                        await self._awake.wait()
                except TimeoutError:
                    yield []

    def _note(self, batch: Sequence[Event]) -> None:
        """These events were handed to the transport just now."""
        self.pushed += len(batch)
        # What happened before it came is history, and says nothing about how fast events are pushed.
        if batch[-1].n and batch[-1].ts >= self._since_ms:
            self._note_lag((self._log.now_ms() - batch[-1].ts) / 1000)
