"""Takes back what nobody needs any more, on one timer."""

import asyncio
import logging
from collections import Counter

from app.core.scan import Scan, State
from app.core.settings import Settings
from app.engine.admission import Admission
from app.engine.external import Producers
from app.engine.limits import Limits
from app.engine.runner import Runner
from app.engine.sessions import Sessions
from app.log.eventlog import EventLog

KINDS = ("trimmed", "removed", "unwatched", "lost", "overdue", "sessions", "buckets", "idempotency_keys")
logger = logging.getLogger(__name__)


class Reaper:
    """What it reaped is logged, and counted in `reaped` by kind, of KINDS.

    trimmed       events and matches of scans past `retention_s`, or beyond `max_scans_kept`
    removed       scans past `retention_s + tombstone_s`, or beyond `max_scans_kept`
    unwatched     scans nobody has watched for too long: queued ones, and running ones that asked for it
    lost          external scans whose producers were silent for `producer_timeout_s`
    overdue       running scans that outlived their deadline
    sessions, buckets, idempotency_keys
    """

    def __init__(
        self,
        settings: Settings,
        log: EventLog,
        runner: Runner,
        producers: Producers,
        admission: Admission,
        sessions: Sessions,
        limits: Limits,
    ) -> None:
        self._settings = settings
        self._log = log
        self._runner = runner
        self._producers = producers
        self._admission = admission
        self._sessions = sessions
        self._limits = limits
        self.reaped: Counter[str] = Counter()

    async def run(self) -> None:
        """Reaps for ever. One round that goes wrong is logged, and the next one comes all the same."""
        while True:
            await asyncio.sleep(self._settings.reap_every_s)
            try:
                # The journal may stop taking writes at any moment; what is not done now is done in the next round.
                async with asyncio.timeout(self._settings.commit_wait_s):
                    await self.reap()
            except TimeoutError:
                logger.warning("reaper waits for the journal", extra={"action": "reaper_waits"})
            except Exception:
                logger.exception("reaper failed", extra={"action": "reaper_failed"})

    async def reap(self) -> Counter[str]:
        """One round; gives what was reaped in it."""
        taken: Counter[str] = Counter()
        for scan in list(self._log.list_scans()):
            if scan.state.is_terminal:
                self._sessions.forget(scan.id)
            elif self._is_unwatched(scan):
                await self._admission.stop(scan.id, "reaper: nobody is watching")
                taken["unwatched"] += 1
        for scan_id in self._runner.overdue():
            await self._runner.cancel(scan_id, "reaper: overdue")
            taken["overdue"] += 1
        if self._log.fault is None:
            taken["lost"] += await self._producers.lose_silent()
            await self._reap_finished(taken)
        taken["sessions"] += self._sessions.reap()
        taken["buckets"] += self._limits.reap()
        taken["idempotency_keys"] += self._admission.reap()
        taken = +taken
        if taken:
            self.reaped += taken
            logger.info("reaped %s", dict(taken), extra={"action": "reaped", **taken})
        return taken

    def _is_unwatched(self, scan: Scan) -> bool:
        if self._admission.is_draining:
            return False  # its watchers were sent away
        unwatched_s = self._sessions.unwatched_s(scan.id)
        limit = scan.cancel_when_unwatched_s
        if scan.state is State.QUEUED:
            limit = min(limit or self._settings.queued_unwatched_s, self._settings.queued_unwatched_s)
        return limit is not None and scan.state is not State.CANCELLING and unwatched_s >= limit

    async def _reap_finished(self, taken: Counter[str]) -> None:
        now_ms, settings = self._log.now_ms(), self._settings
        finished = [scan for scan in self._log.list_scans() if scan.state.is_terminal]
        for place, scan in enumerate(finished):
            age_s = (now_ms - (scan.finished_ts or 0)) / 1000
            if place >= settings.max_scans_kept or age_s >= settings.retention_s + settings.tombstone_s:
                await self._log.remove(scan.id)
                taken["removed"] += 1
            elif age_s >= settings.retention_s and not scan.is_trimmed:
                await self._log.trim(scan.id)
                taken["trimmed"] += 1
