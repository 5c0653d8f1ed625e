"""The load: bench/load.c, compiled when a bench starts.

It is in C because Python could not keep up: one core of it took in 176,000 deliveries a second from the write() loop,
with 29 ms at p99, where this one took in 228,000 with 4 ms, which is all that the loop can send.
"""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "load.c"


@dataclass(frozen=True, slots=True)
class Reception:
    """What arrived at all subscribers of one load."""

    expected: int
    received: int
    fewest: int  # events on the connection that got the fewest
    disordered: int  # events that came twice, or behind a later one
    closed: int  # connections that the server closed
    bytes: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    events_s: float  # from the first event to the last
    whole_s: float  # from the first connect to the last event
    fewest_beats: int  # heartbeats on the connection that got the fewest
    longest_gap_s: float  # without a heartbeat on any connection, once all were ready
    load_cpu_s: float  # of the load itself: near to whole_s, it is what was measured

    @property
    def fault(self) -> str:
        """What is wrong with it, or nothing."""
        if self.received != self.expected:
            return f"{self.expected:,} deliveries were expected and {self.received:,} came"
        if self.disordered:
            return f"{self.disordered:,} deliveries came twice or out of order"
        return ""


@dataclass(frozen=True, slots=True)
class Subscription:
    """How to subscribe: one request a connection, round and round, and what must come before it counts as ready."""

    requests: Sequence[bytes]
    ready: str = ""
    then: bytes = b""  # sent once the head of the answer is there


class Load:
    """Connections of one load process, all of them ready."""

    def __init__(self, process: "subprocess.Popen[bytes]", connect_s: float) -> None:
        self._process = process
        self.connect_s = connect_s  # from the first connect until all were ready

    def wait(self) -> Reception:
        """Waits until every event has arrived, or the load's time is up."""
        return Reception(**_read_line(self._process))


@contextlib.contextmanager
def subscribe(
    program: Path,
    port: int,
    subscription: Subscription,
    *,
    connections: int,
    events: int,
    within_s: float,
    cpus: set[int] | None = None,
    concurrent: int = 128,
    stalled: int = 0,
    heartbeats: bool = False,
) -> Iterator[Load]:
    """Connects, and waits for `events` on every connection. The connections are closed when the block is left."""
    options: dict[str, Any] = {"-p": port, "-n": connections, "-e": events, "-s": within_s, "-c": concurrent}
    options |= {"-k": stalled, "-t": subscription.then}
    options |= {"-r": subscription.ready} if subscription.ready else {}
    words: list[str | bytes] = [str(program), *(["-b"] if heartbeats else [])]
    for name, value in options.items():
        words += [name, value if isinstance(value, bytes) else str(value)]
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
    )
    try:
        assert process.stdin is not None
        process.stdin.write(b"".join(request + b"\0" for request in subscription.requests))
        process.stdin.close()
        yield Load(process, _read_line(process)["connect_s"])
    finally:
        process.kill()
        process.wait()


def _read_line(process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise LoadFailed("the load ended early; it said why above")
    values: dict[str, Any] = json.loads(line)
    return values


class LoadFailed(Exception):
    """The load could not do its work: a connection was refused, or closed before it was ready."""


def compile_c(source: Path, folder: Path) -> Path:
    """The program made of one C file. Raises LookupError without a compiler."""
    if shutil.which("cc") is None:
        raise LookupError("a C compiler (cc)")
    program = folder / source.stem
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", program, source], check=True)
    return program
