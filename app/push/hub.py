"""From the log to every subscriber."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from typing import NamedTuple

from app.core.event import Cursor, Event
from app.log.eventlog import EventLog
from app.push.frames import Framing
from app.push.parting import Parting
from app.push.puller import Puller
from app.push.reader import Watch
from app.push.subscriber import Pusher, Subscriber, Wire

SPOKES = 16  # of the wheel of heartbeats: so many parts of the subscribers have theirs at different times
SLICE = 32  # subscribers that are written to before the clock is looked at
SLICE_S = 0.004  # then others on the loop have their turn
REST = 1  # after a flush, the next one waits for as long as that took, up to `batch_max_ms`


class Channel:
    """A watched scan: who watches it, and what those that are level with it were told."""

    __slots__ = ("after", "members", "progress", "scan_id")

    def __init__(self, scan_id: str, after: int, progress: Event | None) -> None:
        self.scan_id = scan_id
        self.after = after
        self.progress = progress
        self.members: dict[Subscriber, Watch] = {}


class HubStatistics(NamedTuple):
    subscribers: dict[str, int]  # by transport
    pushed: dict[str, int]  # events, by transport
    channels: int
    flushes: int


class Hub:
    """A channel per watched scan. What is appended marks its channel dirty, and a flush tells all its subscribers.

    However much is appended in one turn of the loop, there is one flush. Frames are made once in it, and written to
    each subscriber that was level with the channel; all others read for themselves. Under load flushes come further
    apart, so that pushing takes a quarter of the loop's time and several events share a write.
    """

    def __init__(self, log: EventLog, *, batch_ms: float = 0, batch_max_ms: float = 20) -> None:
        self._log = log
        self._batch_s = batch_ms / 1000
        self._batch_max_s = batch_max_ms / 1000
        self._channels: dict[str, Channel] = {}
        self._dirty: dict[str, Channel] = {}
        self._pushing: Iterator[None] | None = None  # the flush under way
        self._is_scheduled = False
        self._rests_until = 0.0
        self._took_s = 0.0  # the flush under way, so far
        self._oldest_ts: int | None = None  # of the durable events in it
        self._subscribers: set[Subscriber] = set()
        self._wheel: list[set[Pusher]] = [set() for _ in range(SPOKES)]
        self._spokes = cycle(self._wheel)
        self.parting = Parting(self._subscribers, log.now_ms)
        self._pushed: Counter[str] = Counter()  # by those who have left
        self._flushes = 0
        # From the making of the oldest durable event in a flush to the last write, in seconds.
        self.note_lag: Callable[[float], None] = lambda seconds: None
        log.listen(self._mark)

    # Flushing

    def _mark(self, scan_id: str) -> None:
        channel = self._channels.get(scan_id)
        if channel is not None:
            self._dirty[scan_id] = channel
            self._schedule()

    def _schedule(self) -> None:
        if self._is_scheduled or not self._dirty:
            return
        self._is_scheduled = True
        wait_s = max(self._rests_until - time.monotonic(), self._batch_s)
        asyncio.get_running_loop().call_later(wait_s, self._flush)

    def _flush(self) -> None:
        """One slice of a flush; the next one follows when the rest of the loop has had its turn."""
        loop, began = asyncio.get_running_loop(), time.monotonic()
        if self._pushing is None:
            dirty, self._dirty = self._dirty, {}
            self._pushing = self._push(dirty.values())
            self._flushes += 1
            self._took_s = 0.0
        for _ in self._pushing:
            if time.monotonic() - began > SLICE_S:
                self._took_s += time.monotonic() - began
                loop.call_soon(self._flush)
                return
        ended = time.monotonic()
        if self._oldest_ts is not None:
            self.note_lag((self._log.now_ms() - self._oldest_ts) / 1000)
            self._oldest_ts = None
        self._rests_until = ended + min((self._took_s + ended - began) * REST, self._batch_max_s)
        self._pushing, self._is_scheduled = None, False
        self._schedule()

    def _push(self, channels: Iterable[Channel]) -> Iterator[None]:
        """Tells everybody what is new in these channels; yields now and then."""
        log = self._log
        for channel in channels:
            after, told = channel.after, channel.progress
            scan = log.find(channel.scan_id)
            events = None if scan is None else log.read_nowait(channel.scan_id, after)
            batch = events or []
            if scan is not None:
                channel.after = scan.n
                progress = log.get_progress_event(channel.scan_id)
                if progress is not None and progress is not told:
                    channel.progress, batch = progress, [*batch, progress]
            # Frames hold all that is new since the last flush; else everyone reads for themselves, page by page.
            is_whole = bool(batch) and events is not None and (events[-1].n if events else after) == channel.after
            is_last = scan is None or scan.state.is_terminal
            frames: dict[Framing, bytes] = {}
            for place, (subscriber, watch) in enumerate(list(channel.members.items()), 1):
                if (
                    is_whole
                    and watch.after == after
                    and watch.progress is told
                    and isinstance(subscriber, Pusher)
                    and subscriber.only is watch
                    and subscriber.wire.is_ready
                ):
                    framing = subscriber.framing
                    if framing not in frames:
                        frames[framing] = framing.encode(batch)
                    watch.after, watch.progress = channel.after, channel.progress
                    subscriber.pushed += len(batch)
                    subscriber.wire.write(frames[framing])
                    if is_last:
                        subscriber.wake()
                else:
                    subscriber.wake()
                if place % SLICE == 0:
                    yield
            if frames and events:
                self._oldest_ts = min(self._oldest_ts or events[0].ts, events[0].ts)
            yield

    # Subscribers

    def pull(self, transport: str) -> Puller:
        """A subscriber that asks. Leaving its block takes it out of every channel."""
        subscriber = Puller(self._log, transport, self._leave, self.note_lag)
        self._connect(subscriber)
        return subscriber

    def push(self, wire: Wire, framing: Framing, *, ends: bool, client: str = "") -> Pusher:
        """A subscriber that is written to, for a client. Leaving its block takes it out of every channel."""
        subscriber = Pusher(self._log, wire, framing, self._leave, ends=ends, client=client)
        next(self._spokes).add(subscriber)
        self._connect(subscriber)
        return subscriber

    def _connect(self, subscriber: Subscriber) -> None:
        self._subscribers.add(subscriber)
        self.parting.note_connected(subscriber)

    def _leave(self, subscriber: Subscriber) -> None:
        self._subscribers.discard(subscriber)
        self.parting.note_left()
        if isinstance(subscriber, Pusher):
            for spoke in self._wheel:
                spoke.discard(subscriber)
        self._pushed[subscriber.transport] += subscriber.pushed
        for scan_id in list(subscriber.watches):
            self.unsubscribe(subscriber, scan_id)

    def subscribe(self, subscriber: Subscriber, scan_id: str, cursor: Cursor | None) -> None:
        """Raises UnknownScan. Wake the subscriber when it watches all that it should."""
        watch = subscriber.watch(scan_id, cursor)
        channel = self._channels.get(scan_id)
        if channel is None:
            scan = self._log.get(scan_id)
            channel = Channel(scan_id, scan.n, self._log.get_progress_event(scan_id))
            self._channels[scan_id] = channel
        channel.members[subscriber] = watch

    def unsubscribe(self, subscriber: Subscriber, scan_id: str) -> None:
        subscriber.unwatch(scan_id)
        channel = self._channels.get(scan_id)
        if channel is not None:
            channel.members.pop(subscriber, None)
            if not channel.members:
                del self._channels[scan_id]

    async def beat(self, every_s: float) -> None:
        """Heartbeats for ever: each subscriber that is written to has one in `every_s`, from a single timer."""
        while True:
            for spoke in self._wheel:
                await asyncio.sleep(every_s / SPOKES)
                for subscriber in list(spoke):
                    subscriber.beat()

    def count_behind(self) -> Counter[str]:
        """Subscribers whose transports hold more than they should, by client."""
        return Counter(one.client for one in self._subscribers if isinstance(one, Pusher) and not one.wire.is_ready)

    def statistics(self) -> HubStatistics:
        subscribers, pushed = Counter[str](), self._pushed.copy()
        for subscriber in self._subscribers:
            subscribers[subscriber.transport] += 1
            pushed[subscriber.transport] += subscriber.pushed
        return HubStatistics(dict(subscribers), dict(pushed), len(self._channels), self._flushes)
