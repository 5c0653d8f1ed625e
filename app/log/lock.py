"""The lock on a state directory: one process works in it, and one more may wait for its turn."""

import contextlib
import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NamedTuple

import orjson

from app.core.errors import JournalUnavailable


class Holder(NamedTuple):
    """Who holds a lock, by its own account: it wrote this down once it had the lock."""

    pid: int
    since: str  # UTC, by the wall clock, for people


class StateLock:
    """Held by one process at a time; the system gives it back when that process ends, however it ends.

    Two processes on one journal would give the same numbers to different events. Whoever waits for the lock holds the
    lock on a second file beside it, its turn: so there is one successor at the most, and the holder can see that
    there is one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._turn_path = path.with_suffix(".next")
        self._file: IO[bytes] | None = None
        self._turn: IO[bytes] | None = None

    def acquire(self) -> None:
        """Raises JournalUnavailable, which names the holder; OSError for a directory that cannot be used."""
        if not self.try_acquire():
            holder = self.find_holder()
            who = f"Another Scanwire ({describe(holder)})" if holder is not None else "Another Scanwire"
            raise JournalUnavailable(f"{who} is running on {self.path.parent}. {ADVICE}")

    def try_acquire(self) -> bool:
        """Whether the lock is held here now. Raises OSError."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _lock(self.path)
            if self._file is not None:
                self._write_note(self._file)
                self._end_turn()
        return self._file is not None

    def _write_note(self, file: IO[bytes]) -> None:
        note = Holder(os.getpid(), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        with contextlib.suppress(OSError):  # a full disk is no reason not to start; others are told less
            file.truncate(0)
            file.write(orjson.dumps(note._asdict()) + b"\n")
            file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._end_turn()

    def find_holder(self) -> Holder | None:
        """What the holder wrote down; None when nobody holds the lock, or nothing can be read."""
        try:
            if not _is_locked(self.path):
                return None
            return Holder(**orjson.loads(self.path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def is_held(self) -> bool:
        """Whether some process holds the lock, this one or another."""
        return _is_locked(self.path)

    # The turn of the successor

    def take_turn(self) -> bool:
        """Whether this process is the one that is next; kept until it has the lock, or `release`."""
        if self._turn is None:
            self._turn = _lock(self._turn_path)
        return self._turn is not None

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._turn.close()
            self._turn = None

    def is_wanted(self) -> bool:
        """Whether a successor waits for the lock."""
        return _is_locked(self._turn_path)


ADVICE = (
    "`scanwire serve --takeover` asks it to end and goes on in its place. Or name another directory with "
    "SCANWIRE_STATE_DIR."
)


def describe(holder: Holder) -> str:
    return f"pid {holder.pid}, since {holder.since}"


def _lock(path: Path) -> IO[bytes] | None:
    """The file, locked; None when another has it. Opened for appending: what the other wrote stays."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
