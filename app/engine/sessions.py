"""Who is watching which scan, over whatever transport."""

import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple, Self

from app.core.estimate import Range, hint_poll

EARLY = 0.8  # of the hint; who comes before that has not heeded it
HINT_MAX_S = 60.0  # in an emergency


class Session:
    """A client's presence on one scan."""

    __slots__ = ("hint_s", "seen", "streams", "version")

    def __init__(self, seen: float) -> None:
        self.seen = seen  # when it last polled or left a stream, on the clock of Sessions
        self.streams = 0  # open now
        self.hint_s: float | None = None  # what it was told at its last poll
        self.version: object = None  # what it was shown at its last poll


class Presence:
    """A client's open stream on some scans, given back once; use it in a `with`, or call `close`."""

    __slots__ = ("_sessions", "client", "is_poll", "scan_ids")

    def __init__(self, sessions: "Sessions", client: str, scan_ids: tuple[str, ...], is_poll: bool) -> None:
        self._sessions: Sessions | None = sessions
        self.client = client
        self.is_poll = is_poll
        self.scan_ids = scan_ids

    def close(self) -> None:
        if self._sessions is not None:
            self._sessions.leave(self)
            self._sessions = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SessionStatistics(NamedTuple):
    sessions: int
    streams: int


class Sessions:
    """Sessions by scan and client. A stream holds its session open; one that only polls ends after `idle_s`.

    Past `max_sessions` a poll is answered without a session: it gets no growing hints, and nothing else changes.
    """

    def __init__(self, *, idle_s: float, max_sessions: int, clock: Callable[[], float]) -> None:
        self._idle_s = idle_s
        self._max_sessions = max_sessions
        self._clock = clock
        self._scans: dict[str, dict[str, Session]] = {}
        self._count = 0
        self._streams = 0
        # Active scans: since when nobody watches, None while somebody does.
        self._left: dict[str, float | None] = {}
        self.hint_factor = 1.0  # above 1 in an emergency
        # Who wants to know of polls (ahead of the time that was told, or not) and of streams that are opened.
        self.note_poll: Callable[[str, bool], None] = lambda client, is_early: None
        self.note_stream: Callable[[str], None] = lambda client: None

    def expect(self, scan_id: str) -> None:
        """The scan is active: how long nobody watched it counts from now on, until `forget`."""
        self._left[scan_id] = self._clock()

    def unwatched_s(self, scan_id: str) -> float:
        """For how long nobody has watched; 0 while somebody does."""
        since = self._left.get(scan_id)
        return 0.0 if since is None else self._clock() - since

    def stream(self, client: str, scan_ids: Iterable[str], *, is_poll: bool = False) -> "Presence":
        """Holds a session on each of the scans until it is closed; that of a long poll outlives it, as of any poll."""
        presence = Presence(self, client, tuple(scan_ids), is_poll)
        for scan_id in presence.scan_ids:
            self._open(client, scan_id).streams += 1
        self._streams += len(presence.scan_ids)
        if not is_poll:
            self.note_stream(client)
        return presence

    def leave(self, presence: "Presence") -> None:
        """Takes back what `stream` gave."""
        self._streams -= len(presence.scan_ids)
        for scan_id in presence.scan_ids:
            session = self._scans[scan_id][presence.client]
            session.streams -= 1
            session.seen = self._clock()
            if session.streams == 0 and not presence.is_poll:
                self._close(presence.client, scan_id)

    def poll(
        self, client: str, scan_id: str, version: object, eta_s: Range | None, end_s: float | None = None
    ) -> float:
        """Notes a poll; gives the seconds until the next one is worth making."""
        jitter = zlib.crc32(f"{client} {scan_id}".encode()) / 2**32
        if self._count >= self._max_sessions and client not in self._scans.get(scan_id, {}):
            return hint_poll(eta_s, None, jitter, end_s)
        session, now = self._open(client, scan_id), self._clock()
        told_s = 0.0 if session.hint_s is None else session.hint_s * EARLY
        self.note_poll(client, now - session.seen < told_s)
        session.seen = now
        hint_s = hint_poll(eta_s, session.hint_s if session.version == version else None, jitter, end_s)
        session.hint_s, session.version = hint_s, version
        return hint_s if self.hint_factor == 1 else min(hint_s * self.hint_factor, HINT_MAX_S)

    def is_present(self, client: str, scan_id: str) -> bool:
        """Whether the client has a session on the scan."""
        return client in self._scans.get(scan_id, ())

    def forget(self, scan_id: str) -> None:
        """The scan has ended: nobody needs to be waited for."""
        self._left.pop(scan_id, None)

    def reap(self) -> int:
        """Ends the sessions of clients that polled and came no more; gives their number."""
        before = self._count
        oldest = self._clock() - self._idle_s
        for scan_id, sessions in list(self._scans.items()):
            for client, session in list(sessions.items()):
                if session.streams == 0 and session.seen <= oldest:
                    self._close(client, scan_id)
        return before - self._count

    def _open(self, client: str, scan_id: str) -> Session:
        sessions = self._scans.setdefault(scan_id, {})
        session = sessions.get(client)
        if session is None:
            session = sessions[client] = Session(self._clock())
            self._count += 1
            if scan_id in self._left:
                self._left[scan_id] = None
        return session

    def _close(self, client: str, scan_id: str) -> None:
        sessions = self._scans.get(scan_id, {})
        if sessions.pop(client, None) is not None:
            self._count -= 1
        if not sessions:
            self._scans.pop(scan_id, None)
            if scan_id in self._left:
                self._left[scan_id] = self._clock()

    def statistics(self) -> SessionStatistics:
        return SessionStatistics(self._count, self._streams)
