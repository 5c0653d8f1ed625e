"""Who watches one scan: those who are level, in blocks, and those who read for themselves."""

import asyncio
from collections.abc import Callable

from app.core.event import Event
from app.push.frames import Framing
from app.push.reader import Watch
from app.push.subscriber import Pusher, Subscriber

BLOCK = 32  # pushers in a block at most


class Block:
    """Some pushers that have read one scan equally far: what is new for one is new for all.

    Where they stand is known here, and not by each of them, so that to write to one costs little more than the write.
    """

    __slots__ = ("_parted", "after", "framing", "members", "progress", "pushed")

    def __init__(
        self, framing: Framing, after: int, progress: Event | None, parted: Callable[["Block", Pusher], None]
    ) -> None:
        self.framing = framing
        self.after = after
        self.progress = progress
        self.pushed = 0  # events given to each member
        self.members: dict[Pusher, asyncio.WriteTransport] = {}
        self._parted = parted

    def join(self, pusher: Pusher) -> None:
        self.members[pusher] = pusher.wire.transport
        pusher.block = self
        pusher.pushed -= self.pushed

    def tell(self, data: bytes, count: int, after: int, progress: Event | None) -> None:
        """Writes so many events to all of them, in one go: who parts meanwhile, since that was too much, has them."""
        self.after, self.progress = after, progress
        self.pushed += count
        for transport in tuple(self.members.values()):
            if not transport.is_closing():  # behind a farewell nothing may come, and a closed one raises an error
                transport.write(data)

    def part(self, pusher: Pusher) -> None:
        """From now on it stands for itself, right here."""
        del self.members[pusher]
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
