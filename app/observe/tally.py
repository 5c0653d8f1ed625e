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
_CHARGED = "charged to "
_random = Random().random  # of its own: nobody's seed is touched


class State(NamedTuple):
    """The gauges and counters of one moment. Counters count from the start."""

    memory_bytes: int = 0
    workers_bytes: int = 0
    cpu_s: float = 0.0
    running: int = 0
    slots: int = 1
    queued: int = 0
    streams: int = 0
    behind: Mapping[str, int] = {}  # streams whose peers do not take what is written, by client
    most_streams: Mapping[str, int] = {}  # the client that has most streams open, and their number
    pushed: int = 0
    refused: Mapping[str, int] = {}  # by limit
    blocks: int = 0  # times that the event loop was found blocked


class Memory(NamedTuple):
    """What is resident of the server and its workers, at a time in seconds."""

    at: float
    server_bytes: int
    workers_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.server_bytes + self.workers_bytes


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
    charged: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # by limit, by client; reads are the polls
    states: Sequence[State] = ()  # oldest first; clients hashed
    base: State = field(default_factory=State)  # at the beginning of the window
    memory: Sequence[Memory] = ()  # over the last `memory_window_s`
    memory_window_s: float = 0.0

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

    def count(self, kind: str, client: str, times: int = 1) -> None:
        counts = self.counts.get(kind)
        if counts is None:
            counts = self.counts[kind] = Counter()
        counts[client] += times

    def close(self) -> None:
        """Lets go of all clients but those who did most."""
        for kind, counts in self.counts.items():
            self.counts[kind] = keep_most(counts)


def keep_most(counts: Counter[str]) -> Counter[str]:
    """By client; what those beyond CLIENTS_KEPT did is one sum."""
    if len(counts) <= CLIENTS_KEPT:
        return counts
    most = Counter(dict(counts.most_common(CLIENTS_KEPT)))
    most[OTHERS] = counts.total() - most.total()
    return most


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
        self._memory: deque[Memory] = deque(maxlen=INTERVALS_KEPT)
        # What was charged since it was asked last, by limit and client.
        self.take_charged: Callable[[], Mapping[tuple[str, str], int]] = dict

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
        for (limit, client), count in self.take_charged().items():
            interval.count(f"{_CHARGED}{limit}", client, count)
        interval.close()
        state = state._replace(
            behind=self._hash(keep_most(Counter(state.behind))), most_streams=self._hash(state.most_streams)
        )
        self._closed.append((now, interval, state))
        self._memory.append(Memory(now, state.memory_bytes, state.workers_bytes))
        while self._closed[0][0] < now - self._window_s:
            _, _, self._base = self._closed.popleft()
        while self._memory[0].at < now - self._memory_window_s:
            self._memory.popleft()

    def hash_client(self, client: str) -> str:
        return hashlib.blake2b(client.encode(), key=self._salt, digest_size=6).hexdigest()

    def read(self) -> Numbers:
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
            charged={kind.removeprefix(_CHARGED): by for kind, by in hashed.items() if kind.startswith(_CHARGED)},
            states=[state for _, _, state in self._closed],
            base=self._base,
            memory=list(self._memory),
            memory_window_s=self._memory_window_s,
        )

    def _hash(self, by_client: Mapping[str, int]) -> dict[str, int]:
        return {client if client == OTHERS else self.hash_client(client): count for client, count in by_client.items()}


def read_memory(pid: int | str = "self", column: int = 1) -> int:
    """Resident memory of a process in bytes, of this one when none is named; 0 where the system does not tell.

    Column 0 has its virtual memory.
    """
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[column]) * os.sysconf("SC_PAGE_SIZE")
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
