"""What one client may ask for, and how often: a leaky bucket per client and policy, and a count of open streams.

A bucket takes a burst of `burst` units at once and then `burst / period_s` a second; in the first period after a
rest that makes up to twice the burst. A full bucket equals no bucket, so the full ones are dropped.
"""

import math
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, Self, get_args

from aiolimiter import AsyncLimiter

from app.core.errors import AtCapacity, RateLimited
from app.core.settings import Settings

PolicyName = Literal["submit", "submit-heavy", "read", "connect", "message", "legacy-execute"]
# What `refused` counts: the buckets, and the places for streams.
REFUSING = (*get_args(PolicyName), "streams", "streams-in-all")

# Clocks and levels are floats: who waited as long as told is let in, even if the sum comes out this much short.
FORGIVEN_S = 1e-6
# At the cap, this many of the buckets longest unused are looked at to find the one to drop.
EVICTION_WINDOW = 16
REAP_AT_ONCE = 10_000
# Nobody knows when a stream will close; this is when asking again is reasonable.
STREAM_RETRY_S = 5.0


class Bucket(AsyncLimiter):
    """A leaky bucket that says how long to wait instead of waiting, on a clock that is handed in.

    `burst` is in units, `period_s` the seconds in which an empty bucket fills up again.
    """

    def __init__(self, burst: float, period_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(burst, period_s)
        self._clock = clock

    def _leak(self) -> None:
        now = self._clock()
        if self._level:
            self._level = max(self._level - (now - self._last_check) * self._rate_per_sec, 0.0)
        self._last_check = now

    def try_acquire(self, cost: float = 1) -> bool:
        """Takes `cost` units and returns True, or takes nothing and returns False. Never waits.

        A cost above the burst takes the whole bucket: else it could never be paid. Raises ValueError below zero.
        """
        cost = self._clamp(cost)
        self._leak()
        if self._level + cost > self.max_rate + FORGIVEN_S * self._rate_per_sec:
            return False
        self._level += cost
        return True

    def give_back(self, cost: float = 1) -> None:
        """Undoes a `try_acquire` of the same cost; never fills the bucket above its burst."""
        cost = self._clamp(cost)
        self._leak()
        self._level = max(self._level - cost, 0.0)

    def retry_after_s(self, cost: float = 1) -> float:
        """Seconds, rounded up to the millisecond, after which `try_acquire(cost)` works if nobody else charges."""
        cost = self._clamp(cost)
        self._leak()
        missing_s = (self._level + cost - self.max_rate) / self._rate_per_sec
        if missing_s <= FORGIVEN_S:
            return 0.0
        # Half of what is forgiven is spent here, so that 30 s is not told as 30.001; half is left for the clock.
        return math.ceil((missing_s - FORGIVEN_S / 2) * 1000) / 1000

    @property
    def remaining(self) -> int:
        """Whole units that may be taken now."""
        self._leak()
        return max(int(self.max_rate - self._level + FORGIVEN_S * self._rate_per_sec), 0)

    @property
    def full_at(self) -> float:
        """When the bucket is full again, on its clock."""
        return self._last_check + self._level / self._rate_per_sec

    @property
    def reset_s(self) -> float:
        """Seconds until the bucket is full."""
        return max(self.full_at - self._clock(), 0.0)

    @property
    def is_full(self) -> bool:
        return self.reset_s <= FORGIVEN_S

    def describe(self, name: str) -> str:
        """The item of RateLimit: `"submit";r=1;t=30`, for now."""
        self._leak()
        level, rate = self._level, self._rate_per_sec
        remaining = max(int(self.max_rate - level + FORGIVEN_S * rate), 0)
        return f'"{name}";r={remaining};t={math.ceil(level / rate - FORGIVEN_S)}'

    def _clamp(self, cost: float) -> float:
        if not cost >= 0:
            raise ValueError(f"a cost is zero or more, not {cost!r}")
        return min(cost, self.max_rate)


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """One limit: its name on the wire, its size, and what a refused client should do instead."""

    name: PolicyName
    # Units at once.
    burst: float
    # Seconds in which `burst` units come back.
    period_s: float
    advice: str

    @property
    def declared(self) -> str:
        """The item of RateLimit-Policy: `"submit";q=2;w=60`."""
        return f'"{self.name}";q={int(self.burst)};w={math.ceil(self.period_s)}'


def _policies(settings: Settings) -> dict[str, Policy]:
    def per(name: PolicyName, amount: float, period_s: float, advice: str) -> Policy:
        # Fewer than one a period is one per longer period: a burst below 1 would refuse everything.
        burst = max(amount, 1.0)
        return Policy(name, burst, period_s * burst / amount, advice)

    def burst(name: PolicyName, size: int, per_s: float, advice: str) -> Policy:
        return Policy(name, float(size), size / per_s, advice)

    joining = "A scan that equals one already running is joined at no cost."
    policies = (
        per("submit", settings.submit_per_min, 60, joining),
        per("submit-heavy", settings.submit_heavy_per_hour, 3600, f"{joining} One over fewer rows is not heavy."),
        burst(
            "read", settings.read_burst, settings.read_per_s, "Follow the scan's `events` link instead of polling it."
        ),
        burst(
            "connect",
            settings.connect_burst,
            settings.connect_per_s,
            "One connection can watch many scans: /v1/events?scan=A&scan=B.",
        ),
        burst("message", settings.message_burst, settings.message_per_s, "Events arrive without being asked for."),
        per("legacy-execute", settings.legacy_execute_per_min, 60, "Send fewer, longer ranges: POST /v1/scans."),
    )
    return {policy.name: policy for policy in policies}


def _violated(name: str) -> dict[str, Any]:
    """The member that the problem type quota-exceeded has."""
    return {"violated-policies": [name]}


class LimitStatistics(NamedTuple):
    """Counts of one moment. `refused` counts from the start, by the names in REFUSING."""

    buckets: int
    streams: int
    refused: dict[str, int]


class StreamLease:
    """One open stream's place, given back exactly once however often it is closed.

    Use it in a `with`, or call `close`. One that is dropped unclosed gives its place back too, with a
    ResourceWarning, as a socket does.
    """

    __slots__ = ("_limits", "client", "is_open")

    def __init__(self, limits: "Limits", client: str) -> None:
        self._limits = limits
        self.client = client
        self.is_open = True

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._limits._return_place(self.client)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self.is_open:
            self.close()
            warnings.warn(f"a stream of {self.client!r} was never closed", ResourceWarning, stacklevel=2)

    def __repr__(self) -> str:
        return f"<StreamLease {self.client!r} {'open' if self.is_open else 'closed'}>"


class Limits:
    """Every limit that is charged to a client. Holds at most `max_buckets` buckets and `max_streams` streams.

    `clock` gives monotonic seconds. For one event loop: nothing here waits, so nothing here locks.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._settings = settings
        self._policies = _policies(settings)
        self._max_buckets = settings.max_buckets
        self._max_streams = settings.max_streams
        self._max_streams_per_client = settings.max_streams_per_client
        # By (policy, client), the one charged longest ago first.
        self._buckets: OrderedDict[tuple[str, str], Bucket] = OrderedDict()
        # Those that the running round of the reaper has not looked at.
        self._to_reap: list[tuple[str, str]] = []
        # Open streams by client; a client without any has no entry.
        self._streams: dict[str, int] = {}
        self._streams_in_all = 0
        self._refused: Counter[str] = Counter()
        # What was charged since `take_charged`, beside reads, which are far too many to be counted one by one.
        self._charged: Counter[tuple[str, str]] = Counter()
        # Header values that do not change are made once.
        self._declared = {name: policy.declared for name, policy in self._policies.items()}
        self._declared_raw = {name: (b"ratelimit-policy", text.encode()) for name, text in self._declared.items()}
        self._untouched = {name: f'"{name}";r={int(p.burst)};t=0' for name, p in self._policies.items()}

    def tighten(self, settings: Settings | None = None) -> None:
        """From now on the limits of these settings hold, of these names: submit and read. None: the usual ones."""
        changed = _policies(settings or self._settings)
        for name in ("submit", "read"):
            policy = self._policies[name] = changed[name]
            self._declared[name] = policy.declared
            self._declared_raw[name] = (b"ratelimit-policy", policy.declared.encode())
            self._untouched[name] = f'"{name}";r={int(policy.burst)};t=0'
        for key in [key for key in self._buckets if key[0] in ("submit", "read")]:
            del self._buckets[key]

    def charge(self, policy: PolicyName, client: str, cost: float = 1) -> None:
        """Takes `cost` units from the client's bucket, or takes nothing and raises RateLimited.

        The error's `retry_after_s` is exact: after that wait the same charge works, unless the client spent more in
        between. A cost above the burst takes the whole bucket.
        """
        key = (policy, client)
        bucket = self._buckets.get(key)
        if bucket is None:
            if cost == 0:
                return
            bucket = self._add(key)
        else:
            self._buckets.move_to_end(key)
        if not bucket.try_acquire(cost):
            self._refused[policy] += 1
            raise self._refusal(policy, client, bucket.retry_after_s(cost))
        if policy != "read" and len(self._charged) < self._max_buckets:
            self._charged[key] += 1

    def refund(self, policy: PolicyName, client: str, cost: float = 1) -> None:
        """Undoes a charge whose work was then refused for another reason, such as a full queue."""
        bucket = self._buckets.get((policy, client))
        if bucket is not None:
            bucket.give_back(cost)
        if (policy, client) in self._charged:
            self._charged[policy, client] -= 1

    def take_charged(self) -> Counter[tuple[str, str]]:
        """How often each policy but `read` was charged to each client since this was asked last."""
        charged, self._charged = self._charged, Counter()
        return charged

    def find_most_streams(self) -> dict[str, int]:
        """The client that has most streams open, and how many; empty when there are none."""
        client = max(self._streams, key=self._streams.__getitem__, default=None)
        return {} if client is None else {client: self._streams[client]}

    def retry_after_s(self, policy: PolicyName, client: str) -> float:
        """Seconds until one more unit may be charged; 0 when it may be now."""
        bucket = self._buckets.get((policy, client))
        return 0.0 if bucket is None else bucket.retry_after_s()

    def headers(self, policy: PolicyName, client: str) -> dict[str, str]:
        """The state of one limit as header fields; charges nothing and makes no bucket.

        Form: draft-ietf-httpapi-ratelimit-headers-11. `t` is the seconds until the bucket is full.
        """
        bucket = self._buckets.get((policy, client))
        return {
            "RateLimit-Policy": self._declared[policy],
            "RateLimit": self._untouched[policy] if bucket is None else bucket.describe(policy),
        }

    def raw_headers(self, policy: PolicyName, client: str) -> list[tuple[bytes, bytes]]:
        """The same, as ASGI takes it."""
        bucket = self._buckets.get((policy, client))
        state = self._untouched[policy] if bucket is None else bucket.describe(policy)
        return [self._declared_raw[policy], (b"ratelimit", state.encode())]

    def open_stream(self, client: str) -> StreamLease:
        """A place for one more stream, to be closed when the stream ends.

        Raises RateLimited when the client has `max_streams_per_client`, AtCapacity when all have `max_streams`.
        """
        held = self._streams.get(client, 0)
        if held >= self._max_streams_per_client:
            self._refused["streams"] += 1
            raise RateLimited(
                f"This client has {held} streams open, and may not have more. Close one, or watch several scans on "
                f"one: /v1/events?scan=A&scan=B. Try again in {STREAM_RETRY_S:g} s.",
                retry_after_s=STREAM_RETRY_S,
                limit="streams",
                **_violated("streams"),
            )
        if self._streams_in_all >= self._max_streams:
            self._refused["streams-in-all"] += 1
            raise AtCapacity(
                f"The server has {self._streams_in_all} streams open, and takes no more. "
                f"Try again in {STREAM_RETRY_S:g} s, or poll until then.",
                retry_after_s=STREAM_RETRY_S,
                limit="streams-in-all",
            )
        self._streams[client] = held + 1
        self._streams_in_all += 1
        return StreamLease(self, client)

    def reap(self) -> int:
        """Drops the full buckets and returns how many they were.

        One call looks at up to `REAP_AT_ONCE` and the next goes on from there, so that no flood of clients makes it
        hold up the loop for long.
        """
        if not self._to_reap:
            self._to_reap = list(self._buckets)
        keys = self._to_reap[-REAP_AT_ONCE:]
        del self._to_reap[-REAP_AT_ONCE:]
        now = self._clock() + FORGIVEN_S
        full = [key for key in keys if (bucket := self._buckets.get(key)) and bucket.full_at <= now]
        for key in full:
            del self._buckets[key]
        return len(full)

    def statistics(self) -> LimitStatistics:
        return LimitStatistics(len(self._buckets), self._streams_in_all, dict(self._refused))

    def __repr__(self) -> str:
        return f"<Limits buckets={len(self._buckets)} streams={self._streams_in_all}>"

    def _add(self, key: tuple[str, str]) -> Bucket:
        if len(self._buckets) >= self._max_buckets:
            self._evict()
        policy = self._policies[key[0]]
        bucket = self._buckets[key] = Bucket(policy.burst, policy.period_s, self._clock)
        return bucket

    def _evict(self) -> None:
        """Makes room: full buckets among those longest unused go first, else the one nearest to full.

        It looks at a fixed number, so a flood of new clients costs the same for each. What is forgotten with a
        bucket that was not full is in the client's favour.
        """
        now = self._clock() + FORGIVEN_S
        oldest = {key: bucket.full_at for key, bucket in islice(self._buckets.items(), EVICTION_WINDOW)}
        full = [key for key, full_at in oldest.items() if full_at <= now]
        for key in full or [min(oldest, key=oldest.__getitem__)]:
            del self._buckets[key]

    def _refusal(self, name: PolicyName, client: str, retry_after_s: float) -> RateLimited:
        policy = self._policies[name]
        return RateLimited(
            f"The limit {name!r} is {policy.burst:g} per {policy.period_s:g} s. "
            f"Try again in {retry_after_s:g} s. {policy.advice}",
            retry_after_s=retry_after_s,
            headers=self.headers(name, client),
            limit=name,
            **_violated(name),
        )

    def _return_place(self, client: str) -> None:
        self._streams_in_all -= 1
        left = self._streams[client] - 1
        if left:
            self._streams[client] = left
        else:
            del self._streams[client]
