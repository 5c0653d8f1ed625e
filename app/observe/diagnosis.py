"""What is wrong with the service just now, how bad it is, why, and what helps: pure rules over one set of numbers.

The severity of a measure is its ratio to its target, as the performance playbook has it: P0 above 10, P1 from 3,
P2 from 1.5.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, NamedTuple

from app.core.settings import Settings
from app.observe.tally import OTHERS, Numbers


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


# Measures

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


def _read_growth(numbers: Numbers) -> float | None:
    """MB an hour, by the least of each end: what comes and goes is no growth."""
    seen = numbers.memory_bytes
    third = len(seen) // 3
    if third < 2 or seen[-1][0] - seen[0][0] < MEMORY_SHARE * numbers.memory_window_s:
        return None
    first, last = seen[:third], seen[-third:]
    hours = (last[0][0] - first[0][0]) / 3600
    return max(0.0, (min(size for _, size in last) - min(size for _, size in first)) / 2**20 / hours)


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
    Measure("memory growth", "target_memory_growth_mb_per_h", "MB/h", _read_growth),
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


# Causes


class Kind(StrEnum):
    """The three classes of causes that the playbook tells apart."""

    RESOURCES = "resource contention"
    API = "API behaviour"
    LOGIC = "application logic"


@dataclass(frozen=True, slots=True)
class Cause:
    """Something that makes the service slow or costly: what was seen, who, and the cure."""

    name: str
    kind: Kind
    evidence: str
    cure: str
    clients: Mapping[str, int]  # hashed, with their counts


def _top(counts: Mapping[str, int], least: int = 1) -> dict[str, int]:
    """The five who did it most."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return {client: count for client, count in ordered[:5] if count >= least and client != OTHERS}


def find_aggressive_polling(numbers: Numbers, settings: Settings) -> Cause | None:
    early = {
        client: count
        for client, count in numbers.early.items()
        if client != OTHERS and count >= settings.early_polls_max and count > numbers.polls.get(client, 0) / 2
    }
    if not early:
        return None
    total, every = sum(early.values()), max(sum(numbers.polls.values()), 1)
    busy_s = sum(numbers.answer_s) * total / max(len(numbers.answer_s), 1)
    return Cause(
        "aggressive polling",
        Kind.API,
        f"{len(early)} client{'s' * (len(early) != 1)} polled {total:,} times before the time they were told, "
        f"{total / every:.0%} of all polls; answering took {busy_s:,.2f} s",
        "Wait for `poll_after_s` of each answer, or be pushed: follow the scan's `events` link.",
        _top(early),
    )


def find_saturation(numbers: Numbers, settings: Settings) -> Cause | None:
    states = numbers.states
    full = [state for state in states if state.running >= state.slots and state.queued]
    if len(states) < 3 or len(full) < 0.9 * len(states):
        return None
    return Cause(
        "saturated concurrency",
        Kind.RESOURCES,
        f"all {states[-1].slots} slots were taken and up to {max(state.queued for state in full)} scans waited, "
        f"in {len(full)} of {len(states)} looks",
        "Raise SCANWIRE_MAX_RUNNING where cores are idle, ask for fewer symbols or days, or add an instance.",
        {},
    )


def find_missing_limits(numbers: Numbers, settings: Settings) -> Cause | None:
    """A client that reads a lot, below a limit that it never meets."""
    usual = float(Settings.model_fields["read_per_s"].default)
    most = _top(numbers.polls, least=int(10 * usual * numbers.window_s))
    if not most or numbers.read_per_s <= 10 * usual or numbers.refused.get("read"):
        return None
    return Cause(
        "missing limits",
        Kind.API,
        f"a client polled {max(most.values()) / numbers.window_s:,.0f} times a second; the read limit lets in "
        f"{numbers.read_per_s:,.0f} and was never hit",
        f"Set SCANWIRE_READ_PER_S to what a client needs; {usual:g} is the default.",
        most,
    )


