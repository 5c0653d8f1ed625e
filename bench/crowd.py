"""A crowd of subscribers in one lean process: they follow a scan, are cut off all at once, and are back with their
cursors.

    python -m bench.crowd PORT SCAN COUNT WEBSOCKETS

It has plain sockets and one epoll loop, so that a storm of thousands is the server's and not its own. All connect,
and a line of JSON on standard output says so. Then each line on standard input is a command, answered by a line:

    cut AWAY_S   breaks every connection off in the same instant (RST), and so long afterwards opens all again, each
                 with its cursor. The answer comes when each has had an event that none of the others was ahead of
    finish       waits for the end of the scan, and says what came
"""

import json
import os
import re
import resource
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from bench.contenders import ask_sse, ask_websocket

CONCURRENT = 128  # connects under way, when there is no storm
BACK_S = 0.25  # whose connection is broken by the server comes back after this
WITHIN_S = 120
_DURABLE = re.compile(rb'\{"id":"([^"]+)","scan":"[^"]+","seq":(\d+),"type":"(\w+)"')
_TAIL_BYTES = 256  # more than the longest match
_PING, _PONG = b"\x89\x00", b"\x8a\x80\0\0\0\0"
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER that makes close() send RST


@dataclass(slots=True, eq=False)
class Member:
    is_websocket: bool
    peer: socket.socket | None = None
    has_asked: bool = False
    tail: bytes = b""  # what came last, and may be the beginning of an event
    cursor: str = ""
    seq: int = 0
    is_level: bool = False
    is_done: bool = False


@dataclass(slots=True)
class Tally:
    """What came, over all members."""

    received: int = 0
    lost: int = 0  # seqs that were skipped
    twice: int = 0  # events that a member had already
    resets: int = 0
    broken: int = 0  # connections refused or closed by the server before the end
    fewest: int = 0  # the last seq of the member that got the least
    most: int = 0
    busy_s: float = 0  # CPU time of the crowd itself
    level_s: list[float] = field(default_factory=list)


class Crowd:
    def __init__(self, port: int, scan: str, count: int, websockets: int) -> None:
        self._address = ("127.0.0.1", port)
        self._scan = scan
        self.members = [Member(place < websockets) for place in range(count)]
        self.tally = Tally()
        self._front = 0  # the highest seq that any member has
        self._began = 0.0
        self._epoll = select.epoll()
        self._open: dict[int, Member] = {}
        self._away: deque[tuple[float, Member]] = deque()

    def connect(self, member: Member) -> None:
        opened = member.peer = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        member.has_asked, member.tail = False, b""
        opened.connect_ex(self._address)
        self._open[opened.fileno()] = member
        self._epoll.register(opened, select.EPOLLOUT)

    def cut(self) -> None:
        """All in the same instant, so none hears of the others."""
        for member in list(self._open.values()):
            assert member.peer is not None
            member.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._leave(member)
            member.is_level = False

    def turn(self, is_storm: bool) -> None:
        """Takes what has come, with a wait for it."""
        now = time.monotonic()
        connecting = sum(not member.has_asked for member in self._open.values()) if not is_storm else 0
        while self._away and self._away[0][0] <= now and (is_storm or connecting < CONCURRENT):
            self.connect(self._away.popleft()[1])
            connecting += 1
        for number, _ in self._epoll.poll(0.02):
            member = self._open[number]
            if not member.has_asked:
                self._ask(member)
            else:
                self._read(member)

    def back(self, at: float, members: Iterable[Member]) -> None:
        self._began = at
        self._away.extend((at, member) for member in members)

    def _leave(self, member: Member) -> None:
        assert member.peer is not None
        del self._open[member.peer.fileno()]
        member.peer.close()

    def _break(self, member: Member) -> None:
        self.tally.broken += 1
        self._leave(member)
        self._away.append((time.monotonic() + BACK_S, member))

    def _ask(self, member: Member) -> None:
        assert member.peer is not None
        after = f"after={member.cursor}" if member.cursor else ""
        if member.is_websocket:
            request = ask_websocket(f"/v1/ws?scan={self._scan}&{after}", "scanwire.v1")
        else:
            request = ask_sse(f"/v1/scans/{self._scan}/events?{after}")
        try:
            member.peer.send(request)
        except OSError:
            self._break(member)
            return
        member.has_asked = True
        self._epoll.modify(member.peer, select.EPOLLIN)

    def _read(self, member: Member) -> None:
        assert member.peer is not None
        try:
            data = member.peer.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._break(member)
            return
        if member.is_websocket and _PING in data:
            member.peer.send(_PONG)
        data, place = member.tail + data, 0
        for match in _DURABLE.finditer(data):
            place = match.end()
            self._take(member, match)
        self.tally.resets += data.count(b'"type":"reset"', place)
        member.tail = data[max(place, len(data) - _TAIL_BYTES) :]
        if place and member.seq >= self._front:
            self._front = member.seq
            if not member.is_level:
                member.is_level = True
                self.tally.level_s.append(time.monotonic() - self._began)
        if member.is_done:
            self._leave(member)

    def _take(self, member: Member, match: "re.Match[bytes]") -> None:
        cursor, seq, kind = match.groups()
        self.tally.received += 1
        step = int(seq) - member.seq
        if step <= 0:
            self.tally.twice += 1
            return
        self.tally.lost += step - 1
        member.seq, member.cursor, member.is_done = int(seq), cursor.decode(), kind == b"end"

    def turn_until(self, is_so: Callable[[], bool], is_storm: bool = False) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not is_so():
            if time.monotonic() > deadline:
                raise SystemExit(f"the crowd waited for too long; {self.tally}")
            self.turn(is_storm)

    def are_level(self) -> bool:
        return len(self.tally.level_s) == len(self.members)


def main() -> None:
    port, scan, count, websockets = sys.argv[1:]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    crowd = Crowd(int(port), scan, int(count), int(websockets))
    crowd.back(time.monotonic(), crowd.members)
    crowd.turn_until(crowd.are_level)
    _say(connect_s=max(crowd.tally.level_s))
    for line in _read_lines(crowd):
        name, *words = line.split()
        crowd.tally.level_s.clear()
        if name == "cut":
            crowd.cut()
            crowd.back(time.monotonic() + float(words[0]), crowd.members)
            crowd.turn_until(crowd.are_level, is_storm=True)
            level_s = sorted(crowd.tally.level_s)
            _say(p50_s=level_s[len(level_s) // 2], p99_s=level_s[int(len(level_s) * 0.99)], max_s=level_s[-1])
        else:
            crowd.turn_until(lambda: all(member.is_done for member in crowd.members))
            seqs = [member.seq for member in crowd.members]
            tally = crowd.tally
            tally.fewest, tally.most, tally.busy_s = min(seqs), max(seqs), time.process_time()
            _say(**{name: getattr(tally, name) for name in tally.__slots__ if name != "level_s"})


def _read_lines(crowd: Crowd) -> Iterable[str]:
    """Commands, one after the other; the crowd goes on meanwhile."""
    os.set_blocking(sys.stdin.fileno(), False)
    held = b""
    while True:
        try:
            data = os.read(sys.stdin.fileno(), 1 << 12)
        except BlockingIOError:
            crowd.turn(False)
            continue
        if not data:
            return
        *lines, held = (held + data).split(b"\n")
        yield from (line.decode() for line in lines)


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
