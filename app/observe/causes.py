"""Why the service is slow or costly, and what helps: one rule for each cause that the playbook tells apart."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

from app.core.settings import PREFIX, Settings
from app.observe.measures import FEW_LAGS, Severity, find_quantile, read_growth, read_measures
from app.observe.tally import OTHERS, Numbers


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


class Limit(NamedTuple):
    """One limit: its name as refusals have it, the setting, what it counts, and how often that was seen, by client.

    A limit that is for all clients counts under no name.
    """

    name: str
    setting: str
    what: str
    read: Callable[[Numbers], Mapping[str, int]]
    allow: Callable[[Settings, float], float]  # how much it lets in, within so many seconds


def _charged(name: str) -> Callable[[Numbers], Mapping[str, int]]:
    return lambda numbers: numbers.charged.get(name, {})


def _peak(name: str) -> Callable[[Numbers], Mapping[str, int]]:
    return lambda numbers: {"": max((getattr(state, name) for state in numbers.states), default=0)}


def _count_most_streams(numbers: Numbers) -> dict[str, int]:
    found: dict[str, int] = {}
    for state in numbers.states:
        for client, count in state.most_streams.items():
            found[client] = max(count, found.get(client, 0))
    return found


LIMITS = (
    Limit("read", "read_per_s", "polls", lambda n: n.polls, lambda s, t: s.read_burst + s.read_per_s * t),
    Limit("submit", "submit_per_min", "submissions", _charged("submit"), lambda s, t: s.submit_per_min * (1 + t / 60)),
    Limit(
        "submit-heavy",
        "submit_heavy_per_hour",
        "heavy submissions",
        _charged("submit-heavy"),
        lambda s, t: s.submit_heavy_per_hour * (1 + t / 3600),
    ),
    Limit(
        "connect",
        "connect_per_s",
        "connects",
        _charged("connect"),
        lambda s, t: s.connect_burst + s.connect_per_s * t,
    ),
    Limit(
        "message",
        "message_per_s",
        "messages",
        _charged("message"),
        lambda s, t: s.message_burst + s.message_per_s * t,
    ),
    Limit(
        "legacy-execute",
        "legacy_execute_per_min",
        "old submissions",
        _charged("legacy-execute"),
        lambda s, t: s.legacy_execute_per_min * (1 + t / 60),
    ),
    Limit(
        "streams", "max_streams_per_client", "open streams", _count_most_streams, lambda s, t: s.max_streams_per_client
    ),
    Limit("streams-in-all", "max_streams", "open streams in all", _peak("streams"), lambda s, t: s.max_streams),
    Limit("slots", "max_running", "scans at a time", _peak("running"), lambda s, t: s.max_running),
    Limit("queue", "max_queued", "scans that wait", _peak("queued"), lambda s, t: s.max_queued),
)
# What a client needs: as the defaults are, whatever the environment says; and as many scans as there are cores.
USUAL = Settings.model_construct(max_running=max(2, os.cpu_count() or 2))
FAR = 10  # so many times as much as usual is too much, also while nothing suffers


def find_missing_limits(numbers: Numbers, settings: Settings) -> Cause | None:
    """Limits so wide that they are none: what was let in would have met the usual one, and never met this.

    While the service suffers that is a cause; while it does not, only what is far beyond the usual.
    """
    used = list(_list_unmet(numbers, settings))
    sick: list[str] = []
    if used:
        readings = read_measures(numbers, settings)
        sick = [one.measure for one in readings if one.is_urgent and one.severity is not Severity.HEALTHY]
    wide = [(limit, most) for limit, most, ratio in used if sick or ratio > FAR]
    if not wide:
        return None
    told = [
        f"{most:,} {limit.what}{' of one client' if client else ''} where the limit has room for "
        f"{limit.allow(settings, numbers.window_s):,.0f}, and it was never hit"
        for limit, (client, most) in wide
    ]
    names = [f"{PREFIX}{limit.setting.upper()} ({getattr(USUAL, limit.setting):g} is usual)" for limit, _ in wide]
    return Cause(
        "missing limits",
        Kind.API,
        "; ".join(told) + (f"; meanwhile not healthy: {', '.join(sick)}" if sick else ""),
        f"Set {', '.join(names)} to what a client needs.",
        {client: most for _, (client, most) in wide if client},
    )


def _list_unmet(numbers: Numbers, settings: Settings) -> Iterator[tuple[Limit, tuple[str, int], float]]:
    """The limits that let in more than the usual one would have and were never met; who did most, and how much more."""
    for limit in LIMITS:
        counts = {client: count for client, count in limit.read(numbers).items() if client != OTHERS}
        client = max(counts, key=counts.__getitem__, default="")
        most, usual = counts.get(client, 0), limit.allow(USUAL, numbers.window_s)
        is_met = limit.name in numbers.refused or most >= limit.allow(settings, numbers.window_s)
        if most > usual and not is_met:
            yield limit, (client, most), most / usual


def find_memory_growth(numbers: Numbers, settings: Settings) -> Cause | None:
    growth = read_growth(numbers)
    if growth is None or growth < 1.5 * settings.target_memory_growth_mb_per_h:
        return None
    first, last = numbers.memory[0], numbers.memory[-1]
    is_in_workers = last.workers_bytes - first.workers_bytes > last.server_bytes - first.server_bytes
    return Cause(
        "memory growing",
        Kind.LOGIC,
        f"{growth:,.0f} MB/h: in {last.at - first.at:,.0f} s the server went from {first.server_bytes / 2**20:,.0f} to "
        f"{last.server_bytes / 2**20:,.0f} MB, and its workers from {first.workers_bytes / 2**20:,.0f} to "
        f"{last.workers_bytes / 2**20:,.0f}",
        "A scanner keeps something from chunk to chunk: mend it. SCANWIRE_WORKER_MEMORY_MB bounds each worker, and one "
        "that reaches it is replaced."
        if is_in_workers
        else "Look at what is kept (/v1/operations): lower SCANWIRE_LOG_MEMORY_BYTES, SCANWIRE_RETENTION_S or "
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
    """Who has streams behind in each of the latest looks: one who was behind for a moment has caught up."""
    looks = [state.behind for state in numbers.states[-3:]]
    slow = (
        {client: count for client, count in looks[-1].items() if all(client in look for look in looks)} if looks else {}
    )
    if len(looks) < 3 or not slow:
        return None
    return Cause(
        "slow consumers",
        Kind.RESOURCES,
        f"{sum(slow.values()):,} of {numbers.states[-1].streams:,} streams are behind, in {len(looks)} looks on end",
        f"They are cut off after {settings.stall_s:g} s and catch up when they come back. Read faster, watch fewer "
        "scans on one stream, or look at the network between.",
        _top(slow),
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
    looks = numbers.memory[-len(numbers.states) :]
    span_s = sum(later.at - earlier.at for earlier, later in pairwise(looks))
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
