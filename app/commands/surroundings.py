"""What is in a server's way on its own machine, as `scanwire doctor` finds it, and the clean way out of each."""

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from app.application import SAMPLE_NAME
from app.commands.environment import CommandFailed, name_command, read_settings
from app.commands.holder import (
    LOCK_NAME,
    Process,
    end_server,
    find_port_holder,
    is_open,
    list_users,
    name_port_holder,
)
from app.core.settings import JOURNAL_NAME, Settings
from app.log.lock import StateLock
from app.log.sqlite import close_journal

ABANDONED_S = 600  # a file that is being made has not been left alone for so long


class Finding:
    """Something on this machine: what it is, what to do about it, and what can be done from here, if anything."""

    def __init__(
        self, what: str, advice: str, is_wrong: bool, offer: str = "", mend: Callable[[], str] | None = None
    ) -> None:
        self.what = what
        self.advice = advice
        self.is_wrong = is_wrong
        self.offer = offer
        self._mend = mend

    def mend(self) -> str | None:
        """Does what is offered; gives what came of it. Afterwards nothing is wrong, if it worked."""
        if self._mend is None:
            return None
        try:
            done = self._mend()
        except CommandFailed as failure:
            return str(failure)
        self.is_wrong = False
        return done

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "advice": self.advice, "is_wrong": self.is_wrong, "offer": self.offer or None}


def look_around(url: str, state_dir: Path | None, *, is_answering: bool) -> list[Finding]:
    """Who holds the port, who works in the state directory, and what crashed servers left. Raises CommandFailed."""
    settings = read_settings(state_dir=state_dir)
    port = _read_port(url)
    at_port = [] if port is None else [_look_at_port(port, is_answering, settings)]
    return [*at_port, *_look_at_directory(port, is_answering, settings), *_look_for_leftovers(settings.state_dir)]


def _read_port(url: str) -> int | None:
    try:
        parts = urlsplit(url)
        return parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return None


def _look_at_port(port: int, is_answering: bool, settings: Settings) -> Finding:
    told, holder = name_port_holder(port), find_port_holder(port)
    if is_answering:
        return Finding(f"Port {port} answers. {told}".rstrip(), "", False)
    if not told or holder is None:
        what = f"Nobody that this user may look at holds port {port}."
        return Finding(what, f"Start with: {name_command()} serve", True)
    what = f"Port {port} does not answer as it should. {told}"
    if holder.is_server:
        return _offer_end(what, f"`kill {holder.pid}` asks it to end in order.", True, holder, settings)
    advice = f"If that is not meant: `kill {holder.pid}` asks it to end. Or serve on another port, with --port."
    return Finding(what, advice, True)


def _offer_end(what: str, advice: str, is_wrong: bool, process: Process, settings: Settings) -> Finding:
    """Offers to end a process only where it is a server beyond doubt."""

    def end() -> str:
        began = time.monotonic()
        if not end_server(process, settings.takeover_wait_s):
            raise CommandFailed(
                f"pid {process.pid} was asked to end, and has not after {settings.takeover_wait_s:g} s. Its log says "
                f"what it waits for. If nothing else helps: `kill -9 {process.pid}`; what it committed is kept."
            )
        return f"pid {process.pid} has ended, after {time.monotonic() - began:.1f} s."

    if not process.is_server:
        return Finding(what, advice, is_wrong)
    return Finding(what, advice, is_wrong, f"End pid {process.pid} in order (SIGTERM)", end)


def _look_at_directory(port: int | None, is_answering: bool, settings: Settings) -> list[Finding]:
    state_dir = settings.state_dir
    lock = StateLock(state_dir / LOCK_NAME)
    users, holder = list_users(state_dir), lock.find_holder()
    findings = []
    for user in users:
        is_asked = any(urlsplit(served).port == port for served in user.urls)
        where = f", serving on {', '.join(user.urls)}" if user.urls else ""
        what = f"pid {user.pid} works in {state_dir}{where}: {user.command}"
        if holder is not None and user.pid == holder.pid:
            advice = f"`kill {user.pid}` ends it in order; `{name_command()} serve --takeover` goes on in its place."
            if is_asked:  # it is the one that was asked, or was told of with its port
                findings.append(Finding(what, advice if is_answering else "", False))
            else:
                findings.append(_offer_end(what, advice, False, user, settings))
        elif not is_asked or is_answering:
            advice = f"It does not hold the lock that is there, and must not write: `kill {user.pid}` asks it to end."
            findings.append(_offer_end(what, advice, True, user, settings))
    if lock.is_held() and not users:
        who = "" if holder is None else f" (pid {holder.pid} by its own account)"
        findings.append(Finding(f"{state_dir} is held by a process that cannot be looked into{who}.", "", False))
    return findings


def _look_for_leftovers(state_dir: Path) -> list[Finding]:
    lock = StateLock(state_dir / LOCK_NAME)
    if lock.is_held() or list_users(state_dir):
        return []
    findings = []
    wal = state_dir / f"{JOURNAL_NAME}-wal"
    if wal.is_file() and wal.stat().st_size:
        findings.append(
            Finding(
                f"The last server on {state_dir} did not stop in order: its journal was not closed.",
                f"Nothing that was accepted is lost. The next start goes on from there: {name_command()} serve",
                True,
                "Close its journal, with all that was accepted",
                lambda: _close(lock, state_dir / JOURNAL_NAME),
            )
        )
    abandoned = [path for path in state_dir.glob(f".{SAMPLE_NAME}.*") if _is_abandoned(path)]
    if abandoned:
        size = sum(path.stat().st_size for path in abandoned) / 2**20
        findings.append(
            Finding(
                f"A server that crashed while it made the sample prices left {_count(abandoned)} ({size:,.1f} MB): "
                f"{', '.join(map(str, abandoned))}",
                "They are not used: remove them.",
                True,
                "Remove what it left",
                lambda: _remove(lock, abandoned),
            )
        )
    return findings


def _count(paths: list[Path]) -> str:
    return f"{len(paths)} file{'s' * (len(paths) != 1)}"


def _is_abandoned(path: Path) -> bool:
    return path.is_file() and time.time() - path.stat().st_mtime > ABANDONED_S and not is_open(path)


def _close(lock: StateLock, path: Path) -> str:
    with _Held(lock):
        try:
            close_journal(path)
        except sqlite3.Error as error:
            where = f"--state-dir {path.parent}"
            raise CommandFailed(f"It cannot be closed: {error}. See: {name_command()} journal check {where}") from None
    return "It is closed. The next start goes on with the scans that had not ended."


def _remove(lock: StateLock, paths: list[Path]) -> str:
    with _Held(lock):
        removed = [path for path in paths if _is_abandoned(path)]
        for path in removed:
            path.unlink(missing_ok=True)
    return f"{len(removed)} of {len(paths)} removed."


class _Held:
    """The lock, for a moment: no server starts meanwhile. Raises CommandFailed when one has it."""

    def __init__(self, lock: StateLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        try:
            if self._lock.try_acquire():
                return
        except OSError as error:
            raise CommandFailed(f"{self._lock.path.parent} cannot be written: {error.strerror}.") from None
        raise CommandFailed("A server has started there meanwhile: nothing was changed.")

    def __exit__(self, *_: object) -> None:
        self._lock.release()
