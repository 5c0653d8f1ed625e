"""Sends subscribers away with a `bye`, each with a moment of its own at which to come back."""

import asyncio
import random
import time
from collections.abc import Callable
from typing import NamedTuple

from app.core.event import EventType, make_event
from app.push.subscriber import Subscriber

_SLICE = 32  # subscribers that are sent away in one turn of the loop


class _Return(NamedTuple):
    """When those who are sent away may come back."""

    ends: float  # on the monotonic clock: until then streams are ended here, and nobody else answers
    first_s: float  # from there, for the first
    last_s: float  # from the end of a stream, for the last


class Parting:
    """The farewell of a service that stops, for its subscribers and for whoever still comes."""

    def __init__(self, subscribers: set[Subscriber], now_ms: Callable[[], int]) -> None:
        self._subscribers = subscribers
        self._now_ms = now_ms
        self._return: _Return | None = None  # None while the service goes on
        self._emptied = asyncio.Event()  # the last subscriber has left

    def note_connected(self, subscriber: Subscriber) -> None:
        if self._return is not None:
            self._say_bye(subscriber, self._return)

    def note_left(self) -> None:
        if not self._subscribers:
            self._emptied.set()

    def say_at_once(self, spread_ms: int) -> None:
        """Sends everybody away, now and from now on, to come back within `spread_ms`, but not all at once."""
        self._return = _Return(time.monotonic(), 0, spread_ms / 1000)
        for subscriber in list(self._subscribers):
            self._say_bye(subscriber, self._return)

    async def say_in_turn(self, over_s: float, first_s: float, last_s: float) -> None:
        """Ends every stream within `over_s`, evenly one after another, and returns when all have left.

        Each is told to come back at a moment of its own, no later than `last_s` after its end, but not before
        `first_s` have passed since the last one was ended: until then there is nobody to come back to. Who comes from
        now on is told so at once.
        """
        began = time.monotonic()
        back = self._return = _Return(began + over_s, first_s, last_s)
        leaving = list(self._subscribers)
        random.shuffle(leaving)
        for place, subscriber in enumerate(leaving):
            wait_s = began + over_s * place / len(leaving) - time.monotonic()
            if wait_s > 0 or place % _SLICE == 0:
                await asyncio.sleep(max(wait_s, 0))
            if subscriber in self._subscribers:
                self._say_bye(subscriber, back)
        while self._subscribers:
            self._emptied.clear()
            await self._emptied.wait()

    def _say_bye(self, subscriber: Subscriber, back: _Return) -> None:
        if subscriber.is_leaving:
            return
        subscriber.is_leaving = True
        first_s = max(back.ends - time.monotonic(), 0) + back.first_s
        wait_ms = int(1000 * random.uniform(first_s, max(first_s, back.last_s)))
        subscriber.close(make_event(EventType.BYE, "", 0, {"reconnect_ms": wait_ms}, self._now_ms()))
