"""From the log to every subscriber."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from app.core.event import Cursor
from app.log.eventlog import EventLog
from app.push.subscriber import Subscriber


class HubStatistics(NamedTuple):
    subscribers: dict[str, int]  # by transport
    channels: int
    flushes: int


class Hub:
    """A channel per watched scan. What is appended marks its channel dirty; one flush wakes all its subscribers.

    However much is appended in one turn of the loop, there is one flush.
    """

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._channels: dict[str, set[Subscriber]] = {}
        self._dirty: set[str] = set()
        self._connected = Counter[str]()
        self._flushes = 0
        log.listen(self._mark)

    def _mark(self, scan_id: str) -> None:
        if scan_id in self._channels:
            if not self._dirty:
                asyncio.get_running_loop().call_soon(self._flush)
            self._dirty.add(scan_id)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, set()
        self._flushes += 1
        for scan_id in dirty:
            for subscriber in self._channels.get(scan_id, ()):
                subscriber.wake()

    @contextmanager
    def connect(self, transport: str) -> Iterator[Subscriber]:
        """A subscriber that is taken out of every channel when the block is left."""
        subscriber = Subscriber(self._log, transport)
        self._connected[transport] += 1
        try:
            yield subscriber
        finally:
            self._connected[transport] -= 1
            for scan_id in list(subscriber.watches):
                self.unsubscribe(subscriber, scan_id)

    def subscribe(self, subscriber: Subscriber, scan_id: str, cursor: Cursor | None) -> None:
        """Raises UnknownScan."""
        subscriber.watch(scan_id, cursor)
        self._channels.setdefault(scan_id, set()).add(subscriber)

    def unsubscribe(self, subscriber: Subscriber, scan_id: str) -> None:
        subscriber.unwatch(scan_id)
        members = self._channels.get(scan_id, set())
        members.discard(subscriber)
        if not members:
            self._channels.pop(scan_id, None)

    def statistics(self) -> HubStatistics:
        return HubStatistics(dict(self._connected), len(self._channels), self._flushes)
