"""The rules of the buckets and of the stream places, on a clock that the test moves."""

import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.errors import AtCapacity, RateLimited
from app.core.settings import Settings
from app.engine.limits import Bucket, Limits, PolicyName


class Clock:
    """Monotonic seconds that move when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def make_limits(clock: Clock, **settings: float) -> Limits:
    return Limits(Settings.model_validate(settings), clock)


def spend_all(limits: Limits, policy: PolicyName, client: str) -> RateLimited:
    for _ in range(10_000):
        try:
            limits.charge(policy, client)
        except RateLimited as refusal:
            return refusal
    raise AssertionError("never refused")


# Buckets


def test_a_burst_passes_at_once_and_then_one_unit_per_interval() -> None:
    clock = Clock()
    bucket = Bucket(2, 60, clock)
    assert [bucket.try_acquire() for _ in range(3)] == [True, True, False]
    assert bucket.retry_after_s() == 30.0
    clock.now += 29.9
    assert not bucket.try_acquire()
    clock.now += 0.1
    assert bucket.try_acquire()


def test_a_refused_charge_takes_nothing() -> None:
    clock = Clock()
    bucket = Bucket(5, 10, clock)
    assert bucket.try_acquire(4)
    assert not bucket.try_acquire(2)
    assert bucket.remaining == 1
    assert bucket.reset_s == pytest.approx(8)


def test_a_cost_above_the_burst_takes_the_whole_bucket() -> None:
    clock = Clock()
    bucket = Bucket(10, 3600, clock)
    assert bucket.try_acquire(25)
    assert bucket.remaining == 0
    assert bucket.retry_after_s(25) == 3600
    clock.now += 3600
    assert bucket.try_acquire(25)


@pytest.mark.parametrize("cost", [-1, math.nan])
def test_a_cost_below_zero_is_a_bug(cost: float) -> None:
    with pytest.raises(ValueError, match="zero or more"):
        Bucket(1, 1, Clock()).try_acquire(cost)


def test_what_is_given_back_never_fills_a_bucket_above_its_burst() -> None:
    bucket = Bucket(3, 3, Clock())
    bucket.try_acquire(1)
    bucket.give_back(2)
    assert bucket.is_full
    assert bucket.remaining == 3


STEPS = st.lists(st.tuples(st.floats(0, 100), st.sampled_from([0.25, 1.0, 1.5, 3.0])), max_size=40)
SIZES = st.sampled_from([(1.0, 60.0), (2.0, 60.0), (20.0, 4.0), (10.0, 3600.0), (3.0, 0.7)])


@given(SIZES, STEPS, st.floats(0, 1e6))
def test_a_bucket_decides_as_plain_arithmetic_does(
    size: tuple[float, float], steps: list[tuple[float, float]], start: float
) -> None:
    burst, period_s = size
    rate = burst / period_s
    clock = Clock(start)
    bucket = Bucket(burst, period_s, clock)
    tokens, accepted = burst, 0.0
    for wait_s, cost in steps:
        cost = min(cost, burst)
        clock.now += wait_s
        tokens = min(burst, tokens + wait_s * rate)
        was_taken = bucket.try_acquire(cost)
        # Within a microsecond's worth either answer is right.
        if abs(tokens - cost) > 2e-6 * rate:
            assert was_taken == (tokens > cost)
        if was_taken:
            tokens -= cost
            accepted += cost
        assert accepted <= burst + rate * (clock.now - start) + 2e-6 * rate
        assert bucket.remaining <= burst
        assert bucket.reset_s == pytest.approx((burst - tokens) / rate, abs=1e-3)


@given(SIZES, STEPS, st.floats(0, 1e6), st.sampled_from([1.0, 0.3, 2.7]))
def test_waiting_as_long_as_told_is_enough_and_two_milliseconds_less_is_not(
    size: tuple[float, float], steps: list[tuple[float, float]], start: float, cost: float
) -> None:
    clock = Clock(start)
    bucket = Bucket(*size, clock)
    for wait_s, taken in steps:
        clock.now += wait_s / 50
        bucket.try_acquire(taken)
    told_at, told = clock.now, bucket.retry_after_s(cost)
    assert told == round(told, 3)
    if told > 0.002:
        clock.now = told_at + told - 0.002
        assert not bucket.try_acquire(cost)
    clock.now = told_at + told
    assert bucket.try_acquire(cost)


# Policies


def test_a_refusal_names_the_limit_the_wait_and_the_next_step() -> None:
    limits = make_limits(Clock())
    refusal = spend_all(limits, "submit", "ip:1.2.3.4")
    assert refusal.retry_after_s == 30.0
    assert refusal.headers == {"RateLimit-Policy": '"submit";q=2;w=60', "RateLimit": '"submit";r=0;t=60'}
    assert "Try again in 30 s." in refusal.detail
    problem = refusal.to_problem()
    assert problem["limit"] == "submit"
    assert problem["violated-policies"] == ["submit"]
    assert problem["retry_after_s"] == 30.0


@pytest.mark.parametrize(
    ("policy", "declared"),
    [
        ("submit", '"submit";q=2;w=60'),
        ("submit-heavy", '"submit-heavy";q=10;w=3600'),
        ("read", '"read";q=20;w=4'),
        ("connect", '"connect";q=10;w=5'),
        ("message", '"message";q=50;w=5'),
    ],
)
def test_each_policy_declares_the_size_it_has(policy: PolicyName, declared: str) -> None:
    limits = make_limits(Clock())
    fields = limits.headers(policy, "c")
    assert fields["RateLimit-Policy"] == declared
    quota = int(declared.split("q=")[1].split(";")[0])
    assert fields["RateLimit"] == f'"{policy}";r={quota};t=0'
    for _ in range(quota):
        limits.charge(policy, "c")
    with pytest.raises(RateLimited):
        limits.charge(policy, "c")


def test_headers_tell_what_is_left_after_a_charge() -> None:
    limits = make_limits(Clock())
    limits.charge("submit", "c")
    assert limits.headers("submit", "c")["RateLimit"] == '"submit";r=1;t=30'


def test_headers_neither_charge_nor_make_a_bucket() -> None:
    limits = make_limits(Clock())
    for _ in range(100):
        limits.headers("submit", "c")
    assert limits.statistics().buckets == 0
    limits.charge("submit", "c")
    limits.charge("submit", "c")


def test_fewer_than_one_submit_a_minute_is_one_per_longer_time() -> None:
    clock = Clock()
    limits = make_limits(clock, submit_per_min=0.5)
    limits.charge("submit", "c")
    with pytest.raises(RateLimited) as refusal:
        limits.charge("submit", "c")
    assert refusal.value.retry_after_s == 120.0
    assert refusal.value.headers["RateLimit-Policy"] == '"submit";q=1;w=120'


def test_clients_and_policies_do_not_touch_each_other() -> None:
    limits = make_limits(Clock())
    spend_all(limits, "submit", "a")
    limits.charge("submit", "b")
    limits.charge("read", "a")


def test_a_refund_undoes_a_charge() -> None:
    limits = make_limits(Clock())
    limits.charge("submit", "c")
    limits.charge("submit", "c")
    limits.refund("submit", "c")
    limits.charge("submit", "c")
    with pytest.raises(RateLimited):
        limits.charge("submit", "c")


def test_a_refund_to_a_client_without_a_bucket_makes_none() -> None:
    limits = make_limits(Clock())
    limits.refund("submit", "c")
    limits.charge("submit", "c", cost=0)
    assert limits.statistics().buckets == 0


def test_refusals_are_counted_by_policy() -> None:
    limits = make_limits(Clock(), max_streams_per_client=1, max_streams=1)
    spend_all(limits, "submit", "a")
    spend_all(limits, "submit", "b")
    with limits.open_stream("a"):
        with pytest.raises(RateLimited):
            limits.open_stream("a")
        with pytest.raises(AtCapacity):
            limits.open_stream("b")
    assert limits.statistics().refused == {"submit": 2, "streams": 1, "streams-in-all": 1}


# The number of buckets


def test_the_reaper_drops_the_full_buckets_alone() -> None:
    clock = Clock()
    limits = make_limits(clock)
    limits.charge("submit", "rests")
    clock.now += 29
    limits.charge("submit", "busy")
    clock.now += 1
    assert limits.reap() == 1
    assert limits.statistics().buckets == 1
    assert limits.headers("submit", "rests")["RateLimit"] == '"submit";r=2;t=0'
    clock.now += 29
    assert limits.reap() == 1
    assert limits.statistics().buckets == 0


def test_the_reaper_looks_at_a_bounded_number_a_call_and_gets_round_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.limits.REAP_AT_ONCE", 10)
    clock = Clock()
    limits = make_limits(clock)
    for number in range(25):
        limits.charge("read", f"c{number}")
    clock.now += 10
    assert [limits.reap() for _ in range(4)] == [10, 10, 5, 0]


def test_at_the_cap_new_clients_are_served_and_the_number_stays() -> None:
    limits = make_limits(Clock(), max_buckets=16)
    for number in range(500):
        limits.charge("submit", f"c{number}")
        assert limits.statistics().buckets <= 16


def test_at_the_cap_full_buckets_go_first() -> None:
    clock = Clock()
    limits = make_limits(clock, max_buckets=16)
    refused = [f"busy{n}" for n in range(8)]
    for client in refused:
        spend_all(limits, "submit", client)
    for number in range(8):
        limits.charge("read", f"rests{number}")
    clock.now += 1
    limits.charge("submit", "new")
    assert limits.statistics().buckets == 9
    for client in refused:
        with pytest.raises(RateLimited):
            limits.charge("submit", client)


def test_at_the_cap_the_bucket_nearest_to_full_goes_when_none_is() -> None:
    limits = make_limits(Clock(), max_buckets=16)
    for number in range(15):
        spend_all(limits, "submit", f"busy{number}")
    limits.charge("read", "polite")
    limits.charge("submit", "new")
    assert limits.headers("read", "polite")["RateLimit"] == '"read";r=20;t=0'
    with pytest.raises(RateLimited):
        limits.charge("submit", "busy0")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["charge", "refund", "reap", "headers"]),
            st.sampled_from(["submit", "read"]),
            st.integers(0, 40),
            st.floats(0, 5),
        ),
        max_size=120,
    )
)
def test_no_order_of_calls_breaks_the_cap_or_a_header(steps: list[tuple[str, PolicyName, int, float]]) -> None:
    clock = Clock()
    limits = make_limits(clock, max_buckets=16)
    for call, policy, client, wait_s in steps:
        clock.now += wait_s
        before = limits.statistics().buckets
        if call == "charge":
            with suppress(RateLimited):
                limits.charge(policy, f"c{client}")
        elif call == "refund":
            limits.refund(policy, f"c{client}")
        elif call == "reap":
            assert limits.reap() == before - limits.statistics().buckets
        state = limits.headers(policy, f"c{client}")["RateLimit"]
        remaining, reset = (int(part.split("=")[1]) for part in state.split(";")[1:])
        assert 0 <= remaining <= (2 if policy == "submit" else 20)
        assert 0 <= reset <= (60 if policy == "submit" else 4)
        assert limits.statistics().buckets <= 16


# Streams


def test_a_client_has_so_many_streams_and_no_more_until_one_closes() -> None:
    limits = make_limits(Clock(), max_streams_per_client=2)
    first, second = limits.open_stream("c"), limits.open_stream("c")
    with pytest.raises(RateLimited) as refusal:
        limits.open_stream("c")
    assert refusal.value.retry_after_s
    assert refusal.value.to_problem()["limit"] == "streams"
    with limits.open_stream("other"):
        first.close()
        limits.open_stream("c").close()
    second.close()
    assert limits.statistics().streams == 0


def test_all_clients_together_have_so_many_streams() -> None:
    limits = make_limits(Clock(), max_streams=2)
    with limits.open_stream("a"), limits.open_stream("b"), pytest.raises(AtCapacity) as refusal:
        limits.open_stream("c")
    assert refusal.value.retry_after_s
    assert limits.statistics().streams == 0


def test_a_place_is_given_back_once_however_often_it_is_closed() -> None:
    limits = make_limits(Clock(), max_streams_per_client=1)
    with limits.open_stream("c") as lease:
        lease.close()
        with limits.open_stream("c"):
            lease.close()
            with pytest.raises(RateLimited):
                limits.open_stream("c")
    lease.close()
    assert limits.statistics().streams == 0


def test_a_place_is_given_back_when_the_stream_fails() -> None:
    limits = make_limits(Clock())
    with pytest.raises(RuntimeError), limits.open_stream("c"):
        raise RuntimeError
    assert limits.statistics().streams == 0


@pytest.mark.filterwarnings("default::ResourceWarning")
def test_a_place_that_is_dropped_unclosed_comes_back_with_a_warning() -> None:
    limits = make_limits(Clock())
    leases = [limits.open_stream("c")]
    with pytest.warns(ResourceWarning, match="never closed"):
        leases.clear()
    assert limits.statistics().streams == 0


@given(st.lists(st.tuples(st.sampled_from(["open", "close"]), st.integers(0, 4)), max_size=80))
def test_places_never_go_below_zero_nor_above_their_bounds(steps: list[tuple[str, int]]) -> None:
    limits = make_limits(Clock(), max_streams_per_client=2, max_streams=5)
    leases = []
    for call, number in steps:
        if call == "open":
            try:
                leases.append(limits.open_stream(f"c{number}"))
            except (RateLimited, AtCapacity):
                held = sum(lease.is_open for lease in leases)
                own = sum(lease.is_open for lease in leases if lease.client == f"c{number}")
                assert held == 5 or own == 2
        elif leases:
            leases[number % len(leases)].close()
        assert limits.statistics().streams == sum(lease.is_open for lease in leases)
    for lease in leases:
        lease.close()
    assert limits.statistics().streams == 0
