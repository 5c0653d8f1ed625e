"""What the service does, over a sliding window: noted where it happens, and read as one set of numbers."""

import hashlib
import os
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEPT = 20_000  # of the latest values of each kind
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
    push_lag_s: Sequence[float] = ()
    loop_lag_s: Sequence[float] = ()
    chunk_s: Mapping[str, Sequence[float]] = field(default_factory=dict)  # by scanner
    polls: Mapping[str, int] = field(default_factory=dict)  # by client, hashed
    early: Mapping[str, int] = field(default_factory=dict)  # polls before the time that the client was told
    connects: Mapping[str, int] = field(default_factory=dict)  # streams opened, by client
    states: Sequence[State] = ()  # oldest first
    memory_bytes: Sequence[tuple[float, int]] = ()  # seconds, bytes; over the last `memory_window_s`
    memory_window_s: float = 0.0
    cores: int = 1
    read_per_s: float = 5.0  # that the limit lets one client in with

    def rise(self, name: str) -> int:
        """By how much a counter of State rose."""
        return int(getattr(self.states[-1], name) - getattr(self.states[0], name)) if self.states else 0

    @property
    def refused(self) -> dict[str, int]:
        """Refusals by limit."""
        if not self.states:
            return {}
        first, last = self.states[0].refused, self.states[-1].refused
        return {name: count - first.get(name, 0) for name, count in last.items() if count > first.get(name, 0)}


Value = TypeVar("Value")


class Window(Generic[Value]):
    """The values of the last while, each with its moment; the oldest are dropped past KEPT."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._values: deque[tuple[float, Value]] = deque(maxlen=KEPT)

    def note(self, value: Value) -> None:
        self._values.append((self._clock(), value))

    def read(self, window_s: float) -> list[tuple[float, Value]]:
        since = self._clock() - window_s
        while self._values and self._values[0][0] < since:
            self._values.popleft()
        return list(self._values)

    def values(self, window_s: float) -> list[Value]:
        return [value for _, value in self.read(window_s)]


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
        self._scans: Window[tuple[float, float]] = Window(clock)
        self._answers: Window[float] = Window(clock)
        self._push_lags: Window[float] = Window(clock)
        self._loop_lags: Window[float] = Window(clock)
        self._chunks: Window[tuple[str, float]] = Window(clock)
        self._polls: Window[tuple[str, bool]] = Window(clock)
        self._connects: Window[str] = Window(clock)
        self._states: Window[State] = Window(clock)
        self._memory: Window[int] = Window(clock)
        self.note_answer = self._answers.note
        self.note_push_lag = self._push_lags.note
        self.note_loop_lag = self._loop_lags.note
        self.note_connect = self._connects.note

    def note_scan(self, queue_wait_s: float, scan_s: float) -> None:
        self._scans.note((queue_wait_s, scan_s))

    def note_chunk(self, scanner: str, seconds: float) -> None:
        self._chunks.note((scanner, seconds))

    def note_poll(self, client: str, is_early: bool) -> None:
        self._polls.note((client, is_early))

    def sample(self) -> None:
        """Takes the state of this moment."""
        state = self._read_state()
        self._states.note(state)
        self._memory.note(state.memory_bytes)

    def hash_client(self, client: str) -> str:
        return hashlib.blake2b(client.encode(), key=self._salt, digest_size=6).hexdigest()

    def read(self, read_per_s: float) -> Numbers:
        """The numbers of the window that ends now."""
        window_s = self._window_s
        chunks: dict[str, list[float]] = {}
        for scanner, seconds in self._chunks.values(window_s):
            chunks.setdefault(scanner, []).append(seconds)
        polls = self._polls.values(window_s)
        scans = self._scans.values(window_s)
        return Numbers(
            window_s=window_s,
            scan_s=[scan_s for _, scan_s in scans],
            queue_wait_s=[wait_s for wait_s, _ in scans],
            answer_s=self._answers.values(window_s),
            push_lag_s=self._push_lags.values(window_s),
            loop_lag_s=self._loop_lags.values(window_s),
            chunk_s=chunks,
            polls=self._count(client for client, _ in polls),
            early=self._count(client for client, is_early in polls if is_early),
            connects=self._count(self._connects.values(window_s)),
            states=self._states.values(window_s),
            memory_bytes=self._memory.read(self._memory_window_s),
            memory_window_s=self._memory_window_s,
            cores=os.cpu_count() or 1,
            read_per_s=read_per_s,
        )

    def _count(self, clients: Iterable[str]) -> dict[str, int]:
        return {self.hash_client(client): count for client, count in Counter(clients).items()}


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
