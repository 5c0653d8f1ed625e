"""Who watches one scan: those who are level, in blocks, and those who read for themselves."""

import asyncio
from array import array
from collections.abc import Callable
from operator import call

from app.core.event import Event
from app.push.frames import Framing
from app.push.reader import Watch
from app.push.ring import Ring, find_fd
from app.push.subscriber import Pusher, Subscriber

BLOCK = 512  # pushers in a block at most
RING_MIN = 16  # writes; what a ring costs by itself is saved by so many


class Block:
    """Some pushers that have read one scan equally far: what is new for one is new for all.

    Where they stand is known here, and not by each of them, so that to write to one costs little more than the write.
    """

    __slots__ = ("_parted", "_ringed", "_transports", "after", "framing", "members", "progress", "pushed")

    def __init__(
        self, framing: Framing, after: int, progress: Event | None, parted: Callable[["Block", Pusher], None]
    ) -> None:
        self.framing = framing
        self.after = after
        self.progress = progress
        self.pushed = 0  # events given to each member
        self.members: set[Pusher] = set()
        self._parted = parted
        # Of the members, once they are written to.
        self._transports: tuple[asyncio.WriteTransport, ...] | None = None
        self._ringed: tuple[array[int], list[Callable[[], bool]]] | None = None  # their files, and `is_closing`

    def join(self, pusher: Pusher) -> None:
        self.members.add(pusher)
        self._transports = self._ringed = None
        pusher.block = self
        pusher.pushed -= self.pushed
        transport = pusher.wire.transport
        if find_fd(transport) >= 0:
            transport.set_write_buffer_limits(high=0)  # one that holds anything parts, so that nothing is overtaken

    def tell(self, data: bytes, count: int, after: int, progress: Event | None, ring: Ring | None) -> None:
        """Writes so many events to all of them, in one go: who parts meanwhile, since that was too much, has them.

        Not to those that are closing: behind a farewell nothing may come. With a ring it takes one system call.
        """
        self.after, self.progress = after, progress
        self.pushed += count
        transports = self._transports or self._find_transports(ring)
        if ring is None or self._ringed is None or any(map(call, self._ringed[1])):
            for transport in transports:
                if not transport.is_closing():
                    transport.write(data)
            return
        taken = ring.send(self._ringed[0], data)
        if taken.count(len(data)) < len(taken):
            for transport, size in zip(transports, taken, strict=True):
                if size < len(data):
                    transport.write(data[max(size, 0) :])

    def _find_transports(self, ring: Ring | None) -> tuple[asyncio.WriteTransport, ...]:
        self._transports = transports = tuple(pusher.wire.transport for pusher in self.members)
        if ring is not None and len(transports) >= RING_MIN:
            fds = [find_fd(transport) for transport in transports]
            if min(fds) >= 0:
                self._ringed = array("I", fds), [transport.is_closing for transport in transports]
        return transports

    def part(self, pusher: Pusher) -> None:
        """From now on it stands for itself, right here."""
        self.members.remove(pusher)
        self._transports = self._ringed = None
        pusher.block = None
        pusher.pushed += self.pushed
        (watch,) = pusher.watches.values()
        watch.after, watch.progress = self.after, self.progress
        self._parted(self, pusher)


class Channel:
    """A watched scan: who watches it, and what those that are level with it were told."""

    __slots__ = ("after", "blocks", "progress", "readers")

    def __init__(self, after: int, progress: Event | None) -> None:
        self.after = after
        self.progress = progress
        self.blocks: list[Block] = []  # those that are level
        self.readers: dict[Subscriber, None] = {}  # the others, who read for themselves

    def join(self, pusher: Pusher) -> None:
        """From now on this one, which is level, stands in a block."""
        block = next((block for block in reversed(self.blocks) if block.framing is pusher.framing), None)
        if block is None or len(block.members) >= BLOCK or not self.is_level(block):
            block = Block(pusher.framing, self.after, self.progress, self._part)
            self.blocks.append(block)
        del self.readers[pusher]
        block.join(pusher)

    def is_level(self, one: Block | Watch) -> bool:
        return one.after == self.after and one.progress is self.progress

    def _part(self, block: Block, pusher: Pusher) -> None:
        self.readers[pusher] = None
        if not block.members:
            self.blocks.remove(block)