def find_memory_growth(numbers: Numbers, settings: Settings) -> Cause | None:
    growth = _read_growth(numbers)
    if growth is None or growth < 1.5 * settings.target_memory_growth_mb_per_h:
        return None
    (began, first), (ended, last) = numbers.memory_bytes[0], numbers.memory_bytes[-1]
    return Cause(
        "memory growing",
        Kind.LOGIC,
        f"from {first / 2**20:,.0f} to {last / 2**20:,.0f} MB in {ended - began:,.0f} s: {growth:,.0f} MB/h",
        "Look at what is kept (/v1/operations): lower SCANWIRE_LOG_MEMORY_BYTES, SCANWIRE_RETENTION_S or "
        "SCANWIRE_MAX_SCANS_KEPT. If that does not stop it, something leaks.",
        {},
    )


def find_reconnect_storm(numbers: Numbers, settings: Settings) -> Cause | None:
    connects = sum(numbers.connects.values())
    most_open = max((state.streams for state in numbers.states), default=0)
    if connects < settings.storm_connects_min or connects < 5 * max(most_open, 1):
        return None
    return Cause(
        "reconnect storm",
        Kind.API,
        f"streams were opened {connects:,} times, and no more than {most_open:,} were open at a time",
        "Keep a stream open, and come back after `retry`, `retry_after_s` or `reconnect_ms` with some randomness. "
        "A proxy that closes idle streams needs a longer timeout than SCANWIRE_HEARTBEAT_S.",
        _top(numbers.connects),
    )


def find_slow_consumers(numbers: Numbers, settings: Settings) -> Cause | None:
    behind = [state.behind for state in numbers.states[-3:]]
    if len(behind) < 3 or not all(behind):
        return None
    return Cause(
        "slow consumers",
        Kind.RESOURCES,
        f"{behind[-1]:,} of {numbers.states[-1].streams:,} streams are behind, for {len(behind)} looks at least",
        f"They are cut off after {settings.stall_s:g} s and catch up when they come back. Read faster, watch fewer "
        "scans on one stream, or look at the network between.",
        {},
    )


def find_slow_chunks(numbers: Numbers, settings: Settings) -> Cause | None:
    slow = {
        scanner: p95
        for scanner, times in numbers.chunk_s.items()
        if (p95 := find_quantile(times, 0.95)) is not None and p95 > settings.target_chunk_s
    }
    if not slow:
        return None
    told = ", ".join(f"{scanner} {p95:,.1f} s" for scanner, p95 in sorted(slow.items(), key=lambda item: -item[1]))
    return Cause(
        "chunks over their budget",
        Kind.LOGIC,
        f"p95 of the time of one chunk: {told}; the budget is {settings.target_chunk_s:g} s",
        "Progress and cancelling come chunk by chunk: lower SCANWIRE_CHUNK_ROWS, or make the scanner faster.",
        {},
    )


def find_blocked_loop(numbers: Numbers, settings: Settings) -> Cause | None:
    blocks = numbers.rise("blocks")
    lag_s = find_quantile(numbers.loop_lag_s, 0.99, FEW_LAGS)
    if not blocks and (lag_s is None or lag_s < 1.5 * settings.target_loop_lag_s):
        return None
    return Cause(
        "blocked event loop",
        Kind.LOGIC if blocks else Kind.RESOURCES,
        f"it was found blocked {blocks:,} times, and late by up to {max(numbers.loop_lag_s, default=0):,.2f} s",
        "The log has the stack of what blocked it (action=loop_blocked): that work belongs into a worker process. "
        "Where nothing blocks it, other processes take the CPU: end them, or give the service cores of its own.",
        {},
    )


def find_busy_cpu(numbers: Numbers, settings: Settings) -> Cause | None:
    if len(numbers.states) < 3:
        return None
    span_s = sum(later - earlier for (earlier, _), (later, _) in pairwise(numbers.memory_bytes[-len(numbers.states) :]))
    busy = (numbers.states[-1].cpu_s - numbers.states[0].cpu_s) / max(span_s, 1e-9)
    if busy < 0.9:
        return None
    return Cause(
        "CPU of the server process",
        Kind.RESOURCES,
        f"the process took {busy:.0%} of a core over {span_s:,.0f} s, and it has one event loop",
        "Let clients be pushed instead of polling, widen SCANWIRE_BATCH_MS, or share the clients among instances.",
        {},
    )


RULES: tuple[Callable[[Numbers, Settings], Cause | None], ...] = (
    find_aggressive_polling,
    find_saturation,
    find_missing_limits,
    find_memory_growth,
    find_reconnect_storm,
    find_slow_consumers,
    find_slow_chunks,
    find_blocked_loop,
    find_busy_cpu,
)


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
