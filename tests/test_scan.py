"""Rules of core: states, folding, cursors, digests, estimates."""

import itertools
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.errors import InvalidCursor, WrongState
from app.core.estimate import POLL_MAX_S, estimate_end, estimate_rest, estimate_starts, hint_poll
from app.core.event import Cursor, EventType, make_event
from app.core.scan import Producer, Scan, State, canonical_row, check_transition, digest_rows, make_same_key

QUEUED = (EventType.QUEUED, {"position": 1, "eta_s": (0.0, 1.0)})
STARTED = (EventType.STARTED, {"attempt": 1})
CANCELLING = (EventType.CANCELLING, {"by": "client"})


def ended(state: State) -> tuple[EventType, dict[str, Any]]:
    return EventType.END, {"state": state}


def found(rows: int) -> tuple[EventType, dict[str, Any]]:
    return EventType.MATCHES, {"chunk": 0, "rows": [{"symbol": "A"}] * rows}


def make_scan(scan_id: str = "s_test") -> Scan:
    return Scan(
        id=scan_id,
        scanner="gap-up",
        params={"start": None},
        client="ip:127.0.0.1",
        created_ts=1,
        data_version="d",
        same_key="k",
        cost_rows=10,
        chunk_rows=5,
    )


def fold_all(*parts: tuple[EventType, dict[str, Any]]) -> Scan:
    scan = make_scan()
    for n, (type_, data) in enumerate(parts, 1):
        scan = scan.fold(type_, data, n * 10, n)
    return scan


def test_a_scan_is_what_its_events_made_of_it() -> None:
    scan = fold_all(QUEUED, STARTED, found(2), found(3), ended(State.COMPLETED))
    assert (scan.state, scan.matches, scan.seq, scan.n) == (State.COMPLETED, 5, 5, 5)
    assert (scan.started_ts, scan.finished_ts, scan.position) == (20, 50, None)


def test_matches_change_their_count_and_the_place_in_the_log_and_nothing_else() -> None:
    scan = fold_all(QUEUED, STARTED)
    type_, data = found(3)
    assert scan.fold(type_, data, 99, 7) == scan._replace(matches=3, seq=3, n=7)


def test_a_scan_survives_its_record() -> None:
    for parts in ([QUEUED], [QUEUED, STARTED, found(1)], [QUEUED, ended(State.LOST)]):
        scan = fold_all(*parts)
        assert Scan.from_record(scan.to_record()) == scan


@pytest.mark.parametrize("state", [state for state in State if state.is_terminal])
def test_after_the_end_nothing_comes(state: State) -> None:
    scan = fold_all(QUEUED, STARTED, *([CANCELLING] if state is State.CANCELLED else []), ended(state))
    for type_, data in (QUEUED, STARTED, found(1), CANCELLING, ended(State.COMPLETED)):
        with pytest.raises(WrongState):
            scan.fold(type_, data, 99, 99)


def test_matches_come_only_while_a_scan_runs() -> None:
    with pytest.raises(WrongState, match="running"):
        fold_all(QUEUED, found(1))


def test_a_queued_scan_does_not_complete() -> None:
    with pytest.raises(WrongState, match="cannot become completed"):
        fold_all(QUEUED, ended(State.COMPLETED))


def test_an_ephemeral_event_does_not_belong_in_the_log() -> None:
    with pytest.raises(WrongState, match="not durable"):
        fold_all(QUEUED, (EventType.PROGRESS, {}))


def test_no_transition_leaves_a_terminal_state() -> None:
    for old, new in itertools.product(State, State):
        if old.is_terminal:
            with pytest.raises(WrongState, match="it has ended"):
                check_transition(old, new)


@given(st.text(alphabet="0123456789abcdefghijklmnopqrstuvwxyz", min_size=4, max_size=16), st.integers(0, 10**18 - 1))
def test_a_cursor_reads_back_as_written(epoch: str, n: int) -> None:
    assert Cursor.parse(str(Cursor(epoch, n))) == Cursor(epoch, n)


@given(st.text(max_size=60))
def test_any_other_text_is_refused_as_a_cursor_and_named(text: str) -> None:
    try:
        cursor = Cursor.parse(text, "Last-Event-ID")
    except InvalidCursor as refusal:
        field = refusal.extra["errors"][0]["field"]
    else:
        field = "Last-Event-ID" if str(cursor) == text else "read as another cursor"
    assert field == "Last-Event-ID"


def test_a_progress_event_has_no_id() -> None:
    event = make_event(EventType.PROGRESS, "s_1", 3, {"done": 1}, 5)
    assert event.id is None
    assert b'"id"' not in event.json


def test_the_digest_is_of_the_rows_in_order_whatever_the_order_of_their_keys() -> None:
    one, two = {"a": 1, "b": 2.5}, {"a": 2, "b": None}
    assert digest_rows([one, two]) == digest_rows([{"b": 2.5, "a": 1}, {"b": None, "a": 2}])
    assert digest_rows([one, two]) != digest_rows([two, one])
    assert canonical_row(one) == b'{"a":1,"b":2.5}'


