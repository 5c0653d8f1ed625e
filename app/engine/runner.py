"""Runs what was admitted: slots, the queue, chunks in worker processes, and exactly one end for every scan."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any, NamedTuple, Self

import orjson

from app.core.errors import (
    DeadlineExceeded,
    JournalUnavailable,
    ScannerError,
    ScanwireError,
    WrongState,
)
from app.core.estimate import Range, estimate_rest, estimate_starts
from app.core.event import EventType
from app.core.scan import Progress, Rows, Scan, State, make_end, pack_rows
from app.core.settings import Settings
from app.engine.pool import Pool
from app.engine.run import Run
from app.engine.worker import ChunkResult
from app.log.eventlog import EventLog
from app.log.journal import Checkpoint

logger = logging.getLogger(__name__)

# Price rows a second that a scan is thought to read before one was measured: slow and fast machines.
_FIRST_GUESS = (300_000.0, 5_000_000.0)


class RunnerStatistics(NamedTuple):
    running: int
    queued: int
    slots: int
    workers_busy: int
    worker_crashes: int


class Runner:
    """One task group holds a task for each running scan, never more than `max_running`.

    The task catches whatever its scan does wrong and writes the end, so no scan disturbs another. Use it as an
    async context manager; leaving it stops all work where it is, and the next start goes on from the checkpoints.
    """

    def __init__(self, settings: Settings, log: EventLog, *, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._log = log
        self._clock = clock
        self._queue: deque[Run] = deque()
        self._running: dict[str, Run] = {}
        self._is_stopping = False
        self._group = asyncio.TaskGroup()
        self.pool = Pool(
            settings.workers, memory_mb=settings.worker_memory_mb, chunk_deadline_s=settings.chunk_deadline_s
        )
        self._chores: set[asyncio.Task[None]] = set()
        self._runs: set[asyncio.Task[None]] = set()  # those that have a slot, and those that write their end
        self.rows_per_s: float | None = None  # price rows read, over the latest scans
        self.note_chunk: Callable[[str, float], None] = lambda scanner, seconds: None
        self.finished: Callable[[str], None] = lambda scan_id: None

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._is_stopping = True
        # What they appended becomes durable all the same, if the journal can be written.
        for task in [*self._chores, *self._runs]:
            task.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        try:
            await self._group.__aexit__(*error)
        finally:
            await self.pool.close()

    async def drain(self) -> None:
        """Returns when each running scan has come to its next checkpoint, from which the next start goes on.

        From now on nothing begins: no scan, no chunk.
        """
        self._is_stopping = True
        while self._runs:
            await asyncio.wait(self._runs)

    def _do(self, chore: Coroutine[Any, Any, None]) -> None:
        """Runs something beside the scans that nobody waits for; what goes wrong in it ends nothing else."""
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._note_chore)

    def _note_chore(self, task: asyncio.Task[None]) -> None:
        self._chores.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a chore failed", exc_info=error, extra={"action": "chore_failed"})

    # The queue

    @property
    def active(self) -> int:
        return len(self._queue) + len(self._running)

    def count_active(self, client: str) -> int:
        """Scans of this client that are queued or running."""
        return sum(run.client == client for run in (*self._queue, *self._running.values()))

    def submit(self, run: Run) -> None:
        """Queues a run whose scan has been created in the log. It starts once its first event is committed."""
        self._queue.append(run)
        self._do(self._accept(run))

    async def _accept(self, run: Run) -> None:
        starts = self._estimate_starts()
        run.position = self._queue.index(run) + 1
        try:
            await self._append_queued(run, starts[run.position - 1])
        except JournalUnavailable:
            return
        run.is_accepted = True
        self._fill_slots()

    async def _append_queued(self, run: Run, eta_s: Range) -> None:
        await self._log.append(run.scan_id, (EventType.QUEUED, {"position": run.position, "eta_s": eta_s}))

    def _fill_slots(self) -> None:
        if self._is_stopping:
            return
        while self._queue and self._queue[0].is_accepted and len(self._running) < self._settings.max_running:
            run = self._queue.popleft()
            self._running[run.scan_id] = run
            run.task = self._group.create_task(self._run(run))
            self._runs.add(run.task)
            run.task.add_done_callback(self._runs.discard)
        if any(run.is_accepted and run.position != place for place, run in enumerate(self._queue, 1)):
            self._do(self._tell_positions())

    async def _tell_positions(self) -> None:
        for run in list(self._queue):
            # What was true before the last await may not be any more.
            if run in self._queue and run.is_accepted:
                position = self._queue.index(run) + 1
                if position != run.position:
                    run.position = position
                    with contextlib.suppress(JournalUnavailable):
                        await self._append_queued(run, self._estimate_starts()[position - 1])

    def _estimate_starts(self) -> list[Range]:
        running = [run.rest_s or self._guess_duration(run) for run in self._running.values()]
        return estimate_starts(running, [self._guess_duration(run) for run in self._queue], self._settings.max_running)

    def _guess_duration(self, run: Run) -> Range:
        if self.rows_per_s is None:
            slow, fast = _FIRST_GUESS
        else:
            slow, fast = self.rows_per_s / 2, self.rows_per_s * 1.5
        return run.cost_rows / fast, run.cost_rows / slow

    def estimate_change(self, scan: Scan) -> Range | None:
        """Seconds until the scan is expected to start or to end, whichever is next; None for a finished one."""
        run = self._running.get(scan.id)
        if run is not None:
            return run.rest_s or self._guess_duration(run)
        for queued, start in zip(self._queue, self._estimate_starts(), strict=True):
            if queued.scan_id == scan.id:
                return start
        return None

    def estimate_free_s(self) -> float:
        """Seconds until a place is likely to be free: when the first running scan may have ended."""
        rests = [run.rest_s or self._guess_duration(run) for run in self._running.values()]
        return min(max(1.0, min((rest[1] for rest in rests), default=1.0)), 60.0)

    # Ending early

    async def cancel(self, scan_id: str, by: str) -> Scan:
        """Ends a scan and gives it as committed then; a finished one is given as it is. Found matches are kept.

        Raises UnknownScan.
        """
        scan = self._log.get(scan_id)
        queued = next((run for run in self._queue if run.scan_id == scan_id), None)
        if queued is not None:
            self._queue.remove(queued)
            queued.cancelled_by = by
            await self._end(queued, State.CANCELLED)
            self._fill_slots()
        elif (run := self._running.get(scan_id)) is not None and run.cancelled_by is None:
            run.cancelled_by = by
            try:
                with contextlib.suppress(WrongState):  # it has not started yet, or came to its end in this very moment
                    await self._log.append(scan_id, (EventType.CANCELLING, {"by": by}))
            finally:
                # One that has not taken its first step gives its slot back by itself: it looks at `cancelled_by`.
                if run.task is not None and run.started is not None and scan_id in self._running:
                    run.task.cancel()
        elif scan.state.is_terminal:
            return scan
        elif self._is_stopping and run is None:
            with contextlib.suppress(WrongState):  # it is being cancelled already
                await self._log.append(scan_id, (EventType.CANCELLING, {"by": by}))  # and the next start ends it
        return self._log.get(scan_id)

    async def give_up(self, run: Run, state: State, error: ScanwireError | None) -> None:
        """Ends a scan that was never queued here: a restart found it, and it cannot go on."""
        await self._end(run, state, error)

    def overdue(self) -> list[str]:
        """Running scans that are far past their deadline: what should have ended them did not."""
        latest = self._clock() - 2 * self._settings.scan_deadline_s
        return [run.scan_id for run in self._running.values() if run.started is not None and run.started < latest]

    # Running

    async def _run(self, run: Run) -> None:
        state = State.COMPLETED
        error: ScanwireError | None = None
        try:
            async with asyncio.timeout(self._settings.scan_deadline_s):
                await self._work(run)
        except asyncio.CancelledError:
            if run.cancelled_by is None:
                raise  # the service stops; the next start goes on with this scan
            state = State.CANCELLED
        except TimeoutError:
            limit = f"{self._settings.scan_deadline_s:g}"
            detail = f"The scan was ended after {limit} s, its deadline. Ask for fewer symbols or days."
            state, error = State.FAILED, DeadlineExceeded(detail)
        except JournalUnavailable:
            return  # the log is closed; the next start goes on with this scan
        except ScanwireError as failure:
            state, error = State.FAILED, failure
        except Exception:
            logger.exception("scan failed", extra={"action": "scan_failed", "scan": run.scan_id})
            state, error = State.FAILED, ScannerError("The scan failed inside Scanwire; its log says why.")
        finally:
            self._running.pop(run.scan_id, None)
        try:
            await self._end(run, state, error)
        finally:
            self._fill_slots()

    async def _end(self, run: Run, state: State, error: ScanwireError | None = None) -> None:
        await self._take_up(run)  # one that a restart found may come to its end without another run
        elapsed_s = self._measure_elapsed(run)
        # One that a restart took up read a part of its rows only, and has been waiting.
        if state is State.COMPLETED and run.attempt == 1 and elapsed_s > 0:
            rate = run.cost_rows / elapsed_s
            self.rows_per_s = rate if self.rows_per_s is None else 0.7 * self.rows_per_s + 0.3 * rate
        skipped = [{"symbol": symbol, "reason": "; ".join(reasons)} for symbol, reasons in run.skipped.items()]
        data = make_end(
            state,
            matches=run.kept,
            found=run.found,
            last_seq=self._log.next_seq(run.scan_id),
            digest=run.digest.hexdigest(),
            elapsed_s=elapsed_s,
            skipped=skipped[: self._settings.max_skipped],
            skipped_symbols=len(skipped),
            error=None if error is None else error.to_problem(),
        )
        with contextlib.suppress(WrongState, JournalUnavailable, TimeoutError):
            async with asyncio.timeout(self._settings.commit_wait_s if self._is_stopping else None):
                await self._log.append(run.scan_id, (EventType.END, data))
        fields = {"action": "scan_ended", "scan": run.scan_id, "state": state}
        logger.info("scan %s after %.2f s, %d matches", state, elapsed_s, run.kept, extra=fields)
        self.finished(run.scan_id)

    def _measure_elapsed(self, run: Run) -> float:
        """Seconds since the scan first started, over restarts of the service too; 0 for one that never did."""
        if run.attempt > 1 and (started_ts := self._log.get(run.scan_id).started_ts) is not None:
            return max(0.0, (self._log.now_ms() - started_ts) / 1000)
        return 0.0 if run.started is None else self._clock() - run.started

    async def _work(self, run: Run) -> None:
        run.started = self._clock()
        total = sum(chunk.symbols for chunk in run.chunks)
        done_before = await self._take_up(run)
        if run.cancelled_by is not None:
            raise asyncio.CancelledError
        await self._log.append(
            run.scan_id,
            (
                EventType.STARTED,
                {
                    "scanner": run.job.scanner,
                    "params": run.job.params,
                    "total": total,
                    "unit": "symbols",
                    "data_version": run.data_version,
                    "attempt": run.attempt,
                },
            ),
        )
        done = already = sum(run.chunks[index].symbols for index in done_before)
        last_done, last_time = done, run.started
        todo = [index for index in range(len(run.chunks)) if index not in done_before]
        async for index, result in self._chunks(run, todo):
            await self._keep(run, index, result)
            done += run.chunks[index].symbols
            now = self._clock()
            last_rate = (done - last_done) / (now - last_time) if now > last_time else None
            rate, run.rest_s = estimate_rest(done - already, total - already, now - run.started, last_rate)
            last_done, last_time = done, now
            self._log.publish(
                run.scan_id,
                Progress(done=done, total=total, unit="symbols", rate=rate, eta_s=run.rest_s, matches=run.kept),
            )

    async def _take_up(self, run: Run) -> set[int]:
        """The chunks that an earlier attempt finished. What these found is put into `run`, once."""
        if run.attempt == 1:
            return set()
        checkpoints = await self._log.read_checkpoints(run.scan_id)
        found: list[Rows] = []
        after = 0
        while not run.is_counted and (events := await self._log.read(run.scan_id, after)):
            after = events[-1].n
            for event in events:
                if event.type is EventType.MATCHES:
                    found.append(pack_rows(event.load_data()["rows"]))
                    await asyncio.sleep(0)  # a few milliseconds' work each; others on the loop have their turn
        if not run.is_counted:
            run.is_counted = True
            for rows in found:
                run.note_kept(rows)
            for checkpoint in checkpoints:
                run.note_skipped(checkpoint.skipped)
                run.found += checkpoint.found
        return {checkpoint.chunk for checkpoint in checkpoints}

    async def _chunks(self, run: Run, todo: list[int]) -> AsyncIterator[tuple[int, ChunkResult]]:
        """Results in the order of chunks, with as many at work as there are workers.

        The limiter serves in order of asking, so chunks of concurrent scans take turns.
        """
        ahead: deque[tuple[int, asyncio.Task[ChunkResult]]] = deque()
        left = deque(todo)
        try:
            while left or ahead:
                while left and len(ahead) <= self._settings.workers and not self._is_stopping:
                    index = left.popleft()
                    ahead.append((index, asyncio.create_task(self._find_in(run, index))))
                if not ahead:
                    raise asyncio.CancelledError  # the service stops; the next start goes on with the chunks left
                index, task = ahead[0]
                result = await task
                ahead.popleft()
                yield index, result
        finally:
            for _, task in ahead:
                task.cancel()
            await asyncio.gather(*(task for _, task in ahead), return_exceptions=True)

    async def _find_in(self, run: Run, index: int) -> ChunkResult:
        result = await self.pool.run_chunk(replace(run.job, slices=run.chunks[index].slices), run.scan_id, index)
        self.note_chunk(run.job.scanner, result.took_s)
        return result

    async def _keep(self, run: Run, index: int, result: ChunkResult) -> None:
        parts = []
        run.found += result.found
        for part in result.parts:
            room = self._settings.max_matches - run.kept
            if part.count > room:
                part = pack_rows(orjson.loads(part.json)[:room])
            if part.count:
                run.note_kept(part)
                parts.append((EventType.MATCHES, {"chunk": index, "rows": part}))
        run.note_skipped(result.skipped)
        checkpoint = Checkpoint(chunk=index, found=result.found, skipped=tuple(result.skipped))
        await self._log.append(run.scan_id, *parts, checkpoint=checkpoint)

    def statistics(self) -> RunnerStatistics:
        return RunnerStatistics(
            running=len(self._running),
            queued=len(self._queue),
            slots=self._settings.max_running,
            workers_busy=self.pool.busy,
            worker_crashes=self.pool.crashes,
        )
