"""Looks at the service from time to time, and acts on what it sees: incidents are told, in an emergency limits tighten.

What it tells is kept for a while, for those who follow /v1/operations/events; each is a log record too.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson

from app.core.settings import Settings
from app.engine.admission import Admission
from app.engine.limits import Limits
from app.engine.sessions import Sessions
from app.observe.diagnosis import Diagnosis, diagnose
from app.observe.incidents import Emergency, Incident, Incidents
from app.observe.measures import Severity
from app.observe.tally import Tally

logger = logging.getLogger(__name__)

STOP_S = 1.0  # within which those who follow learn that the server stops
Told = dict[str, Any]  # an event of operations: id, type, ts, data


class Lookout:
    """One for a service. `now_ms` is the time of the log, `clock` is monotonic, in seconds."""

    def __init__(
        self,
        settings: Settings,
        tally: Tally,
        limits: Limits,
        sessions: Sessions,
        admission: Admission,
        *,
        now_ms: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._tally = tally
        self._limits = limits
        self._sessions = sessions
        self._admission = admission
        self._now_ms = now_ms
        self._clock = clock
        self._incidents = Incidents(settings.incident_resolve_s)
        self._emergency = Emergency(settings.emergency_calm_s)
        self._kept: deque[Told] = deque(maxlen=settings.max_operations_events)
        self._last_id = 0
        self._news = asyncio.Event()
        self.changes: Counter[str] = Counter()  # of incidents, since the start
        self.tell: Callable[[Told], None] = lambda told: None  # who wants to know beside those who follow

    # Looking

    async def run(self) -> None:
        """Looks for ever. One look that goes wrong is logged, and the next one comes all the same."""
        while True:
            await asyncio.sleep(self._settings.diagnose_every_s)
            try:
                self.look()
            except Exception:
                logger.exception("the diagnosis failed", extra={"action": "diagnosis_failed"})

    def diagnose(self) -> Diagnosis:
        """As of now."""
        return diagnose(self._tally.read(), self._settings)

    def look(self) -> None:
        self._tally.sample()
        now, diagnosis = self._clock(), self.diagnose()
        for change, incident in self._incidents.step(now, diagnosis):
            self.changes[change] += 1
            self._tell("incident", {"change": change, **self._describe(incident)})
        if self._emergency.step(now, diagnosis):
            self._apply("diagnosis")

    def _describe(self, incident: Incident) -> dict[str, Any]:
        return {
            "subject": incident.subject,
            "severity": incident.severity,
            "since_ts": self._to_ts(incident.since),
            "evidence": incident.evidence,
        }

    def _to_ts(self, at: float) -> int:
        return self._now_ms() - int((self._clock() - at) * 1000)

    def report(self) -> dict[str, Any]:
        """The diagnosis, what is open of incidents, and whether there is an emergency."""
        told = self.diagnose().to_json()
        for cause in told["causes"]:
            cause["since_ts"] = self._to_ts(self._incidents.find_since(cause["name"], self._clock()))
        return {
            "ts": self._now_ms(),
            "window_s": self._settings.diagnosis_window_s,
            **told,
            "incidents": [self._describe(incident) for incident in self._incidents.open],
            "emergency": self.describe_emergency(),
        }

    def count_open(self) -> Counter[Severity]:
        return Counter(incident.severity for incident in self._incidents.open)

    # Emergency

    @property
    def is_emergency(self) -> bool:
        return self._emergency.since is not None

    def describe_emergency(self) -> dict[str, Any]:
        since = self._emergency.since
        return {
            "is_on": since is not None,
            "since_ts": None if since is None else self._to_ts(since),
            "reason": self._emergency.reason,
        }

    def declare_emergency(self, reason: str) -> None:
        """By hand; it is lifted by itself as any other."""
        if self._emergency.declare(self._clock(), reason):
            self._apply("operator")

    def lift_emergency(self) -> None:
        if self._emergency.lift():
            self._apply("operator")

    def _apply(self, by: str) -> None:
        """Streams that are open are not touched: they are what costs least."""
        settings, is_on = self._settings, self.is_emergency
        tight = settings.model_copy(
            update={
                "submit_per_min": min(settings.emergency_submit_per_min, settings.submit_per_min),
                "read_per_s": min(settings.emergency_read_per_s, settings.read_per_s),
                "read_burst": min(settings.emergency_read_burst, settings.read_burst),
            }
        )
        self._limits.tighten(tight if is_on else None)
        self._sessions.hint_factor = settings.emergency_hint_factor if is_on else 1.0
        self._admission.is_emergency = is_on
        self._tell("emergency", {**self.describe_emergency(), "by": by})

    # Telling

    def _tell(self, kind: str, data: dict[str, Any]) -> None:
        self._last_id += 1
        told: Told = {"id": str(self._last_id), "type": kind, "ts": self._now_ms(), "data": data}
        self._kept.append(told)
        logger.warning("%s: %s", kind, ", ".join(f"{name} {value}" for name, value in data.items()),
                       extra={"action": kind})  # fmt: skip
        self._news.set()
        self._news = asyncio.Event()
        self.tell(told)

    async def follow(self, after: int, heartbeat_s: float) -> AsyncGenerator[Told | None, None]:
        """What is told behind that id, as it comes; None where there is nothing for a heartbeat. Ends with the server.

        An id that is from another life of the server gets all that is kept.
        """
        after = after if after <= self._last_id else 0
        quiet_since = self._clock()
        while not self._admission.is_draining:
            news = self._news
            for told in [told for told in self._kept if int(told["id"]) > after]:
                after = int(told["id"])
                yield told
            try:
                async with asyncio.timeout(min(STOP_S, heartbeat_s)):
                    await news.wait()
            except TimeoutError:
                if self._clock() - quiet_since >= heartbeat_s:
                    quiet_since = self._clock()
                    yield None


def frame_told(told: Told | None) -> bytes:
    """As a server-sent event."""
    if told is None:
        return b": hb\n\n"
    return b"event: %b\nid: %b\ndata: %b\n\n" % (told["type"].encode(), told["id"].encode(), orjson.dumps(told))