def test_equal_questions_have_equal_keys() -> None:
    key = make_same_key("gap-up", {"a": 1, "b": 2}, "v1")
    assert key == make_same_key("gap-up", {"b": 2, "a": 1}, "v1")
    assert len({key, make_same_key("gap-up", {"a": 1}, "v1"), make_same_key("gap-up", {"a": 1, "b": 2}, "v2")}) == 3


@given(
    st.integers(1, 10_000),
    st.integers(1, 10_000),
    st.floats(0.001, 1e4),
    st.none() | st.floats(0.001, 1e6),
)
def test_what_is_left_is_a_range_that_holds_the_plain_estimate(
    done: int, more: int, elapsed_s: float, last_rate: float | None
) -> None:
    rate, eta_s = estimate_rest(done, done + more, elapsed_s, last_rate)
    assert rate is not None
    assert eta_s is not None
    assert 0 <= eta_s[0] <= more / (done / elapsed_s) + 0.01
    assert eta_s[1] >= more / (done / elapsed_s) - 0.01


def test_nothing_done_is_no_estimate() -> None:
    assert estimate_rest(0, 10, 1.0, None) == (None, None)


def test_queued_scans_start_when_slots_become_free() -> None:
    running, queued = [(10.0, 20.0), (30.0, 40.0)], [(5.0, 5.0), (5.0, 5.0), (5.0, 5.0)]
    assert estimate_starts(running, queued, 2) == [(10.0, 20.0), (15.0, 25.0), (20.0, 30.0)]


def test_a_free_slot_is_taken_at_once() -> None:
    assert estimate_starts([(10.0, 10.0)], [(1.0, 1.0)], 2) == [(0.0, 0.0)]


@given(
    st.none() | st.tuples(st.floats(0, 1e5), st.floats(0, 1e5)),
    st.none() | st.floats(1, 33),
    st.floats(0, 1, exclude_max=True),
)
def test_poll_hints_stay_between_1_and_30_s_before_jitter(
    eta_s: tuple[float, float] | None, last_s: float | None, jitter: float
) -> None:
    assert 1 <= hint_poll(eta_s, last_s, jitter) <= POLL_MAX_S * 1.1 + 0.001


@given(
    st.integers(3, 3000),
    st.floats(0.03, 1, exclude_max=True),
    st.floats(0.1, 5),
    st.floats(0, 1, exclude_max=True),
)
def test_who_polls_a_steady_scan_by_its_hints_comes_just_after_its_end(
    whole_s: int, first: float, step_s: float, jitter: float
) -> None:
    """However long it takes, whenever the first poll is, and however seldom there is news."""
    now, polls, last_s, seen = first * whole_s, 0, None, None
    steps = max(1, round(whole_s / step_s))
    while now < whole_s:
        done = int(now / whole_s * steps)
        reached = done * whole_s / steps
        rate, eta_s = estimate_rest(done, steps, reached, None)
        end_s = estimate_end(done, steps, rate, now - reached)
        last_s = hint_poll(eta_s, last_s if seen == done else None, jitter, end_s)
        now, polls, seen = now + last_s, polls + 1, done
    if first * steps >= 1:  # it was known from the first poll on how fast it is
        assert now - whole_s <= 1.2 + 0.01 * POLL_MAX_S + 0.1
        assert polls <= 2 + whole_s / (POLL_MAX_S - 1)


def test_without_a_rate_the_end_cannot_be_told() -> None:
    for done, total, rate in ((0, 10, 1.0), (1, None, 1.0), (1, 10, None), (1, 10, 0.0)):
        assert estimate_end(done, total, rate, 0.0) is None
    assert estimate_end(50, 100, 10.0, 2.0) == pytest.approx(3.0, abs=0.3)
    assert estimate_end(50, 100, 10.0, 60.0) == pytest.approx(0.2)  # overdue


def test_a_slow_rate_is_told_with_the_digits_that_it_has() -> None:
    assert estimate_rest(1, 100, 30.0, None)[0] == 0.03333


def test_poll_hints_grow_by_a_fifth_while_nothing_changes() -> None:
    hints = [hint_poll(None, None, 0.0)]
    for _ in range(30):
        hints.append(hint_poll(None, hints[-1], 0.0))
    assert all(later >= min(earlier * 1.2, 30) - 0.001 for earlier, later in itertools.pairwise(hints))
    assert hints[-1] == 30


def test_a_record_that_counts_what_a_producer_sent_is_still_read() -> None:
    scan = make_scan()._replace(producer=Producer(token_hash="0" * 64, seq=3, dropped=2), matches=5)
    record = orjson.loads(scan.to_record())
    assert Scan.from_record(orjson.dumps(record)) == scan
    del record["producer"]["dropped"]
    record["producer"]["found"] = 7
    assert Scan.from_record(orjson.dumps(record)) == scan
