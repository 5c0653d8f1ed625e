"""The worker processes: what runs in them cannot hold up the event loop, and can be killed."""

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

from anyio import CapacityLimiter

from app.core.errors import WorkerCrashed
from app.engine.process import WorkerDied, WorkerProcess
from app.engine.worker import ChunkJob, ChunkResult, run_chunk, warm_up

LOAD_WITHIN_S = 60.0  # a process that is not ready by then is broken

logger = logging.getLogger(__name__)


class Pool:
    """At most `size` calls at a time, in order of asking, each in a process of its own.

    `memory_mb` bounds each process, and `chunk_deadline_s` the time of one chunk in it.
    """

    def __init__(self, size: int, *, memory_mb: int = 0, chunk_deadline_s: float = 60) -> None:
        self._size = size
        self._memory_mb = memory_mb
        self._chunk_deadline_s = chunk_deadline_s
        # Each is one of `size`: more threads inside would only fight for the same cores.
        os.environ.setdefault("POLARS_MAX_THREADS", "1")
        self._calls = CapacityLimiter(size)
        self._alive: set[WorkerProcess] = set()
        self._idle: list[WorkerProcess] = []
        self.crashes = 0  # processes that died on a chunk

    @property
    def busy(self) -> int:
        return self._calls.borrowed_tokens

    @property
    def pids(self) -> list[int]:
        """The processes that live."""
        return [worker.pid for worker in self._alive]

    async def warm_up(self) -> None:
        """Starts all processes, so that the next call need not wait for one to load its libraries."""
        await asyncio.gather(*(self.call(os.getpid) for _ in range(self._size)))

    async def close(self) -> None:
        """No process is left when this returns. No call may be running."""
        for worker in (alive := list(self._alive)):
            worker.kill()
        await asyncio.gather(*(worker.ended.wait() for worker in alive))

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function in a worker process. Cancelling the caller kills that process.

        Raises WorkerCrashed when the process dies, and what the function raises.
        """
        try:
            return await self._call(function, *args)
        except WorkerDied as death:
            logger.warning("a worker died: it %s", death.reason, extra={"action": "worker_died", "said": death.said})
            raise WorkerCrashed(f"The worker process {death.reason}.") from None

    async def run_chunk(self, job: ChunkJob, scan_id: str, index: int) -> ChunkResult:
        """The matches of a chunk, which is tried again once, in a fresh process, when the process dies or hangs.

        Raises WorkerCrashed, and what the scanner raises.
        """
        deaths: list[str] = []
        while len(deaths) < 2:
            try:
                result: ChunkResult = await self._call(
                    run_chunk, job, deadline_s=self._chunk_deadline_s, is_fresh=bool(deaths)
                )
                return result
            except WorkerDied as death:
                self.crashes += 1
                deaths.append(death.reason)
                fields = {"action": "worker_died", "scan": scan_id, "said": death.said}
                logger.warning("worker died on chunk %d: it %s", index, death.reason, extra=fields)
        raise WorkerCrashed(
            f"The worker process {deaths[0]} on chunk {index}, and the fresh one that tried it again {deaths[1]}. "
            "Ask for fewer symbols, or look at the server's log."
        )

    async def _call(
        self, function: Callable[..., Any], *args: Any, deadline_s: float | None = None, is_fresh: bool = False
    ) -> Any:
        async with self._calls:
            while True:
                was_idle = bool(self._idle) and not is_fresh
                worker = self._idle.pop() if was_idle else await WorkerProcess.start(self._memory_mb, self._alive)
                try:
                    if not was_idle:  # what it takes to load the libraries is not the chunk's time
                        await self._ask(worker, LOAD_WITHIN_S, warm_up)
                    return await self._ask(worker, deadline_s, function, *args)
                except WorkerDied:
                    if worker.has_taken or not was_idle:
                        raise
                    # It had died before: not this caller's fault.
                finally:
                    # A fresh one that was started beside idle ones is one too many.
                    if worker.is_free and len(self._idle) + self.busy <= self._size:
                        self._idle.append(worker)
                    else:
                        worker.kill()

    async def _ask(self, worker: WorkerProcess, deadline_s: float | None, *call: Any) -> Any:
        try:
            async with asyncio.timeout(deadline_s) as deadline:
                return await worker.call(*call)
        except TimeoutError:
            if not deadline.expired():
                raise  # the function's own
            raise WorkerDied(f"did not return within {deadline_s:g} s, its deadline, and was killed") from None
