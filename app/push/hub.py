"""From the log to every subscriber."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

from app.core.event import Cursor
from app.log.eventlog import EventLog
from app.push.channel import BLOCK, Channel
from app.push.frames import Framing
from app.push.pace import Pace
from app.push.parting import Parting
from app.push.puller import Puller
from app.push.ring import Ring
from app.push.subscriber import Pusher, Subscriber, Wire

SPOKES = 16  # of the wheel of heartbeats: so many parts of the subscribers have theirs at different times
TURN_WRITES = 512  # are done in one turn of the loop, or those of so much time; then others have their turn
TURN_S = 0.004
FEW_WRITES = 16  # need no look at the clock


class HubStatistics(NamedTuple):
    subscribers: dict[str, int]  # by transport
    pushed: dict[str, int]  # events, by transport
    channels: int
    flushes: int


class Hub:
    """A channel per watched scan. What is appended marks its channel dirty, and a flush tells all its subscribers.

    However much is appended in one turn of the loop, there is one flush. Frames are made once in it, and written to
    each pusher that was level with the channel; all others read for themselves. Under load flushes come further apart,
    at its `Pace`, and several events share a write.
    """

    def __init__(
        self, log: EventLog, *, ring: Ring | None = None, batch_ms: float = 0, batch_max_ms: float = 20
    ) -> None:
        self._log = log
        self._ring = ring
        self._batch_s = batch_ms / 1000
        self._pace = Pace(batch_max_ms / 1000)
        self._channels: dict[str, Channel] = {}
        self._dirty: dict[str, Channel] = {}
        self._pushing: Iterator[int] | None = None  # the flush under way
        self._is_scheduled = False
        self._began_s = 0.0  # the flush under way, by the CPU time of this thread
        self._oldest_ts: int | None = None  # of the durable events in it
        self._subscribers: set[Subscriber] = set()
        self._wheel: list[set[Pusher]] = [set() for _ in range(SPOKES)]
        self._spokes = cycle(self._wheel)
        self.parting = Parting(self._subscribers, log.now_ms)
        self._pushed: Counter[str] = Counter()  # by those who have left
        self._flushes = 0
        self.note_lag: Callable[[float], None] = lambda seconds: None  # from the oldest event of a flush to its end
        log.listen(self._mark)

    # Flushing

    def _mark(self, scan_ids: Sequence[str]) -> None:
        for scan_id in scan_ids:
            if (channel := self._channels.get(scan_id)) is not None:
                self._dirty[scan_id] = channel
        self._schedule()

    def _schedule(self) -> None:
        if self._dirty and not self._is_scheduled:
            self._is_scheduled = True
            wait_s = max(self._pace.wait_s(time.monotonic()), self._batch_s)
            asyncio.get_running_loop().call_later(wait_s, self._flush)

    def _flush(self) -> None:
        """One part of a flush; the next one follows when the rest of the loop has had its turn."""
        loop, now, writes = asyncio.get_running_loop(), time.monotonic(), 0
        if self._pushing is None:
            self._pushing, self._dirty = self._push(self._dirty), {}
            self._flushes += 1
            self._began_s = time.thread_time()
        for count in self._pushing:
            writes += count
            if writes >= TURN_WRITES or time.monotonic() - now > TURN_S:
                loop.call_soon(self._flush)
                return
        loop.call_soon(self._rest)  # the transports write at the end of this turn

    def _rest(self) -> None:
        if self._oldest_ts is not None:
            self.note_lag((self._log.now_ms() - self._oldest_ts) / 1000)
            self._oldest_ts = None
        self._pace.note(time.thread_time() - self._began_s, time.monotonic())
        self._pushing, self._is_scheduled = None, False
        self._schedule()

    def _push(self, dirty: Mapping[str, Channel]) -> Iterator[int]:
        """Tells everybody what is new in these channels. Yields now and then, with the number of writes since."""
        writes = 0
        for scan_id, channel in dirty.items():
            after, told = channel.after, channel.progress
            scan, events, progress = self._log.look(scan_id, after)
            batch, is_last = events or [], scan is None or scan.state.is_terminal
            channel.after = after if scan is None else scan.n
            if progress is not None and progress is not told:
                channel.progress, batch = progress, [*batch, progress]
            # Frames hold all that is new since the last flush; else everyone reads for themselves, page by page.
            is_whole = bool(batch) and events is not None and (events[-1].n if events else after) == channel.after
            frames: dict[Framing, bytes] = {}
            woken: list[Subscriber] = []
            for block in tuple(channel.blocks):
                if block.after != after or block.progress is not told:
                    continue  # who has joined meanwhile is level with what is new
                writes += len(block.members)
                if is_whole:
                    if block.framing not in frames:
                        frames[block.framing] = block.framing.encode(batch)
                    block.tell(frames[block.framing], len(batch), channel.after, channel.progress, self._ring)
                if is_last or not is_whole:
                    woken += block.members
                if writes >= FEW_WRITES:
                    yield writes
                    writes = 0
            if channel.readers or woken:
                for place, subscriber in enumerate((*channel.readers, *woken), 1):
                    subscriber.wake()
                    if place % BLOCK == 0:
                        yield BLOCK
                yield BLOCK
            if frames and events and (self._oldest_ts is None or events[0].ts < self._oldest_ts):
                self._oldest_ts = events[0].ts

    # Subscribers

    def pull(self, transport: str) -> Puller:
        """A subscriber that asks. Leaving its block takes it out of every channel."""
        subscriber = Puller(self._log, transport, self._leave, self.note_lag)
        self._subscribers.add(subscriber)
        self.parting.note_connected(subscriber)
        return subscriber

    def push(self, wire: Wire, framing: Framing, *, ends: bool, client: str = "") -> Pusher:
        """A subscriber that is written to, for a client. Leaving its block takes it out of every channel."""
        subscriber = Pusher(self._log, wire, framing, left=self._leave, level=self._join, ends=ends, client=client)
        next(self._spokes).add(subscriber)
        self._subscribers.add(subscriber)
        return subscriber

    def start(self, pusher: Pusher, opening: bytes) -> None:
        """The stream begins with `opening`, before which nothing is written, not even a farewell."""
        pusher.start(opening)
        self.parting.note_connected(pusher)

    def _leave(self, subscriber: Subscriber) -> None:
        self._subscribers.discard(subscriber)
        self.parting.note_left()
        if isinstance(subscriber, Pusher):
            for spoke in self._wheel:
                spoke.discard(subscriber)
        for scan_id in list(subscriber.watches):
            self.unsubscribe(subscriber, scan_id)
        self._pushed[subscriber.transport] += subscriber.pushed  # it has left its block, and counts what it got there

    def subscribe(self, subscriber: Subscriber, scan_id: str, cursor: Cursor | None) -> None:
        """Raises UnknownScan. Wake the subscriber when it watches all that it should."""
        subscriber.watch(scan_id, cursor)
        channel = self._channels.get(scan_id)
        if channel is None:
            channel = self._channels[scan_id] = Channel(self._log.get(scan_id).n, self._log.get_progress_event(scan_id))
        channel.readers[subscriber] = None

    def _join(self, pusher: Pusher) -> None:
        """This one has read all there is; with one scan alone it may stand in a block."""
        if len(pusher.watches) == 1:
            ((scan_id, watch),) = pusher.watches.items()
            if (channel := self._channels[scan_id]).is_level(watch):
                channel.join(pusher)

    def unsubscribe(self, subscriber: Subscriber, scan_id: str) -> None:
        subscriber.unwatch(scan_id)
        if (channel := self._channels.get(scan_id)) is not None:
            channel.readers.pop(subscriber, None)
            if not channel.readers and not channel.blocks:
                del self._channels[scan_id]

    async def beat(self, every_s: float) -> None:
        """Heartbeats for ever: each subscriber that is written to has one in `every_s`, from a single timer."""
        for spoke in cycle(self._wheel):
            await asyncio.sleep(every_s / SPOKES)
            for subscriber in list(spoke):
                subscriber.beat()

    def count_behind(self) -> Counter[str]:
        """Subscribers whose transports hold more than they should, by client."""
        return Counter(one.client for one in self._subscribers if isinstance(one, Pusher) and not one.wire.is_ready)

    def statistics(self) -> HubStatistics:
        subscribers, pushed = Counter(one.transport for one in self._subscribers), self._pushed.copy()
        for subscriber in self._subscribers:
            pushed[subscriber.transport] += subscriber.pushed
        for channel in self._channels.values():
            for block in channel.blocks:
                pushed[block.framing.name] += block.pushed * len(block.members)
        return HubStatistics(dict(subscribers), dict(pushed), len(self._channels), self._flushes)
