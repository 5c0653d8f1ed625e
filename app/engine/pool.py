"""The worker processes: what runs in them cannot hold up the event loop, and can be killed."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any

from anyio import BrokenWorkerProcess, CapacityLimiter, to_process

from app.core.errors import WorkerCrashed
from app.engine.worker import ChunkJob, ChunkResult, run_chunk, warm_up

logger = logging.getLogger(__name__)


class Pool:
    """At most `size` calls at a time, in order of asking, each in a process of its own."""

    def __init__(self, size: int) -> None:
        self._size = size
        # Each is one of `size`: more threads inside would only fight for the same cores.
        os.environ.setdefault("POLARS_MAX_THREADS", "1")
        self._calls = CapacityLimiter(size)
        self._processes = CapacityLimiter(size * 2)  # those that are starting are counted as well
        self.crashes = 0  # processes that died on a chunk

    @property
    def busy(self) -> int:
        return self._calls.borrowed_tokens

    async def warm_up(self) -> None:
        """Starts all processes, so that the next call need not wait for one to load its libraries."""
        await asyncio.gather(*(self.call(warm_up) for _ in range(self._size)))

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function in a worker process. Cancelling the caller kills that process.

        Raises BrokenWorkerProcess when the process dies.
        """
        async with self._calls:
            for _ in range(self._size * 2):
                with contextlib.suppress(BrokenWorkerProcess):  # it had died before: not this caller's fault
                    # anyio forgets a process that is cancelled while it starts; so it is let to start, and kept.
                    await asyncio.shield(to_process.run_sync(os.getpid, limiter=self._processes))
                    break
            try:
                return await to_process.run_sync(function, *args, cancellable=True, limiter=self._processes)
            except (KeyboardInterrupt, SystemExit) as leaving:  # the worker's, sent on to here
                raise BrokenWorkerProcess from leaving

    async def run_chunk(self, job: ChunkJob, scan_id: str, index: int) -> ChunkResult:
        """The matches of a chunk, which is tried again once when the process dies. Raises WorkerCrashed, and what
        the scanner raises."""
        for is_last_try in (False, True):
            try:
                result: ChunkResult = await self.call(run_chunk, job)
                return result
            except BrokenWorkerProcess:
                self.crashes += 1
                logger.warning("worker died on chunk %d", index, extra={"action": "worker_died", "scan": scan_id})
                if is_last_try:
                    raise WorkerCrashed(
                        f"The worker process died on chunk {index} and died again when the chunk was retried. "
                        "Out of memory, or a fault in the scanner: ask for fewer symbols, or look at the server's log."
                    ) from None
        raise AssertionError("unreachable")
