"""Pushing gets its part of the time and no more, and one slow turn holds nobody up."""

from hypothesis import given
from hypothesis import strategies as st

from app.push.pace import PARTS, Pace

MOST_S = 0.02


def run(pace: Pace, turns: list[tuple[float, float]], now: float = 100.0) -> tuple[list[float], float]:
    """Turns that come so long after one another and take so long: how long each waited, and when all was over."""
    waits = []
    due = now
    for after_s, took_s in turns:
        due += after_s
        now = max(now, due)
        waits.append(pace.wait_s(now))
        now += waits[-1] + took_s
        pace.note(took_s, now)
    return waits, now


def test_who_takes_less_than_its_part_never_waits() -> None:
    waits, _ = run(Pace(MOST_S), [(0.020, 0.004)] * 1000)
    assert max(waits) == 0


def test_one_slow_turn_makes_the_next_one_wait_hardly_at_all() -> None:
    waits, _ = run(Pace(MOST_S), [(0.020, 0.003)] * 100 + [(0.020, 0.018)] + [(0.020, 0.003)] * 100)
    assert max(waits) < 0.004


def test_who_would_take_all_of_the_time_gets_its_part() -> None:
    turns = 1000
    _, end = run(Pace(MOST_S), [(0.0, 0.004)] * turns)
    assert 0.95 < turns * 0.004 * PARTS / (end - 100) < 1.05


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=200))
def test_no_wait_is_longer_than_the_bound(turns: list[tuple[float, float]]) -> None:
    waits, _ = run(Pace(MOST_S), turns)
    assert all(0 <= wait <= MOST_S + 1e-9 for wait in waits)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=200))
def test_with_no_bound_to_wait_up_to_nobody_waits(turns: list[tuple[float, float]]) -> None:
    assert set(run(Pace(0), turns)[0]) == {0.0}
