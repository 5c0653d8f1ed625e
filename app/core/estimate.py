"""How long something will take, and when asking again is worth it. Pure arithmetic, no clock."""

import heapq
from collections.abc import Sequence

POLL_MIN_S = 1.0
POLL_MAX_S = 30.0
POLL_GROWTH = 1.2
_POLL_JITTER, _POLL_JITTER_MAX_S = 0.1, 1.0
_TRUSTED_SHARE = 0.25  # of the work; from then on a hint reaches to the end
_LATE_SHARE, _LATE_S = 0.01, 0.2  # how far behind the expected end it aims: just before is a poll for nothing

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
    shown = float(f"{rate:.4g}")
    if total is None:
        return shown, None
    rates = (rate, last_rate) if last_rate else (rate, rate)
    left, share = total - done, done / total
    doubt = (1 - share) / 4
    low = left / max(rates) * (1 - doubt) * share / (share + 0.05)
    return shown, (round(low, 2), round(left / min(rates) * (1 + doubt), 2))


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


def estimate_end(done: int, total: int | None, rate: float | None, age_s: float) -> float | None:
    """Seconds until the end is worth looking for, by the rate so far; None while nobody can know.

    `age_s` is how long ago `done` was reached. While little is done the rate says little, so the way is halved; later
    on it aims just behind the expected end.
    """
    if not total or not rate or done <= 0:
        return None
    rest_s = max(0.0, (total - done) / rate - age_s)
    return rest_s / 2 if done < _TRUSTED_SHARE * total else rest_s * (1 + _LATE_SHARE) + _LATE_S


def hint_poll(eta_s: Range | None, last_hint_s: float | None, jitter: float, end_s: float | None = None) -> float:
    """Seconds until the next poll is worth making: between 1 and 30 before jitter.

    It is `end_s`, see `estimate_end`, if that is known; else, with an ETA, half of the earliest time the scan can
    change its state. While nothing changed (`last_hint_s` is the hint given then) it grows by a factor of 1.2 at
    least. `jitter` in [0, 1) belongs to the client and adds up to a tenth and up to a second, so that clients told
    the same do not come back together.
    """
    base = POLL_MIN_S if eta_s is None else eta_s[0] / 2
    if end_s is not None:
        base = end_s
    if last_hint_s is not None:
        base = max(base, last_hint_s * POLL_GROWTH)
    base = min(max(base, POLL_MIN_S), POLL_MAX_S)
    return round(base + min(base * _POLL_JITTER, _POLL_JITTER_MAX_S) * jitter, 3)
