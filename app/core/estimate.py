"""How long something will take, and when asking again is worth it. Pure arithmetic, no clock."""

import heapq
from collections.abc import Sequence

POLL_MIN_S = 1.0
POLL_MAX_S = 30.0
POLL_GROWTH = 1.2
_POLL_JITTER = 0.1

Range = tuple[float, float]


def estimate_rest(
    done: int, total: int | None, elapsed_s: float, last_rate: float | None
) -> tuple[float | None, Range | None]:
    """The rate so far (units per second), and the seconds that are left as a range; None while nobody can know.

    The range spans the rate over the whole run and the rate of late, and is wider while little is done: after a
    share x of the work it is stretched by (1 - x) / 4 on either side. The first chunks say little, since what it
    costs to begin is in them: the low end is scaled by x / (x + 0.05) as well.
    """
    if done <= 0 or elapsed_s <= 0:
        return None, None
    rate = done / elapsed_s
    if total is None:
        return round(rate, 1), None
    rates = (rate, last_rate) if last_rate else (rate, rate)
    left, share = total - done, done / total
    doubt = (1 - share) / 4
    low = left / max(rates) * (1 - doubt) * share / (share + 0.05)
    return round(rate, 1), (round(low, 2), round(left / min(rates) * (1 + doubt), 2))


def estimate_starts(running_s: Sequence[Range], queued_s: Sequence[Range], slots: int) -> list[Range]:
    """When each queued scan will get a slot, in seconds from now as ranges, in queue order.

    `running_s` is what each running scan still needs, `queued_s` what each queued one will need; both in seconds.
    """
    starts: list[list[float]] = []
    for side in (0, 1):
        free = [0.0] * max(0, slots - len(running_s)) + [needs[side] for needs in running_s]
        heapq.heapify(free)
        starts.append([])
        for needs in queued_s:
            start = heapq.heappop(free)
            starts[side].append(round(start, 1))
            heapq.heappush(free, start + needs[side])
    return list(zip(*starts, strict=True))


def hint_poll(eta_s: Range | None, last_hint_s: float | None, jitter: float) -> float:
    """Seconds until the next poll is worth making: between 1 and 30 before jitter.

    With an ETA it is half of the earliest time the scan can change its state. While nothing changed
    (`last_hint_s` is the hint given then) it grows by a factor of 1.2 at least. `jitter` in [0, 1) belongs to the
    client and adds up to a tenth, so that clients told the same do not come back together.
    """
    base = POLL_MIN_S if eta_s is None else eta_s[0] / 2
    if last_hint_s is not None:
        base = max(base, last_hint_s * POLL_GROWTH)
    return round(min(max(base, POLL_MIN_S), POLL_MAX_S) * (1 + _POLL_JITTER * jitter), 3)
