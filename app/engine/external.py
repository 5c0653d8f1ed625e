"""Scans whose work is done elsewhere: what becomes of what their producers say."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hmac import compare_digest

from app.core.errors import Conflict, InvalidParams, JournalUnavailable, ProducerFailed, ProducerLost, TokenRequired
from app.core.estimate import estimate_rest
from app.core.event import EventType
from app.core.scan import Producer, Progress, Row, Scan, State, canonical_row, make_end
from app.core.settings import Settings, hash_key
from app.engine.said import MatchesFound, ProgressMade, Said, WorkEnded
from app.engine.worker import ROWS_PER_EVENT
from app.log.eventlog import EventLog, Part

logger = logging.getLogger(__name__)

DATA_VERSION = "external"
PHASE = "working"  # until the producer names one


@dataclass(slots=True, eq=False, kw_only=True)
class _Work:
    """An external scan that is active, with everything that is still on its way into the journal."""

    scan_id: str
    client: str
    unit: str
    started_ts: int
    producer: Producer
    recorded: Producer  # as the log has it
    heard: float  # when its producer was last heard of, on the clock of Producers
    digest: "hashlib._Hash"
    kept: int = 0  # rows
    kept_bytes: int = 0
    # The rate is measured from here: work done before a restart took its time then.
    since: float = 0.0
    done_before: int = 0
    progress: Progress | None = None  # the latest
    progress_at: float = 0.0
    ended: State | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class _Draft:
    """What a request would make of the work. Until it is accepted, nothing has happened."""

    producer: Producer
    kept: int
    kept_bytes: int
    rows: list[Row]  # new ones
    lines: list[bytes]  # what the digest is fed with
    said: ProgressMade | None = None  # the last
    phase: str | None = None
    end: WorkEnded | None = None


class Producers:
    """Every active external scan, and the one door for what their producers append.

    Between two awaits a request is checked as a whole and put on its way into the journal as one transaction, so it
    is appended whole or not at all, and requests keep the order in which they came.
    """

    def __init__(self, settings: Settings, log: EventLog, *, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._log = log
        self._clock = clock
        self._works: dict[str, _Work] = {}
        self.finished: Callable[[str], None] = lambda scan_id: None

    @property
    def active(self) -> int:
        return len(self._works)

    def count_active(self, client: str) -> int:
        return sum(work.client == client for work in self._works.values())

    async def start(self, scan: Scan) -> Scan:
        """Starts a scan that has been created in the log; gives it as committed."""
        self._works[scan.id] = self._make_work(scan)
        started = {
            "scanner": scan.scanner,
            "params": scan.params,
            "total": scan.params["total"],
            "unit": scan.params["unit"],
            "data_version": scan.data_version,
            "attempt": 1,
        }
        return await self._log.append(scan.id, (EventType.STARTED, started))

    async def take_up(self, scan: Scan) -> None:
        """After a restart: the producer may go on as if nothing had happened."""
        work = self._works[scan.id] = self._make_work(scan)
        after = 0
        while events := await self._log.read(scan.id, after):
            after = events[-1].n
            for event in events:
                for row in event.load_data()["rows"] if event.type is EventType.MATCHES else ():
                    line = canonical_row(row) + b"\n"
                    work.digest.update(line)
                    work.kept, work.kept_bytes = work.kept + 1, work.kept_bytes + len(line)
        if work.producer.done:
            done, total = work.producer.done, work.producer.total
            work.progress = Progress(done=done, total=total, unit=work.unit, phase=PHASE)
            self._publish(work)

    def _make_work(self, scan: Scan) -> _Work:
        assert scan.producer is not None
        now = self._clock()
        return _Work(
            scan_id=scan.id,
            client=scan.client,
            unit=scan.params["unit"],
            started_ts=scan.started_ts or self._log.now_ms(),
            producer=scan.producer,
            recorded=scan.producer,
            heard=now,
            digest=hashlib.sha256(),
            since=now,
            done_before=scan.producer.done,
            progress_at=now,
        )

    # What producers append

    def check_token(self, scan_id: str, token: str | None) -> None:
        """Raises TokenRequired, UnknownScan, and Conflict for a scan that the server works on itself."""
        if token is None:
            raise TokenRequired("Send the scan's `producer_token` as `Authorization: Bearer TOKEN`.")
        producer = self._log.get(scan_id).producer
        if producer is None:
            raise Conflict("The server works on this scan itself. Post events to one of the scanner `external`.")
        if not compare_digest(hash_key(token), producer.token_hash):
            raise TokenRequired("This is not the token that came with the scan when it was submitted.")

    def append(self, scan_id: str, said: Sequence[Said], number: int | None = None) -> "asyncio.Future[Scan]":
        """Gives what will be the scan with these events, once they are committed, all of them or none; without any
        they are a sign of life. Who cancels it has appended all the same.

        `number` counts the requests that have one: a repeated one is acknowledged and nothing more. Raises Conflict
        for a number that leaves a gap and for a scan that has ended, InvalidParams, and JournalUnavailable.
        """
        scan = self._log.get(scan_id)
        work = self._works.get(scan_id)
        producer = work.producer if work is not None else scan.producer
        if self._log.fault is not None:
            if work is not None:
                work.heard = self._clock()  # it is not the producer that is silent
            raise JournalUnavailable(f"{self._log.fault} Post the same again later.", retry_after_s=10)
        if number is not None and producer is not None and number != producer.seq + 1:
            if number > producer.seq:
                raise Conflict(
                    f"Producer-Seq is {number}, and the next one is {producer.seq + 1}. Post what is missing first.",
                    expected=producer.seq + 1,
                )
            if work is not None:
                work.heard = self._clock()
            settled = self._settle(scan_id)
            if work is not None:  # whoever accepted it may not have waited for the journal
                _then(settled, partial(self._publish, work))
            return settled
        if work is None or work.ended is not None:
            state = scan.state if work is None or work.ended is None else work.ended
            raise Conflict(f"The scan has ended as {state}; nothing more can come.", state=state)
        draft = self._draft(work, said)
        if number is not None:
            draft.producer = replace(draft.producer, seq=number)
        return self._accept(work, draft, is_numbered=number is not None)

    def _settle(self, scan_id: str) -> "asyncio.Future[Scan]":
        """The scan once everything that was accepted so far is committed."""
        if scan_id in self._works:
            return self._log.append_nowait(scan_id)
        return self._get_at_once(scan_id)

    def _get_at_once(self, scan_id: str) -> "asyncio.Future[Scan]":
        scan: asyncio.Future[Scan] = asyncio.get_running_loop().create_future()
        scan.set_result(self._log.get(scan_id))
        return scan

    def _draft(self, work: _Work, said: Sequence[Said]) -> _Draft:
        """Raises InvalidParams, which names what is wrong."""
        count = len(said)
        for one in said:
            if isinstance(one, MatchesFound):
                count += len(one.rows)
        if count > self._settings.max_events_per_request:
            limit = self._settings.max_events_per_request
            raise InvalidParams.of("events", f"there are {count} events and rows; send at most {limit} in one request")
        draft = _Draft(producer=work.producer, kept=work.kept, kept_bytes=work.kept_bytes, rows=[], lines=[])
        for place, one in enumerate(said):
            if draft.end is not None:
                raise InvalidParams.of(f"events.{place}", "comes after the end")
            match one:
                case ProgressMade():
                    self._draft_progress(draft, one, f"events.{place}")
                case MatchesFound():
                    self._draft_rows(draft, one.rows, f"events.{place}.rows")
                case WorkEnded():
                    if one.error is not None and one.state != "failed":
                        raise InvalidParams.of(f"events.{place}.error", "goes with the state `failed` alone")
                    draft.end = one
        return draft

    def _draft_progress(self, draft: _Draft, said: ProgressMade, field: str) -> None:
        total = draft.producer.total if said.total is None else said.total
        if said.done < draft.producer.done:
            raise InvalidParams.of(f"{field}.done", f"goes backwards: it was {draft.producer.done} before")
        if total is not None and said.done > total:
            raise InvalidParams.of(f"{field}.done", f"is above the total, which is {total}")
        draft.producer = replace(draft.producer, done=said.done, total=total)
        draft.said, draft.phase = said, said.phase or draft.phase

    def _draft_rows(self, draft: _Draft, rows: Sequence[Row], field: str) -> None:
        settings = self._settings
        dropped = draft.producer.dropped
        for place, row in enumerate(rows):
            line = canonical_row(row) + b"\n"
            if len(line) - 1 > settings.max_row_bytes:
                raise InvalidParams.of(f"{field}.{place}", f"has more than {settings.max_row_bytes} bytes")
            has_place = draft.kept < settings.max_matches and draft.kept_bytes + len(line) <= settings.max_rows_bytes
            if has_place and not dropped:  # behind one that was not kept, none is
                draft.rows.append(row)
                draft.lines.append(line)
                draft.kept, draft.kept_bytes = draft.kept + 1, draft.kept_bytes + len(line)
            else:
                dropped += 1
        if dropped:
            draft.producer = replace(draft.producer, dropped=dropped)

    def _accept(self, work: _Work, draft: _Draft, *, is_numbered: bool) -> "asyncio.Future[Scan]":
        # Progress alone is not kept, except with the number of its request; rows are, if only as a count.
        is_kept = is_numbered or bool(draft.rows) or draft.producer.dropped > work.producer.dropped
        work.heard = self._clock()
        work.producer = draft.producer
        work.kept, work.kept_bytes = draft.kept, draft.kept_bytes
        work.digest.update(b"".join(draft.lines))
        if draft.said is not None:
            self._note_progress(work, draft)
        parts: list[Part] = []
        if draft.rows:
            # A chunk is what became one event; the first of them is the second event of its scan.
            chunk = self._log.next_seq(work.scan_id) - 2
            for start in range(0, len(draft.rows), ROWS_PER_EVENT):
                parts.append((EventType.MATCHES, {"chunk": chunk, "rows": draft.rows[start : start + ROWS_PER_EVENT]}))
                chunk += 1
        if draft.end is not None:
            state = State(draft.end.state)
            error = ProducerFailed(draft.end.error or "It gave no reason.") if state is State.FAILED else None
            return self._end(work, state, error, parts)
        scan = self._append(work, *parts) if is_kept else self._get_at_once(work.scan_id)
        if draft.said is not None:
            _then(scan, partial(self._publish, work))
        return scan

    def _append(self, work: _Work, *parts: Part) -> "asyncio.Future[Scan]":
        # Of one that numbers its requests the record is always right, which a salvage of the journal can tell by.
        is_new = work.producer is not work.recorded or work.producer.seq > 0
        work.recorded = work.producer
        return self._log.append_nowait(work.scan_id, *parts, producer=work.producer if is_new else None)

    def _note_progress(self, work: _Work, draft: _Draft) -> None:
        now, before, producer = self._clock(), work.progress, draft.producer
        last_done = work.done_before if before is None else before.done
        last_rate = (producer.done - last_done) / (now - work.progress_at) if now > work.progress_at else None
        already = work.done_before
        left = None if producer.total is None else producer.total - already
        rate, eta_s = estimate_rest(producer.done - already, left, now - work.since, last_rate)
        phase = draft.phase or (PHASE if before is None else before.phase)
        work.progress_at = now
        work.progress = Progress(
            done=producer.done, total=producer.total, unit=work.unit, rate=rate, eta_s=eta_s, phase=phase
        )

    def _publish(self, work: _Work) -> None:
        """Shows the latest progress, which may be that of a later request: it never goes backwards."""
        if work.progress is not None:
            matches = self._log.get(work.scan_id).matches
            self._log.publish(work.scan_id, replace(work.progress, matches=matches))

    # Ends

    async def cancel(self, scan_id: str, by: str) -> Scan:
        """Ends a scan at once, and gives it as committed; a finished one is given as it is. Raises UnknownScan."""
        work = self._works.get(scan_id)
        if work is None or work.ended is not None:
            return await self._settle(scan_id)
        return await self._end(work, State.CANCELLED, None, [(EventType.CANCELLING, {"by": by})])

    async def lose_silent(self) -> int:
        """Ends the scans whose producers were last heard of `producer_timeout_s` ago or longer; gives their number."""
        for work in list(self._works.values()):
            self._finish(work)  # what was ended by a request that did not wait for the journal
        limit_s = self._settings.producer_timeout_s
        latest = self._clock() - limit_s
        silent = [work for work in self._works.values() if work.heard <= latest and work.ended is None]
        for work in silent:
            if work.heard <= latest and work.ended is None:  # still, after the others were ended
                error = ProducerLost(f"Its producer was not heard of for {limit_s:g} s. What it had posted is kept.")
                await self._end(work, State.LOST, error, [])
        return len(silent)

    def _end(
        self, work: _Work, state: State, error: ProducerFailed | ProducerLost | None, parts: list[Part]
    ) -> "asyncio.Future[Scan]":
        work.ended = state
        elapsed_s = max(0, self._log.now_ms() - work.started_ts) / 1000
        data = make_end(
            state,
            matches=work.kept,
            found=work.kept + work.producer.dropped,
            last_seq=self._log.next_seq(work.scan_id) + len(parts),
            digest=work.digest.hexdigest(),
            elapsed_s=elapsed_s,
            error=None if error is None else error.to_problem(),
        )
        scan = self._append(work, *parts, (EventType.END, data))
        _then(scan, partial(self._finish, work))
        return scan

    def _finish(self, work: _Work) -> None:
        """Lets go of a scan whose end is committed, once."""
        scan = self._log.find(work.scan_id)
        if scan is None or scan.end is None or self._works.pop(work.scan_id, None) is None:
            return
        self._publish(work)
        logger.info(
            "external scan %s after %.2f s, %d matches",
            scan.state,
            scan.end["elapsed_s"],
            scan.matches,
            extra={"action": "scan_ended", "scan": scan.id, "state": scan.state},
        )
        self.finished(scan.id)


def _then(committed: "asyncio.Future[Scan]", work: Callable[[], None]) -> None:
    """Does the work as soon as this is committed, ahead of whoever waits for it from now on."""

    def go_on(committed: "asyncio.Future[Scan]") -> None:
        if not committed.cancelled() and committed.exception() is None:
            work()

    if committed.done():
        go_on(committed)
    else:
        committed.add_done_callback(go_on)
