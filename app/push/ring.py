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
        self._slots = numbers[submissions[6] // 4 :][:ENTRIES]  # which entries are submitted, in turn
        self._order = memoryview(array("I", range(ENTRIES)))
        # Of each entry: operation, socket, address (64 bits), length, flags of the message, and what its result is
        # known by.
        operations, self._sockets, self._lengths, flags, names = (entries.cast("I")[at:] for at in (0, 1, 6, 7, 8))
        self._addresses = entries.cast("Q")[2:]
        names[::_ENTRY] = self._order
        operations[::_ENTRY] = memoryview(array("I", [_SEND]) * ENTRIES)
        flags[::_ENTRY] = memoryview(array("I", [_DONTWAIT | _NOSIGNAL]) * ENTRIES)
        self._fds, self._size = array("I"), 0  # in the entries now

    def send(self, fds: "array[int]", data: bytes) -> list[int]:
        """Gives how many bytes each socket took, or its negative errno. Waits for none: the rest is the caller's.

        `fds` are of type "I", and never change.
        """
        if len(fds) <= ENTRIES:
            return self._send(fds, data)
        return [taken for at in range(0, len(fds), ENTRIES) for taken in self._send(fds[at : at + ENTRIES], data)]

    def _send(self, fds: "array[int]", data: bytes) -> list[int]:
        count, size = len(fds), len(data)
        if fds is not self._fds or size != self._size:  # mostly the same as last time
            self._fds, self._size = fds, size
            self._sockets[: count * _ENTRY : _ENTRY] = memoryview(fds)
            self._lengths[: count * _ENTRY : _ENTRY] = memoryview(array("I", [size]) * count)
        address = array("Q", [ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0])
        self._addresses[: count * _ENTRY // 2 : _ENTRY // 2] = memoryview(address * count)
        start = self._tail[0]
        first = start % ENTRIES
        room = min(count, ENTRIES - first)
        self._slots[first : first + room], self._slots[: count - room] = self._order[:room], self._order[room:count]
        self._tail[0] = (start + count) % 2**32
        done = max(self._call(_ENTER, self._fd, count, count, _GET_EVENTS, None, 0), 0)
        # Where memory is short the kernel looks at some only; what it left must not be done later.
        self._tail[0] = self._read[0] = (start + done) % 2**32
        taken = self._read_results(start, done, 2)
        if taken == array("i", [size]) * count:
            return [size] * count
        # By name: kernels before 6.2 tell of those first that took nothing.
        return [one for _, one in sorted(zip(self._read_results(start, done, 0), taken, strict=True))] + [0] * (
            count - done
        )

    def _read_results(self, start: int, count: int, field: int) -> "array[int]":
        """One of the four numbers of each of these results."""
        first = start % self._results_held
        room = min(count, self._results_held - first)
        results = self._results[field::4]
        return array("i", results[first : first + room].tobytes() + results[: count - room].tobytes())

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
