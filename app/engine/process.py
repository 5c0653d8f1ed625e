"""A worker process as the server sees it: asked over its pipes, and heard to its last word."""

import asyncio
import contextlib
import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import Any, cast

from app.engine.calls import LENGTH_BYTES, OUT_OF_MEMORY, TAKEN

SAID_BYTES = 4096  # of what a process wrote to stderr, the end is kept
PIPES_CLOSE_S = 1.0  # what a dead process wrote is read for so long, when something that it started holds its pipes
_NO_MEMORY = b"memory allocation of "  # Rust's last words before it aborts


class WorkerDied(Exception):
    """A process ended in the middle of a call, or had to be; `reason` says how, after "the worker process"."""

    def __init__(self, reason: str, said: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.said = said  # its last words: for the log alone


class WorkerProcess(asyncio.SubprocessProtocol):
    """One process that answers one call at a time. Its death ends the call with WorkerDied, which says the reason.

    It is in `alive` from its start until it is dead, reaped, and its pipes are closed.
    """

    def __init__(self, memory_mb: int, alive: "set[WorkerProcess]") -> None:
        self._memory_mb = memory_mb
        self._alive = alive
        self._transport: asyncio.SubprocessTransport
        self._answer = bytearray()
        self._waiter: asyncio.Future[bytes] | None = None
        self._said = b""
        self._has_no_memory = False
        self.has_taken = False  # the call that it was asked last
        self.is_free = False  # it lives and has answered that call
        self.ended = asyncio.Event()

    @classmethod
    async def start(cls, memory_mb: int, alive: "set[WorkerProcess]") -> "WorkerProcess":
        """A process that loads what it needs with its first call. `memory_mb` bounds what it writes to; 0 does not."""
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        _, process = await asyncio.get_running_loop().subprocess_exec(
            lambda: cls(memory_mb, alive),
            *(sys.executable, "-P", "-m", "app.engine.calls", str(os.getpid()), str(memory_mb)),
            env=os.environ | {"PYTHONPATH": path},
        )
        return process

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function gives or raises there; WorkerDied when the process dies first.

        A call that is cancelled goes on there: end the process then.
        """
        self.has_taken = self.is_free = False
        call = pickle.dumps((function, args), pickle.HIGHEST_PROTOCOL)
        if self.ended.is_set():
            raise self._explain()
        self._waiter = asyncio.get_running_loop().create_future()
        stdin = cast(asyncio.WriteTransport, self._transport.get_pipe_transport(0))
        stdin.write(len(call).to_bytes(LENGTH_BYTES) + call)
        is_result, value = pickle.loads(await self._waiter)
        if not is_result:
            raise value
        return value

    @property
    def pid(self) -> int:
        return self._transport.get_pid()

    def kill(self) -> None:
        """The process is about to end; `ended` says when it has."""
        with contextlib.suppress(ProcessLookupError):
            self._transport.kill()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)
        self._alive.add(self)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:
            said = self._said + data
            self._has_no_memory |= _NO_MEMORY in said  # a long stack may follow
            self._said = said[-SAID_BYTES:]
            return
        if not self.has_taken:
            self.has_taken, data = True, data.removeprefix(TAKEN)
        answer = self._answer
        answer += data
        if len(answer) >= LENGTH_BYTES and len(answer) == LENGTH_BYTES + int.from_bytes(answer[:LENGTH_BYTES]):
            payload = bytes(memoryview(answer)[LENGTH_BYTES:])
            answer.clear()
            self.is_free = True
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(payload)

    def process_exited(self) -> None:
        asyncio.get_running_loop().call_later(PIPES_CLOSE_S, self._transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport.close()
        self._alive.discard(self)
        self.is_free = False
        self.ended.set()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self._explain())

    def _explain(self) -> WorkerDied:
        code = self._transport.get_returncode() or 0
        if code == OUT_OF_MEMORY or (code == -signal.SIGABRT and self._has_no_memory):
            reason = f"ran out of its memory of {self._memory_mb} MB" if self._memory_mb else "ran out of memory"
        elif code < 0:
            reason = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        else:
            reason = f"ended by itself with exit code {code}"
        return WorkerDied(reason, self._said.decode(errors="replace"))
