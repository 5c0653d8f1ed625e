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


def test_one_turn_however_long_makes_no_cheap_one_wait() -> None:
    waits, _ = run(Pace(MOST_S), [(0.010, 0.0002)] * 100 + [(0.010, 0.2)] + [(0.010, 0.0002)] * 100)
    assert max(waits) < 0.010


def test_what_cost_much_before_a_rest_is_forgotten() -> None:
    for took_s in (0.006, 0.025, 0.1):
        waits, _ = run(Pace(MOST_S), [(0.050, took_s)] * 100 + [(3600.0, 0.0001)] + [(0.010, 0.0001)] * 100)
        assert max(waits[100:]) == 0, took_s


def test_the_time_that_a_turn_takes_pays_for_it_too() -> None:
    pace, took_s = Pace(MOST_S), 0.004
    for _ in range(100):
        pace.note(took_s, 100.0)
    pace.note(took_s, 200.0)
    assert pace.wait_s(200.0 - took_s + took_s * PARTS - MOST_S) < 1e-9 < pace.wait_s(199.999 - took_s - MOST_S)


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
