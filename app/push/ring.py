"""The same bytes to many sockets in one system call: Linux's io_uring (io_uring_enter(2)).

A transport makes a system call for each write. Of what a write costs beside the work of the kernel's network, most is
the way there and back, and a ring makes it once for all. Where there is none (another system, a kernel before 5.6, the
seccomp profile of Docker), everything goes by the transports.
"""

import asyncio
import contextlib
import ctypes
import mmap
import os
import socket
import sys
from array import array

# From <linux/io_uring.h> and <sys/socket.h>; the same on all architectures.
_SETUP, _ENTER = 425, 426  # system calls
_SINGLE_MMAP = 1  # a feature: both queues are in one piece of memory
_SQES_OFFSET = 0x10000000
_SEND, _DONTWAIT, _NOSIGNAL = 26, 0x40, 0x4000
_GET_EVENTS = 1  # the call returns when all that was submitted is done
_ENTRY = 16  # 32-bit numbers in an entry of the submission queue
ENTRIES = 512


class Ring:
    """The queues that this process shares with the kernel. Not for several threads at once.

    Raises OSError where the kernel has none for this process.
    """

    def __init__(self) -> None:
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        params = (ctypes.c_uint32 * 30)()  # struct io_uring_params
        self._fd: int = self._call(_SETUP, ENTRIES, params)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "io_uring_setup")
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            if not params[5] & _SINGLE_MMAP:
                raise OSError("io_uring_setup: the kernel is too old")
            submissions, completions = params[10:20], params[20:30]  # offsets
            self._results_held = params[1]
            queues = mmap.mmap(self._fd, max(submissions[6] + 4 * ENTRIES, completions[5] + 16 * self._results_held))
            entries = memoryview(mmap.mmap(self._fd, 4 * _ENTRY * ENTRIES, offset=_SQES_OFFSET))
            stack.pop_all()
        numbers = memoryview(queues).cast("I")
        self._tail = numbers[submissions[1] // 4 :][:1]
        self._read = numbers[completions[0] // 4 :][:1]
        self._results = memoryview(queues)[completions[5] :][: 16 * self._results_held].cast("i")
        numbers[submissions[6] // 4 :][:ENTRIES] = memoryview(array("I", range(ENTRIES)))
        # Of each entry: operation, socket, address (64 bits), length, flags of the message, and what its result is
        # known by.
        operations, self._sockets, self._lengths, flags, names = (entries.cast("I")[at:] for at in (0, 1, 6, 7, 8))
        self._addresses = entries.cast("Q")[2:]
        names[::_ENTRY] = memoryview(array("I", range(ENTRIES)))
        operations[::_ENTRY] = memoryview(array("I", [_SEND]) * ENTRIES)
        flags[::_ENTRY] = memoryview(array("I", [_DONTWAIT | _NOSIGNAL]) * ENTRIES)

    def send(self, fds: "array[int]", data: bytes) -> list[int]:
        """Gives how many bytes each socket took, or its negative errno. Waits for none: the rest is the caller's.

        `fds` are of type "I".
        """
        address = array("Q", [ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0])
        length, sockets, taken = array("I", [len(data)]), memoryview(fds), list[int]()
        while len(taken) < len(fds):
            first = self._tail[0] % ENTRIES
            count = min(len(fds) - len(taken), ENTRIES - first)
            begin, end = first * _ENTRY, (first + count) * _ENTRY - _ENTRY + 1
            self._sockets[begin:end:_ENTRY] = sockets[len(taken) :][:count]
            self._lengths[begin:end:_ENTRY] = memoryview(length * count)
            self._addresses[begin // 2 : end // 2 + 1 : _ENTRY // 2] = memoryview(address * count)
            taken += self._submit(count, len(data))
        return taken

    def _submit(self, count: int, size: int) -> list[int]:
        """The results of the next so many entries, in their order; most are `size`."""
        start = self._tail[0]
        self._tail[0] = (start + count) % 2**32
        done = max(self._call(_ENTER, self._fd, count, count, _GET_EVENTS, None, 0), 0)
        # Where memory is short the kernel looks at some only; what it left must not be done later.
        self._tail[0] = self._read[0] = (start + done) % 2**32
        at = start % self._results_held * 4
        results = self._results[at + 2 : at + 4 * done : 4]
        if results.tobytes() == (array("i", [size]) * count).tobytes():
            return [size] * count
        # By name: kernels before 6.2 tell of those first that took nothing.
        names = self._results[at : at + 4 * done : 4]
        return [result for _, result in sorted(zip(names, results, strict=True))] + [0] * (count - done)

    def close(self) -> None:
        os.close(self._fd)


def open_ring() -> Ring | None:
    """A ring that was seen to work, or None."""
    if sys.platform != "linux":
        return None
    try:
        ring = Ring()
    except OSError:
        return None
    mine, other = socket.socketpair()
    with mine, other:
        if ring.send(array("I", [mine.fileno()]), b"ring") == [4]:
            return ring
    ring.close()
    return None


def find_fd(transport: asyncio.BaseTransport) -> int:
    """Of the socket where a ring may write while the transport holds nothing; -1 when it is gone, or encrypts."""
    peer, is_encrypted = transport.get_extra_info("socket"), transport.get_extra_info("sslcontext") is not None
    return -1 if peer is None or is_encrypted else int(peer.fileno())
