"""Incidents: what goes wrong is told when it begins, when it gets worse and when it is over, and not in between.

Pure: the time is handed in.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from app.observe.diagnosis import Diagnosis
from app.observe.measures import WORST_FIRST, Severity


class Change(StrEnum):
    OPENED = "opened"
    ESCALATED = "escalated"
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True)
class Incident:
    subject: str  # a measure or a cause
    severity: Severity  # the worst so far
    since: float  # when it was first seen
    seen: float  # when it was last seen
    is_open: bool  # from the second look in a row on: one bad look is none
    evidence: str


class Told(NamedTuple):
    change: Change
    incident: Incident


class Incidents:
    """What is open. One that has not been seen for `resolve_s` is over; until then it goes on, however it flickers."""

    def __init__(self, resolve_s: float) -> None:
        self._resolve_s = resolve_s
        self._known: dict[str, Incident] = {}

    @property
    def open(self) -> list[Incident]:
        return [incident for incident in self._known.values() if incident.is_open]

    def find_since(self, subject: str, now: float) -> float:
        """When a look first saw it; `now` when none has yet."""
        known = self._known.get(subject)
        return now if known is None else known.since

    def step(self, now: float, diagnosis: Diagnosis) -> list[Told]:
        """Takes in one look, and gives what is news."""
        seen = _list_subjects(diagnosis)
        told: list[Told] = []
        for subject, (severity, evidence) in seen.items():
            known = self._known.get(subject)
            if known is None:
                self._known[subject] = Incident(subject, severity, now, now, False, evidence)
                continue
            is_worse = WORST_FIRST.index(severity) < WORST_FIRST.index(known.severity)
            worst = severity if is_worse or not known.is_open else known.severity
            incident = replace(known, severity=worst, seen=now, is_open=True, evidence=evidence)
            self._known[subject] = incident
            if not known.is_open:
                told.append(Told(Change.OPENED, incident))
            elif is_worse:
                told.append(Told(Change.ESCALATED, incident))
        for subject, incident in list(self._known.items()):
            if subject in seen:
                continue
            if not incident.is_open:
                del self._known[subject]  # one bad look
            elif now - incident.seen >= self._resolve_s:
                del self._known[subject]
                told.append(Told(Change.RESOLVED, incident))
        return told


def _list_subjects(diagnosis: Diagnosis) -> dict[str, tuple[Severity, str]]:
    """What is not healthy. A cause is as bad as the worst measure, and P2 at the least."""
    found: dict[str, tuple[Severity, str]] = {
        reading.measure: (
            reading.severity,
            f"{reading.value:g} {reading.unit} is {reading.ratio:g} times its target".replace("  ", " "),
        )
        for reading in diagnosis.readings
        if reading.severity is not Severity.HEALTHY
    }
    worst = Severity.P2 if diagnosis.severity is Severity.HEALTHY else diagnosis.severity
    return found | {cause.name: (worst, cause.evidence) for cause in diagnosis.causes}


class Emergency:
    """On from P0 of an urgent measure, or by hand; off when nothing urgent was P1 or worse for `calm_s`."""

    def __init__(self, calm_s: float) -> None:
        self._calm_s = calm_s
        self._bad_at = 0.0
        self.since: float | None = None
        self.reason = ""

    def declare(self, now: float, reason: str) -> bool:
        """Whether that is news."""
        is_news = self.since is None
        self._bad_at = now
        if is_news:
            self.since, self.reason = now, reason
        return is_news

    def lift(self) -> bool:
        is_news, self.since, self.reason = self.since is not None, None, ""
        return is_news

    def step(self, now: float, diagnosis: Diagnosis) -> bool:
        """Whether it began or ended with this look."""
        urgent = [reading for reading in diagnosis.readings if reading.is_urgent]
        critical = [reading.measure for reading in urgent if reading.severity is Severity.P0]
        if critical:
            return self.declare(now, f"P0: {', '.join(critical)}")
        if self.since is None:
            return False
        if any(reading.severity is Severity.P1 for reading in urgent):
            self._bad_at = now
        return now - self._bad_at >= self._calm_s and self.lift()
