"""How the service does against its targets: each measure is read of one set of numbers, and judged.

The severity of a measure is its ratio to its target, as the performance playbook has it: P0 above 10, P1 from 3,
P2 from 1.5.
"""

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

from app.core.settings import Settings
from app.observe.tally import Numbers


class Severity(StrEnum):
    P0 = "P0"
    P1 = "P1"
    P2 = "P2"
    HEALTHY = "healthy"


ACT_WITHIN_H = {Severity.P0: 4, Severity.P1: 24, Severity.P2: 72}
WORST_FIRST = tuple(Severity)


def judge(ratio: float) -> Severity:
    """The severity of a measure that is so many times its target."""
    if ratio > 10:
        return Severity.P0
    if ratio >= 3:
        return Severity.P1
    return Severity.P2 if ratio >= 1.5 else Severity.HEALTHY


FEW_ANSWERS, FEW_LAGS, FEW_READS, FEW_REQUESTS = 10, 5, 100, 50  # fewer say nothing
MEMORY_SHARE = 0.5  # of its window must have been seen, before a growth is one


class Measure(NamedTuple):
    """One row of the table: the setting that holds its target, and how it is read; None when there is nothing yet."""

    name: str
    target: str
    unit: str
    read: Callable[[Numbers], float | None]
    is_urgent: bool = True  # at P0 the limits tighten


def find_quantile(values: Sequence[float], share: float, few: int = 1) -> float | None:
    """The nearest rank; None of fewer than `few` values."""
    if len(values) < few:
        return None
    return sorted(values)[math.ceil(share * len(values)) - 1]


def read_growth(numbers: Numbers) -> float | None:
    """MB an hour of the server and its workers, by the least of each third: what comes and goes is no growth, and
    neither is what was taken once. What grows does so from the first third to the second, and on to the last."""
    seen = numbers.memory
    third = len(seen) // 3
    if third < 2 or seen[-1].at - seen[0].at < MEMORY_SHARE * numbers.memory_window_s:
        return None
    parts = (seen[:third], seen[third:-third], seen[-third:])
    first, middle, last = (min(one.total_bytes for one in part) for part in parts)
    hours = (parts[2][0].at - parts[0][0].at) / 3600
    return max(0.0, 2 * min(middle - first, last - middle) / 2**20 / hours)


def _read_poll_share(numbers: Numbers) -> float | None:
    polls = sum(numbers.polls.values())
    reads = polls + numbers.rise("pushed")
    return polls / reads if reads >= FEW_READS else None


def _read_refusals(numbers: Numbers) -> float | None:
    asked = numbers.answers
    return min(1.0, sum(numbers.refused.values()) / asked) if asked >= FEW_REQUESTS else None


MEASURES = (
    Measure("scan duration p95", "target_scan_s", "s", lambda n: find_quantile(n.scan_s, 0.95)),
    Measure("answer time p95", "target_answer_s", "s", lambda n: find_quantile(n.answer_s, 0.95, FEW_ANSWERS)),
    Measure("push lag p99", "target_push_lag_s", "s", lambda n: find_quantile(n.push_lag_s, 0.99, FEW_LAGS)),
    Measure("queue wait p95", "target_queue_wait_s", "s", lambda n: find_quantile(n.queue_wait_s, 0.95)),
    Measure("loop lag p99", "target_loop_lag_s", "s", lambda n: find_quantile(n.loop_lag_s, 0.99, FEW_LAGS)),
    Measure("memory growth", "target_memory_growth_mb_per_h", "MB/h", read_growth),
    # These are high because the limits hold: tightening them would make them higher.
    Measure("poll share of reads", "target_poll_share", "", _read_poll_share, is_urgent=False),
    Measure("refusal rate", "target_refusal_share", "", _read_refusals, is_urgent=False),
)


class Reading(NamedTuple):
    """A measure as it is now. Without a value there was too little to measure, which is healthy."""

    measure: str
    value: float | None
    target: float
    unit: str
    ratio: float | None
    severity: Severity
    act_within_h: int | None
    is_urgent: bool


def read_measures(numbers: Numbers, settings: Settings) -> list[Reading]:
    readings = []
    for measure in MEASURES:
        value, target = measure.read(numbers), float(getattr(settings, measure.target))
        ratio = None if value is None else value / target
        severity = judge(ratio or 0.0)
        readings.append(
            Reading(
                measure.name,
                None if value is None else round(value, 4),
                target,
                measure.unit,
                None if ratio is None else round(ratio, 2),
                severity,
                ACT_WITHIN_H.get(severity),
                measure.is_urgent,
            )
        )
    return readings
