"""Rules of the ring: what `send` of each socket would do, in one system call, and nothing else."""

import contextlib
import errno
import os
import platform
import random
import socket
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from app.push.ring import ENTRIES, Ring, open_ring

# Refuses io_uring_setup as Docker does: by a filter of system calls (seccomp(2)), which looks at the number.
REFUSED = """
import ctypes, struct
from app.push.ring import open_ring

steps = struct.pack("=" + 4 * "HBBI", 0x20, 0, 0, 0, 0x15, 0, 1, 425, 0x06, 0, 0, 0x50000 | 1, 0x06, 0, 0, 0x7FFF0000)
held = ctypes.create_string_buffer(steps)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(held)))
call = ctypes.CDLL(None, use_errno=True).prctl
assert call(38, 1, 0, 0, 0) == 0 and call(22, 2, program) == 0, ctypes.get_errno()
print(open_ring())
"""


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = open_ring()
    if ring is None:
        pytest.skip("no io_uring for this process")
    yield ring
    ring.close()


@pytest.fixture
def make_pairs() -> Iterator[Callable[[int], list[tuple[socket.socket, socket.socket]]]]:
    with ExitStack() as stack:

        def make(count: int) -> list[tuple[socket.socket, socket.socket]]:
            pairs = [socket.socketpair() for _ in range(count)]
            for one, other in pairs:
                stack.enter_context(one)
                stack.enter_context(other)
                other.setblocking(False)
            return pairs

        yield make


def find_fds(pairs: Any) -> "array[int]":
    return array("I", (mine.fileno() for mine, _ in pairs))


def receive(other: socket.socket) -> bytes:
    data = b""
    try:
        while some := other.recv(1 << 20):
            data += some
    except BlockingIOError:
        pass
    return data


def test_every_socket_gets_the_same_bytes_however_often_the_queue_goes_round(ring: Ring, make_pairs: Any) -> None:
    pairs, counts = make_pairs(300), random.Random(1)
    for turn in range(50):
        some, data = pairs[: counts.randint(1, 300)], os.urandom(counts.randint(1, 2000))
        assert ring.send(find_fds(some), data) == [len(data)] * len(some)
        assert [receive(other) for _, other in pairs] == [data] * len(some) + [b""] * (300 - len(some)), turn


def test_more_sockets_than_the_queue_has_entries(ring: Ring, make_pairs: Any) -> None:
    pairs = make_pairs(20)
    times = ENTRIES // 8
    assert ring.send(find_fds(pairs) * times, b"ab") == [2] * 20 * times
    assert {receive(other) for _, other in pairs} == {b"ab" * times}


def test_who_takes_a_part_or_is_gone_holds_nobody_up(ring: Ring, make_pairs: Any) -> None:
    pairs = make_pairs(4)
    (full, reader), (_, gone) = pairs[1], pairs[2]
    full.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    gone.close()
    data = os.urandom(100_000)
    first, part, error, last = ring.send(find_fds(pairs), data)
    assert (first, last, error) == (100_000, 100_000, -errno.EPIPE)
    assert 0 < part < 100_000
    assert ring.send(find_fds(pairs[1:2]), data) == [-errno.EAGAIN]
    assert receive(reader) == data[:part]


def test_each_result_goes_to_its_socket_in_whatever_order_the_kernel_tells_them(
    ring: Ring, make_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels before 6.2 tell of those first that took nothing."""
    pairs, call, order = make_pairs(200), ring._call, random.Random(2)

    def enter(*args: Any) -> int:
        done = int(call(*args))
        at = (ring._tail[0] - done) % ring._results_held * 4
        told = [ring._results[at + 4 * place : at + 4 * place + 4].tolist() for place in range(done)]
        order.shuffle(told)
        ring._results[at : at + 4 * done] = memoryview(array("i", [number for one in told for number in one]))
        return done

    monkeypatch.setattr(ring, "_call", enter)
    full = [pair for place, pair in enumerate(pairs) if place % 7 == 3]
    for mine, _ in full:
        mine.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                mine.send(b"x" * 100_000)
    for _ in range(10):
        taken = ring.send(find_fds(pairs), b"data")
        assert taken == [-errno.EAGAIN if pair in full else 4 for pair in pairs]


def test_what_the_kernel_did_not_look_at_is_not_sent_later(
    ring: Ring, make_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, call = make_pairs(10), ring._call
    monkeypatch.setattr(ring, "_call", lambda number, fd, count, *rest: call(number, fd, min(count, 3), 0, *rest[1:]))
    assert ring.send(find_fds(pairs), b"first") == [5] * 3 + [0] * 7
    monkeypatch.setattr(ring, "_call", lambda *_: -1)
    assert ring.send(find_fds(pairs), b"lost") == [0] * 10
    monkeypatch.setattr(ring, "_call", call)
    assert ring.send(find_fds(pairs), b"then") == [4] * 10
    assert [receive(other) for _, other in pairs] == [b"firstthen"] * 3 + [b"then"] * 7


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="the number is told to a filter")
def test_where_the_kernel_refuses_there_is_none() -> None:
    said = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=False)
    assert (said.stdout, said.returncode) == ("None\n", 0), said.stderr
