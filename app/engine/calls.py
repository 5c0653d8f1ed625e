"""The main program of a worker process: it answers one call after another, until its pipe or its parent ends.

A call is the length of a pickle and the pickle. The answer is the byte TAKEN as soon as the call is read, and then the
length of a pickle and the pickle.
"""

import ctypes
import faulthandler
import os
import pickle
import resource
import signal
import sys
from typing import Any, BinaryIO

LENGTH_BYTES = 8
TAKEN = b"+"
OUT_OF_MEMORY = 77  # the exit code that says so
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, of prctl(2)


def main() -> None:
    parent, memory_mb = map(int, sys.argv[1:])
    _end_with(parent)
    _bound_memory(memory_mb)
    calls, answers = _take_pipes()
    try:
        while length := calls.read(LENGTH_BYTES):
            call = calls.read(int.from_bytes(length))
            answers.write(TAKEN)
            answers.flush()
            answer = _answer(call)
            answers.write(len(answer).to_bytes(LENGTH_BYTES) + answer)
            answers.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def _end_with(parent: int) -> None:
    """A parent that is killed ends this process too, even one that hangs; elsewhere than on Linux its pipe does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before this was said
            os._exit(1)


def _bound_memory(memory_mb: int) -> None:
    """What is written to counts, not what is mapped: a library may reserve far more addresses than it uses."""
    if memory_mb:
        size = memory_mb * 2**20
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard != resource.RLIM_INFINITY:
            size = min(size, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The ways in and out, where no print of a scanner or of a library's can get into them."""
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    faulthandler.enable()  # what it shows of a fault goes to the server's log
    return calls, answers


def _answer(call: bytes) -> bytes:
    """What a function gave or raised, ready to send. One that leaves the program, or has no memory, ends it."""
    try:
        function, args = pickle.loads(call)
        return _pack(True, function(*args))
    except MemoryError:
        raise
    except Exception as error:
        try:
            return _pack(False, error)
        except MemoryError:
            raise
        except Exception as unsendable:
            return _pack(False, RuntimeError(f"{type(error).__name__} cannot be sent: {unsendable}"))


def _pack(is_result: bool, value: Any) -> bytes:
    return pickle.dumps((is_result, value), pickle.HIGHEST_PROTOCOL)


if __name__ == "__main__":
    main()
