"""When to push next, while pushing is much of the work."""

PARTS = 4  # pushing has one part in so many of the time
SMOOTH = 8  # what is taken for the cost of a turn changes by one part in so many of what a turn really took


class Pace:
    """Keeps work that is done in turns down to its part of the time, by waiting between them.

    One slow turn holds nobody up: a turn counts with what the last few took, and may come up to `most_s` before it
    is paid for. After a rest that has paid for everything, what cost much before is forgotten. No wait is longer than
    `most_s`. `now` is of one clock, in seconds; `took_s` may leave out when others had the processor.
    """

    __slots__ = ("_cost_s", "_most_s", "_paid_at")

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._cost_s = 0.0
        self._paid_at = 0.0  # by then, what was done has had no more than its part

    def note(self, took_s: float, now: float) -> None:
        """A turn that took so long ends now."""
        took_s = min(took_s, 2 * self._most_s / PARTS)
        if self._paid_at < now - took_s:
            self._cost_s = min(self._cost_s, took_s)
        self._cost_s += (took_s - self._cost_s) / SMOOTH
        paid_at = max(self._paid_at, now - took_s) + self._cost_s * PARTS
        self._paid_at = min(paid_at, now + 2 * self._most_s)

    def wait_s(self, now: float) -> float:
        """So long the next turn should wait."""
        return max(self._paid_at - self._most_s - now, 0.0)
