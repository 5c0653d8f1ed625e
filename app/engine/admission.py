"""Decides what may run: validates, joins what is running already, charges, and queues."""

import asyncio
import hashlib
import logging
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from difflib import get_close_matches
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, NamedTuple

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.core.errors import (
    AtCapacity,
    Conflict,
    Draining,
    Forbidden,
    InvalidParams,
    JournalUnavailable,
    PricesChanged,
    RateLimited,
    ScannerError,
    ScanwireError,
)
from app.core.scan import Producer, Scan, State, make_same_key
from app.core.settings import Settings, hash_key
from app.engine.external import DATA_VERSION, Producers
from app.engine.limits import Limits
from app.engine.run import Run
from app.engine.runner import Runner
from app.engine.said import normalise_external
from app.engine.sessions import Sessions
from app.engine.worker import ChunkJob, normalise_params
from app.log.eventlog import EventLog
from app.market.store import Chunk, Plan, Store, name_symbols, plan_chunks
from app.scanners.registry import EXTERNAL, list_scanners

logger = logging.getLogger(__name__)

MAX_KEY_CHARS = 255


class Submission(BaseModel):
    """A scan as a client asks for it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    scanner: Annotated[str, Field(max_length=100, description="name of a scanner, see GET /v1/scanners")]
    params: Annotated[dict[str, Any], Field(description="parameters of the scanner; every one has a default")] = {}
    reuse: Annotated[
        Literal["auto", "never"], Field(description="`never` forces a run of its own, though the same scan exists")
    ] = "auto"
    cancel_when_unwatched_s: Annotated[
        float | None,
        Field(gt=0, le=86_400, description="cancel when the last watcher has been gone for so many seconds"),
    ] = None

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> "Submission":
        """What a client sent. Raises InvalidParams, which says what is needed and what there is."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            words = {
                "missing": 'is needed, such as {"scanner":"gap-up"}; GET /v1/scanners lists the scanners',
                "extra_forbidden": f"is not a member of a submission; there are: {', '.join(cls.model_fields)}. "
                "What a scanner takes goes into params",
            }
            raise InvalidParams.explain(error, words) from None


class Admitted(NamedTuple):
    scan: Scan
    joined: bool  # an earlier scan that answers the same question
    producer_token: str | None = None  # of an external scan; only its hash is kept


class _Remembered(NamedTuple):
    scan_id: str
    body_hash: str
    at: float


