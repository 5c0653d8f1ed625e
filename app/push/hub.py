"""From the log to every subscriber."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from app.core.event import Cursor, EventType, make_event
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
        self._subscribers: set[Subscriber] = set()
        self._farewell_ms: int | None = None  # set when the service drains
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
        self._subscribers.add(subscriber)
        if self._farewell_ms is not None:
            self._say_bye(subscriber, self._farewell_ms)
        try:
            yield subscriber
        finally:
            self._subscribers.discard(subscriber)
            for scan_id in list(subscriber.watches):
                self.unsubscribe(subscriber, scan_id)

    def drain(self, spread_ms: int) -> None:
        """Says `bye` to every subscriber, now and from now on, with a `reconnect_ms` of their own up to `spread_ms`,
        so that they do not all come back at once."""
        self._farewell_ms = spread_ms
        for subscriber in list(self._subscribers):
            self._say_bye(subscriber, spread_ms)

    def _say_bye(self, subscriber: Subscriber, spread_ms: int) -> None:
        data = {"reconnect_ms": random.randint(0, spread_ms)}
        subscriber.close(make_event(EventType.BYE, "", 0, data, self._log.now_ms()))

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
        transports = Counter(subscriber.transport for subscriber in self._subscribers)
        return HubStatistics(dict(transports), len(self._channels), self._flushes)
