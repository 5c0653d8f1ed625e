"""What is wrong with the service just now, how bad it is, why, and what helps: pure rules over one set of numbers."""

from typing import Any, NamedTuple

from app.core.settings import Settings
from app.observe.causes import RULES, Cause
from app.observe.measures import WORST_FIRST, Reading, Severity, read_measures
from app.observe.tally import Numbers


class Diagnosis(NamedTuple):
    severity: Severity  # the worst of all measures
    readings: list[Reading]
    causes: list[Cause]

    def to_json(self) -> dict[str, Any]:
        return {
            "severity": self.severity,
            "measures": [reading._asdict() for reading in self.readings],
            "causes": [
                {
                    "name": cause.name,
                    "kind": cause.kind,
                    "evidence": cause.evidence,
                    "cure": cause.cure,
                    "clients": cause.clients,
                }
                for cause in self.causes
            ],
        }


def diagnose(numbers: Numbers, settings: Settings) -> Diagnosis:
    """The same for the same numbers."""
    readings = read_measures(numbers, settings)
    causes = [cause for rule in RULES if (cause := rule(numbers, settings)) is not None]
    severity = min((reading.severity for reading in readings), key=WORST_FIRST.index)
    return Diagnosis(severity, readings, causes)