class Admission:
    """The one door through which scans come in; all checks and all places taken between two awaits."""

    def __init__(
        self,
        settings: Settings,
        log: EventLog,
        runner: Runner,
        producers: Producers,
        limits: Limits,
        sessions: Sessions,
        store: Store,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._log = log
        self._runner = runner
        self._producers = producers
        self._limits = limits
        self._sessions = sessions
        self._store = store
        self._clock = clock
        # Most scans are over all symbols; with thousands of these, planning takes milliseconds.
        self._plan_whole = lru_cache(maxsize=8)(partial(plan_chunks, store, None))
        self._same: dict[str, str] = {}  # same_key -> the scan that answers it
        self._remembered: OrderedDict[tuple[str, str], _Remembered] = OrderedDict()
        self._endings: set[asyncio.Task[None]] = set()  # of scans that a restart found, not committed yet
        self.is_draining = False
        self.is_emergency = False
        self.back_s = settings.drain_s  # while it drains: when scans are likely to be taken again

    async def submit(
        self, client: str, asked: Submission, idempotency_key: str | None = None, *, is_charged: bool = False
    ) -> Admitted:
        """The scan that answers this, accepted and committed. Raises what refuses it; then nothing was taken.

        With `is_charged` the caller has charged a bucket for it, and no other is.
        """
        try:
            body = orjson.dumps(asked.model_dump(), option=orjson.OPT_SORT_KEYS)
        except TypeError:  # orjson reads deeper than it writes
            raise InvalidParams.of("params", "is nested too deeply; no parameter is a tree") from None
        body_hash = hashlib.sha256(body).hexdigest()
        if idempotency_key is not None:
            if not 0 < len(idempotency_key) <= MAX_KEY_CHARS:
                raise InvalidParams.of("Idempotency-Key", f"must have 1 to {MAX_KEY_CHARS} characters")
            if (earlier := self._recall(client, idempotency_key, body_hash)) is not None:
                return Admitted(await self._accept(self._log.accept(earlier)), True)
        idempotency = None if idempotency_key is None else (idempotency_key, body_hash)
        if asked.scanner == EXTERNAL:
            return await self._submit_external(client, asked, idempotency)

        params = normalise_params(asked.scanner, asked.params)
        plan = self._plan(params, self._settings.chunk_rows)
        same_key = make_same_key(asked.scanner, params, self._store.data_version)
        joined = None if asked.reuse == "never" else self._find_same(same_key)
        if joined is None:
            scan = Scan(
                id="s_" + secrets.token_urlsafe(16),
                scanner=asked.scanner,
                params=params,
                client=client,
                created_ts=self._log.now_ms(),
                data_version=self._store.data_version,
                same_key=same_key,
                cost_rows=plan.rows,
                chunk_rows=self._settings.chunk_rows,
                idempotency=idempotency,
                cancel_when_unwatched_s=asked.cancel_when_unwatched_s,
            )
            self._take_place(client, plan.rows, is_charged)
            self._log.create(scan)
            self._sessions.expect(scan.id)
            if asked.reuse == "auto" or self._find_same(same_key) is None:
                self._same[same_key] = scan.id
            self._runner.submit(self._make_run(scan, plan.chunks))
        scan_id = joined or scan.id
        self._remember(client, idempotency, scan_id, self._clock())
        return Admitted(await self._accept(self._log.accept(scan_id)), joined is not None)

    async def _accept(self, committed: Awaitable[Scan]) -> Scan:
        try:
            async with asyncio.timeout(self._settings.commit_wait_s):
                return await committed
        except TimeoutError:
            raise JournalUnavailable(
                "The journal cannot be written just now, so it is not sure that the scan is kept. Submit it again: "
                "with the same Idempotency-Key it will not run twice.",
                retry_after_s=10,
            ) from None

    async def _submit_external(self, client: str, asked: Submission, idempotency: tuple[str, str] | None) -> Admitted:
        """A scan of its own, always: what its producer will post is not known, so it equals no other."""
        params = normalise_external(asked.params)
        token = secrets.token_urlsafe(32)
        scan = Scan(
            id="s_" + secrets.token_urlsafe(16),
            scanner=EXTERNAL,
            params=params,
            client=client,
            created_ts=self._log.now_ms(),
            data_version=DATA_VERSION,
            same_key="",
            cost_rows=0,
            chunk_rows=0,
            idempotency=idempotency,
            cancel_when_unwatched_s=asked.cancel_when_unwatched_s,
            producer=Producer(token_hash=hash_key(token), total=params["total"]),
        )
        self._take_place(client, None)
        self._log.create(scan)
        self._sessions.expect(scan.id)
        self._remember(client, idempotency, scan.id, self._clock())
        return Admitted(await self._accept(self._producers.start(scan)), False, token)

    async def cancel(self, client: str, scan_id: str) -> Scan:
        """Raises UnknownScan, and Forbidden for a scan that another client submitted."""
        if self._log.get(scan_id).client != client:
            raise Forbidden("Only the client that submitted a scan may cancel it. You can stop watching it.")
        try:
            async with asyncio.timeout(self._settings.commit_wait_s):
                return await self.stop(scan_id, "client")
        except TimeoutError:
            raise JournalUnavailable(
                "The journal cannot be written just now. The scan is cancelled as soon as it can.", retry_after_s=10
            ) from None

    async def stop(self, scan_id: str, by: str) -> Scan:
        """Cancels a scan, whoever works on it; gives it as committed then. Raises UnknownScan."""
        is_external = self._log.get(scan_id).producer is not None
        return await (self._producers if is_external else self._runner).cancel(scan_id, by)

    def _take_place(self, client: str, cost_rows: int | None, is_charged: bool = False) -> None:
        """Raises the first limit that stands in the way; what was charged before it is given back.

        An external scan, which reads no rows at all (None), takes no slot and no place in the queue.
        """
        settings, runner, producers = self._settings, self._runner, self._producers
        if self.is_draining:
            raise Draining("This server is stopping. Submit again in a moment.", retry_after_s=self.back_s)
        if self._log.fault is not None:
            raise JournalUnavailable(f"{self._log.fault} No scan is accepted meanwhile.", retry_after_s=10)
        if self.is_emergency and cost_rows is not None and cost_rows > settings.heavy_rows:
            raise AtCapacity(
                f"The server is in an emergency and takes no heavy scan: this one reads {cost_rows:,} rows, and "
                f"{settings.heavy_rows:,} may be read. Ask for fewer symbols, or submit it again later.",
                retry_after_s=settings.emergency_calm_s,
                limit="emergency",
            )
        if cost_rows is None and producers.active >= settings.max_external:
            raise AtCapacity(
                f"{producers.active} external scans are active, which is all this server takes. "
                "Submit again when one has ended.",
                retry_after_s=settings.producer_timeout_s,
                limit="max_external",
            )
        if cost_rows is not None and runner.active >= settings.max_running + settings.max_queued:
            raise AtCapacity(
                f"{settings.max_running} scans are running and {settings.max_queued} are waiting, which is all this "
                "server takes. Submit again when one has ended.",
                retry_after_s=runner.estimate_free_s(),
                limit="max_queued",
            )
        if runner.count_active(client) + producers.count_active(client) >= settings.max_active_per_client:
            raise RateLimited(
                f"You have {settings.max_active_per_client} scans queued or running, which is all one client may. "
                "Wait for one to end, or cancel one.",
                retry_after_s=runner.estimate_free_s(),
                limit="max_active_per_client",
            )
        if is_charged:
            return
        self._limits.charge("submit", client)
        if cost_rows is not None and cost_rows > settings.heavy_rows:
            try:
                self._limits.charge("submit-heavy", client)
            except RateLimited:
                self._limits.refund("submit", client)
                raise

    def _plan(self, params: Mapping[str, Any], chunk_rows: int) -> Plan:
        symbols = params.get("symbols")
        if symbols is None:
            return self._plan_whole(chunk_rows)
        plan = plan_chunks(self._store, symbols, chunk_rows)
        if plan.missing:
            near = self._find_near(plan.missing[0])
            raise InvalidParams.of(
                "symbols",
                f"{', '.join(plan.missing[:5])}{' and more' if len(plan.missing) > 5 else ''}: not in the price data"
                + (f"; did you mean {', '.join(near)}?" if near else f"; there are {name_symbols(self._store)}"),
            )
        return plan

    def _find_near(self, symbol: str) -> list[str]:
        """Up to three symbols that look like this one; among those with the same first letter, for speed."""
        alike = (entry.symbol for entry in self._store.symbols if entry.symbol[0] == symbol[0])
        return get_close_matches(symbol, [other for other in alike if abs(len(other) - len(symbol)) < 2], 3)

    def _make_run(self, scan: Scan, chunks: tuple[Chunk, ...]) -> Run:
        return Run(
            scan_id=scan.id,
            client=scan.client,
            cost_rows=scan.cost_rows,
            attempt=scan.attempt + 1,
            data_version=scan.data_version,
            job=ChunkJob(
                path=self._store.path,
                stamp=self._store.stamp,
                slices=(),
                scanner=scan.scanner,
                params=dict(scan.params),
                max_rows=self._settings.max_matches,
            ),
            chunks=chunks,
        )

    # Single-flight and Idempotency-Key

    def _find_same(self, same_key: str) -> str | None:
        """The scan that is queued, running or lately completed for this key."""
        scan_id = self._same.get(same_key)
        if scan_id is None or not self._log.knows(scan_id):
            return None
        scan = self._log.find(scan_id)
        if scan is None or scan.state in (State.QUEUED, State.RUNNING):
            return scan_id
        is_fresh = self._log.now_ms() - (scan.finished_ts or 0) <= self._settings.reuse_s * 1000
        return scan_id if scan.state is State.COMPLETED and is_fresh and not scan.is_trimmed else None

    def _recall(self, client: str, key: str, body_hash: str) -> str | None:
        earlier = self._remembered.get((client, key))
        if earlier is None or not self._log.knows(earlier.scan_id):
            return None
        if earlier.body_hash != body_hash:
            raise Conflict("This Idempotency-Key came with another body before. Use a new key for a new request.")
        return earlier.scan_id

    def _remember(self, client: str, idempotency: tuple[str, str] | None, scan_id: str, at: float) -> None:
        if idempotency is None:
            return
        key, body_hash = idempotency
        self._remembered[client, key] = _Remembered(scan_id, body_hash, at)
        while len(self._remembered) > self._settings.max_idempotency_keys:
            self._remembered.popitem(last=False)

    def reap(self) -> int:
        """Forgets idempotency keys that are old enough, and what is left of scans that are gone; gives the number of
        keys."""
        oldest = self._clock() - self._settings.idempotency_s
        old = [name for name, entry in self._remembered.items() if entry.at <= oldest]
        for name in old:
            del self._remembered[name]
        for key in [key for key, scan_id in self._same.items() if not self._log.knows(scan_id)]:
            del self._same[key]
        return len(old)

    # After a restart

    async def take_up(self) -> None:
        """Takes up what the journal holds: finished scans can be joined, unfinished ones go on or come to an end."""
        self._plan_whole(self._settings.chunk_rows)  # now, rather than in the first request
        list_scanners()
        now, now_ms = self._clock(), self._log.now_ms()
        endings = []
        for scan in reversed(list(self._log.list_scans())):
            self._remember(scan.client, scan.idempotency, scan.id, now - (now_ms - scan.created_ts) / 1000)
            is_joinable = scan.state is State.COMPLETED or not scan.state.is_terminal
            if scan.producer is None and (is_joinable or self._find_same(scan.same_key) is None):
                self._same[scan.same_key] = scan.id
            if not scan.state.is_terminal:
                endings.append(asyncio.create_task(self._take_up_unfinished(scan)))
        if endings:
            # A journal that cannot be written holds up what these scans come to, not the start.
            done, self._endings = await asyncio.wait(endings, timeout=self._settings.commit_wait_s)
            for ending in done:
                ending.result()

    async def _take_up_unfinished(self, scan: Scan) -> None:
        if scan.producer is not None:
            self._sessions.expect(scan.id)
            await self._producers.take_up(scan)
            return
        state = State.LOST
        error: ScanwireError | None = None
        chunks: tuple[Chunk, ...] = ()
        if scan.state is State.CANCELLING:
            state = State.CANCELLED
        elif scan.data_version != self._store.data_version:
            error = PricesChanged(
                "The server was restarted with other prices while this scan was under way. Submit it again."
            )
        else:
            try:
                chunks = self._plan(normalise_params(scan.scanner, scan.params), scan.chunk_rows).chunks
            except InvalidParams as refusal:
                error = ScannerError(f"After a restart the scan cannot go on: {refusal.detail}")
        run = self._make_run(scan, chunks)
        if chunks:
            logger.info("scan goes on", extra={"action": "scan_resumed", "scan": scan.id})
            self._sessions.expect(scan.id)
            self._runner.submit(run)
        else:
            await self._runner.give_up(run, state, error)
