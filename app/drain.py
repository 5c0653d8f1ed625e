"""The orderly stop, begun by a signal: nobody is cut off without a word, and nothing that was accepted is lost.

No new scan is taken, running scans get to their next checkpoint, and each stream is ended with a `bye` that says when
to come back. Only then the signal is handed on to the server, which closes its socket and ends the lifespan; it would
otherwise close every WebSocket in the same instant, and wait for ever for all other streams.

Until the next process has started there is nobody to come back to. So streams leave one after another, none before it
must, and come back in the same way after the last has left. A take-over is another matter: the successor has
everything ready and waits for the lock. Streams go on until the scans are at their checkpoints, then all end at once
and are told to come back within a second; by then the successor has the port, and those who come before it has the
journal wait in its backlog rather than being refused.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from app.core.settings import Settings
from app.engine.admission import Admission
from app.engine.runner import Runner
from app.log.lock import StateLock
from app.push.hub import Hub

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STREAMS_PER_S = 200  # that are ended; fewer streams than that for each second of `drain_s` are done sooner
BACK_S = 1.0  # at the least, over which those who were sent away come back
ENDING_S = 0.5  # that the process takes to end when everybody has left, about
TAKEOVER_BACK_S = (0.2, 1.0)  # first and last, when a successor waits
LAST_S = 0.5  # beyond `drain_s`, for answers that are under way


class Drain:
    """Takes SIGTERM and SIGINT ahead of the server; a SIGINT that comes while it drains stops at once."""

    def __init__(self, settings: Settings, lock: StateLock, admission: Admission, runner: Runner, hub: Hub) -> None:
        self._drain_s = settings.drain_s
        self._lock = lock
        self._admission = admission
        self._runner = runner
        self._hub = hub
        self._previous: dict[int, Any] = {}  # handlers, by signal
        self._draining: asyncio.Task[None] | None = None
        self._breaking: asyncio.Task[None] | None = None
        self._hurried = asyncio.Event()
        self._is_handed_on = False

    @contextlib.contextmanager
    def at_signals(self) -> Iterator[None]:
        """While the block runs, signals begin the drain."""
        loop = asyncio.get_running_loop()

        def take(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._take, number)

        try:
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, take)
        except ValueError:  # not the main thread: whoever runs the server there stops it in another way
            self._previous.clear()
        try:
            yield
        finally:
            for restored, earlier in self._previous.items():
                signal.signal(restored, earlier)

    def _take(self, number: int) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain(number))
        elif number == signal.SIGINT:
            self._hurried.set()
            if self._is_handed_on and self._breaking is None:
                self._breaking = asyncio.create_task(self._break_off())

    async def _drain(self, number: int) -> None:
        ends = time.monotonic() + self._drain_s
        is_wanted = self._lock.is_wanted()
        streams = sum(self._hub.statistics().subscribers.values())
        over_s = 0.0 if is_wanted else min(max(self._drain_s - ENDING_S, 0), streams / STREAMS_PER_S)
        back_s = (ENDING_S, min(self._drain_s, max(over_s + ENDING_S, BACK_S)))
        first_s, last_s = TAKEOVER_BACK_S if is_wanted else back_s
        fields = {"streams": streams, "running": self._runner.statistics().running, "is_takeover": is_wanted}
        logger.info("draining", extra={"action": "draining", **fields})
        self._admission.is_draining = True
        if is_wanted:
            self._admission.back_s = last_s
        resting = asyncio.create_task(self._runner.drain())
        hurried = asyncio.create_task(self._hurried.wait())

        async def wait(work: asyncio.Task[None], until: float) -> None:
            timeout_s = max(until - time.monotonic(), 0)
            await asyncio.wait((work, hurried), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)

        # What is found until then is pushed yet. A chunk that takes longer is cut off with the process, and done again.
        await wait(resting, ends - ENDING_S - over_s)
        parting = asyncio.create_task(self._hub.parting.say_in_turn(over_s, first_s, last_s))
        await wait(parting, ends)
        for task in (resting, parting, hurried):
            task.cancel()
        for result in await asyncio.gather(resting, parting, return_exceptions=True):
            if isinstance(result, Exception):
                logger.error("the drain is cut short", exc_info=result, extra={"action": "drain_failed"})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_S / 2):
                await self._hub.parting.say_in_turn(0, first_s, last_s)  # whoever is still here
        self._hand_on(number, max(ends - time.monotonic(), 0) + LAST_S)

    def _hand_on(self, number: int, within_s: float) -> None:
        """Lets the server stop, as it would have at once without us."""
        self._is_handed_on = True
        earlier = self._previous.get(number)
        server = _find_server(earlier)
        if server is not None:
            logging.getLogger("uvicorn.error").addFilter(_is_news)
            given_s = server.config.timeout_graceful_shutdown  # without one, it waits for any open request for ever
            within_s = LAST_S if self._hurried.is_set() else within_s
            server.config.timeout_graceful_shutdown = min(within_s, given_s or within_s)  # type: ignore[assignment]
        if callable(earlier):
            earlier(number, None)
        elif earlier is signal.SIG_DFL:
            signal.signal(number, earlier)
            signal.raise_signal(number)

    async def _break_off(self) -> None:
        """Ends what the server still waits for; so it comes to the end of the lifespan, and the journal is closed."""
        server = _find_server(self._previous.get(signal.SIGINT))
        if server is None:
            return
        tasks = list(server.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_S / 2)  # first: they cannot write to a transport that is gone
        for connection in list(server.server_state.connections):
            connection.transport.abort()


def _find_server(handler: Any) -> uvicorn.Server | None:
    server = getattr(handler, "__self__", None)
    return server if isinstance(server, uvicorn.Server) else None


def _is_news(record: logging.LogRecord) -> bool:
    """That a request was under way when everything ended is told in one line already, without a stack for each."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
