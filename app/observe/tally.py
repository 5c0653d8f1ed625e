"""What the service does, over a sliding window: noted where it happens, and read as one set of numbers."""

import hashlib
import os
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

VALUES_KEPT = 50  # of each kind, in one interval
CLIENTS_KEPT = 50  # of each kind, in one interval
INTERVALS_KEPT = 4000
OTHERS = "others"  # who are not counted one by one
_CHUNK = "chunk of "
_random = Random().random  # of its own: nobody's seed is touched
_STATM = Path("/proc/self/statm")


class State(NamedTuple):
    """The gauges and counters of one moment. Counters count from the start."""

    memory_bytes: int = 0
    cpu_s: float = 0.0
    running: int = 0
    slots: int = 1
    queued: int = 0
    streams: int = 0
    behind: int = 0  # streams whose peers do not take what is written
    pushed: int = 0
    refused: Mapping[str, int] = {}  # by limit
    blocks: int = 0  # times that the event loop was found blocked


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Everything that a diagnosis is made of, over the last `window_s` seconds."""

    window_s: float
    scan_s: Sequence[float] = ()  # of scans that ended
    queue_wait_s: Sequence[float] = ()
    answer_s: Sequence[float] = ()  # of requests, to the head of the answer; not of long polls
    answers: int = 0  # of which these are some
    push_lag_s: Sequence[float] = ()
    loop_lag_s: Sequence[float] = ()
    chunk_s: Mapping[str, Sequence[float]] = field(default_factory=dict)  # by scanner
    polls: Mapping[str, int] = field(default_factory=dict)  # by client, hashed
    early: Mapping[str, int] = field(default_factory=dict)  # polls before the time that the client was told
    connects: Mapping[str, int] = field(default_factory=dict)  # streams opened, by client
    states: Sequence[State] = ()  # oldest first
    base: State = field(default_factory=State)  # at the beginning of the window
    memory_bytes: Sequence[tuple[float, int]] = ()  # seconds, bytes; over the last `memory_window_s`
    memory_window_s: float = 0.0
    read_per_s: float = 5.0  # that the limit lets one client in with

    def rise(self, name: str) -> int:
        """By how much a counter of State rose."""
        return int(getattr(self.states[-1], name) - getattr(self.base, name)) if self.states else 0

    @property
    def refused(self) -> dict[str, int]:
        """Refusals by limit."""
        if not self.states:
            return {}
        first, last = self.base.refused, self.states[-1].refused
        return {name: count - first.get(name, 0) for name, count in last.items() if count > first.get(name, 0)}


class Interval:
    """What happened between two looks: some of the values of each kind, taken at random, and counts by client."""

    __slots__ = ("counts", "seen", "values")

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.seen: Counter[str] = Counter()  # values by kind, those that were not taken too
        self.counts: dict[str, Counter[str]] = {}  # by kind, by client

    def note(self, kind: str, value: float) -> None:
        values = self.values.get(kind)
        if values is None:
            values = self.values[kind] = []
        self.seen[kind] += 1
        if len(values) < VALUES_KEPT:
            values.append(value)
        elif (place := int(_random() * self.seen[kind])) < VALUES_KEPT:
            values[place] = value

    def count(self, kind: str, client: str) -> None:
        counts = self.counts.get(kind)
        if counts is None:
            counts = self.counts[kind] = Counter()
        counts[client] += 1

    def close(self) -> None:
        """Lets go of all clients but those who did most; what the others did is kept as one sum."""
        for kind, counts in self.counts.items():
            if len(counts) > CLIENTS_KEPT:
                most = Counter(dict(counts.most_common(CLIENTS_KEPT)))
                most[OTHERS] = counts.total() - most.total()
                self.counts[kind] = most


class Tally:
    """Takes notes for one service. `read_state` gives its gauges and counters; `clock` is monotonic, in seconds.

    Clients are told apart by a hash that means nothing outside this process.
    """

    def __init__(
        self,
        window_s: float,
        memory_window_s: float,
        read_state: Callable[[], State],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._window_s = window_s
        self._memory_window_s = memory_window_s
        self._read_state = read_state
        self._clock = clock
        self._salt = secrets.token_bytes(16)
        self._open = Interval()
        self._base = read_state()
        self._closed: deque[tuple[float, Interval, State]] = deque(maxlen=INTERVALS_KEPT)
        self._memory: deque[tuple[float, int]] = deque(maxlen=INTERVALS_KEPT)

    def note_answer(self, seconds: float) -> None:
        self._open.note("answer", seconds)

    def note_push_lag(self, seconds: float) -> None:
        self._open.note("push lag", seconds)

    def note_loop_lag(self, seconds: float) -> None:
        self._open.note("loop lag", seconds)

    def note_scan(self, queue_wait_s: float, scan_s: float) -> None:
        self._open.note("queue wait", queue_wait_s)
        self._open.note("scan", scan_s)

    def note_chunk(self, scanner: str, seconds: float) -> None:
        self._open.note(f"{_CHUNK}{scanner}", seconds)

    def note_poll(self, client: str, is_early: bool) -> None:
        self._open.count("poll", client)
        if is_early:
            self._open.count("early", client)

    def note_connect(self, client: str) -> None:
        self._open.count("connect", client)

    def sample(self) -> None:
        """Takes the state of this moment; a new interval begins."""
        now, state = self._clock(), self._read_state()
        interval, self._open = self._open, Interval()
        interval.close()
        self._closed.append((now, interval, state))
        self._memory.append((now, state.memory_bytes))
        while self._closed[0][0] < now - self._window_s:
            _, _, self._base = self._closed.popleft()
        while self._memory[0][0] < now - self._memory_window_s:
            self._memory.popleft()

    def hash_client(self, client: str) -> str:
        return hashlib.blake2b(client.encode(), key=self._salt, digest_size=6).hexdigest()

    def read(self, read_per_s: float) -> Numbers:
        """The numbers of the window that ends now."""
        values: dict[str, list[float]] = {}
        seen: Counter[str] = Counter()
        counts: dict[str, Counter[str]] = {}
        for interval in (*(interval for _, interval, _ in self._closed), self._open):
            for kind, some in interval.values.items():
                values.setdefault(kind, []).extend(some)
            for kind, by_client in interval.counts.items():
                counts.setdefault(kind, Counter()).update(by_client)
            seen.update(interval.seen)
        hashed = {kind: self._hash(by_client) for kind, by_client in counts.items()}
        return Numbers(
            window_s=self._window_s,
            scan_s=values.get("scan", ()),
            queue_wait_s=values.get("queue wait", ()),
            answer_s=values.get("answer", ()),
            answers=seen["answer"],
            push_lag_s=values.get("push lag", ()),
            loop_lag_s=values.get("loop lag", ()),
            chunk_s={kind.removeprefix(_CHUNK): some for kind, some in values.items() if kind.startswith(_CHUNK)},
            polls=hashed.get("poll", {}),
            early=hashed.get("early", {}),
            connects=hashed.get("connect", {}),
            states=[state for _, _, state in self._closed],
            base=self._base,
            memory_bytes=list(self._memory),
            memory_window_s=self._memory_window_s,
            read_per_s=read_per_s,
        )

    def _hash(self, by_client: Mapping[str, int]) -> dict[str, int]:
        return {client if client == OTHERS else self.hash_client(client): count for client, count in by_client.items()}


def read_memory() -> int:
    """Resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


class Timing:
    """Notes how long each answer took until its head was there. A long poll waits on purpose, and is left out."""

    def __init__(self, app: ASGIApp, find_note: Callable[[], Callable[[float], None] | None]) -> None:
        self.app = app
        self._find_note = find_note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note = self._find_note() if scope["type"] == "http" else None
        if note is None or any(name == b"prefer" for name, _ in scope["headers"]):
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        is_noted = False

        async def send_timed(message: Message) -> None:
            nonlocal is_noted
            if not is_noted:
                is_noted = True
                note(time.perf_counter() - began)
            await send(message)

        await self.app(scope, receive, send_timed)
        if not is_noted:  # it was written straight to the transport
            note(time.perf_counter() - began)
