"""Who holds the port or the state directory that a start needs, as far as the system tells; and taking it over.

What is read of other processes is in Linux' /proc, and of those alone that this user may look into. Where there is
nothing to read, nothing is said.
"""

import asyncio
import contextlib
import os
import select
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from app.commands.environment import CommandFailed
from app.core.settings import JOURNAL_NAME
from app.log.lock import ADVICE, StateLock, describe

PROC = Path("/proc")
LOCK_NAME = "journal.lock"
TRY_EVERY_S = 0.01  # whether port and lock are free yet
_LISTENS = "0A"  # the state of a socket in /proc/net/tcp
_MAX_COMMAND = 160


# Looking


def refuse_if_held(state_dir: Path) -> None:
    """Raises CommandFailed when a process works in the state directory: who, where it serves, and what to do."""
    lock = StateLock(state_dir / LOCK_NAME)
    if lock.is_held():
        raise CommandFailed(f"Another Scanwire{_describe_holder(lock)} is running on {state_dir}. {ADVICE}")


def _describe_holder(lock: StateLock) -> str:
    holder = lock.find_holder()
    if holder is None:
        return ""
    urls = [f"serving on {url}" for url in sorted(_find_urls(holder.pid))] if _holds(holder.pid, lock.path) else []
    return f" ({', '.join([describe(holder), *urls])})"


def name_port_holder(port: int) -> str:
    """A sentence about the process that listens on a port; empty where the system does not tell."""
    holder = find_port_holder(port)
    if holder is None:
        return ""
    locks = [Path(link) for _, link in _list_files(holder.pid) if Path(link).name == LOCK_NAME]
    kind = "".join(f", a Scanwire on {lock.parent}" for lock in locks if _holds(holder.pid, lock))
    return f"It is held by pid {holder.pid} ({holder.command}){kind}."


def find_port_holder(port: int) -> "Process | None":
    """The process that listens on a port; None where the system does not tell."""
    inodes = {inode for inode, (_, listening) in _list_listeners().items() if listening == port}
    for pid in _list_pids() if inodes else ():
        if not inodes.isdisjoint(_read_inode(link) for _, link in _list_files(pid)):
            return _describe_process(pid)
    return None


def _list_listeners() -> dict[int, tuple[str, int]]:
    """Host and port of the TCP sockets that listen, by inode."""
    found: dict[int, tuple[str, int]] = {}
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        try:
            lines = (PROC / "net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == _LISTENS:
                address, _, port = local.partition(":")
                words = [bytes.fromhex(address[start : start + 8]) for start in range(0, len(address), 8)]
                raw = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
                found[int(inode)] = socket.inet_ntop(family, raw), int(port, 16)
    return found


def _list_pids() -> Iterator[int]:
    with contextlib.suppress(OSError):
        yield from (int(entry) for entry in os.listdir(PROC) if entry.isdigit())


def _list_files(pid: int) -> Iterator[tuple[str, str]]:
    """The open files of a process: descriptor, and what it is of; none of a process that may not be looked into."""
    folder = PROC / str(pid) / "fd"
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(folder):
            with contextlib.suppress(OSError):  # closed since
                yield descriptor, os.readlink(folder / descriptor)


def _read_inode(link: str) -> int | None:
    return int(link[8:-1]) if link.startswith("socket:[") else None


def _find_urls(pid: int) -> set[str]:
    """Where a process listens."""
    inodes = {_read_inode(link) for _, link in _list_files(pid)}
    places = [place for inode, place in _list_listeners().items() if inode in inodes]
    return {f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host, port in places}


def _holds(pid: int, path: Path) -> bool:
    """Whether the kernel says so: this very process has this very file open, and locked."""
    folder = PROC / str(pid)
    try:
        wanted = path.stat()
        for descriptor, _ in _list_files(pid):
            is_it = os.path.samestat((folder / "fd" / descriptor).stat(), wanted)
            if is_it and "FLOCK" in (folder / "fdinfo" / descriptor).read_text():
                return True
    except OSError:
        pass
    return False


# Taking over


async def take_over(lock: StateLock, bind: Callable[[], bool], port: int, wait_s: float) -> None:
    """Returns with the lock and the port, once their holder has made way. Raises CommandFailed.

    `bind` gives whether the port is ours now. It is tried from the first moment on: the port is free long before the
    journal is, and clients that find it open wait rather than being refused.
    """
    if not lock.take_turn():
        raise CommandFailed(f"Another process is taking over {lock.path.parent} already. Nothing was changed.")
    is_bound, is_locked = bind(), lock.try_acquire()
    if not is_locked:
        _ask_to_end(lock, None if is_bound else port)
    until = time.monotonic() + wait_s
    while not (is_bound and is_locked):
        if time.monotonic() > until:
            what = "still holds the state directory" if not is_locked else f"does not let go of port {port}"
            raise CommandFailed(
                f"The other process{_describe_holder(lock)} {what} after {wait_s:g} s. Its log says what it waits for. "
                "It was asked to end and will; else end it with `kill -9`, and start again."
            )
        await asyncio.sleep(TRY_EVERY_S)
        is_bound = is_bound or bind()
        is_locked = is_locked or lock.try_acquire()


def _ask_to_end(lock: StateLock, port: int | None) -> None:
    """Sends SIGTERM to the process that holds the lock, and to no other."""
    holder = lock.find_holder()
    refusal = f"The Scanwire{_describe_holder(lock)} on {lock.path.parent} cannot be asked to end from here"
    if holder is None or not hasattr(os, "pidfd_open"):
        raise CommandFailed(f"{refusal}: end it yourself, then start again without --takeover.")
    try:
        # Of the process, not of its number: that may be another's by the time it is looked at.
        process = os.pidfd_open(holder.pid)
    except OSError:
        raise CommandFailed(f"{refusal}: it is not known who it is. End it yourself, then start again.") from None
    try:
        if not _holds(holder.pid, lock.path):
            raise CommandFailed(
                f"{refusal}: the system does not confirm that it is this process. It may run in another container or "
                "for another user. End it yourself, then start again."
            )
        if port is not None and not any(url.endswith(f":{port}") for url in _find_urls(holder.pid)):
            raise CommandFailed(
                f"Port {port} is taken, and not by the Scanwire{_describe_holder(lock)} on {lock.path.parent}. "
                f"{name_port_holder(port)} Nothing was changed; choose another port with --port."
            )
        signal.pidfd_send_signal(process, signal.SIGTERM)
    except OSError as error:
        raise CommandFailed(f"{refusal}: {error.strerror}.") from None
    finally:
        os.close(process)


# What is left


class Process(NamedTuple):
    """Another process of this user, as far as it matters here."""

    pid: int
    started: int | None  # in ticks since the boot: with the pid, it is of no other process; None when it is gone
    command: str
    urls: list[str]  # where it listens
    is_server: bool  # it is Scanwire's and this user's beyond doubt: see `_is_server`


def list_users(state_dir: Path) -> list[Process]:
    """The processes that have a journal in this directory open, this one aside."""
    journals = {str((state_dir / name).resolve()) for name in (LOCK_NAME, JOURNAL_NAME)}
    return [
        _describe_process(pid)
        for pid in _list_pids()
        if pid != os.getpid() and any(link in journals for _, link in _list_files(pid))
    ]


def is_open(path: Path) -> bool:
    """Whether some process that may be looked into has this file open."""
    name = str(path.resolve())
    return any(link == name for pid in _list_pids() for _, link in _list_files(pid))


def _describe_process(pid: int) -> Process:
    words: list[str] = []
    with contextlib.suppress(OSError):
        words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    command = shlex.join(words)[:_MAX_COMMAND]
    return Process(pid, _read_start(pid), command, sorted(_find_urls(pid)), _is_server(pid))


def _read_start(pid: int) -> int | None:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[19])
    return None


def _is_server(pid: int) -> bool:
    """Whether the kernel says so: it is this user's, and has a journal open together with that journal's lock, which it
    holds, even if somebody has deleted the file since."""
    folder = PROC / str(pid)
    try:
        if pid == os.getpid() or folder.stat().st_uid != os.geteuid():
            return False
        files = {descriptor: Path(link.removesuffix(" (deleted)")) for descriptor, link in _list_files(pid)}
        return any(
            path.name == LOCK_NAME
            and path.with_name(JOURNAL_NAME) in files.values()
            and "FLOCK" in (folder / "fdinfo" / descriptor).read_text()
            for descriptor, path in files.items()
        )
    except OSError:
        return False


def end_server(process: Process, wait_s: float) -> bool:
    """Whether a server has ended, within this time, after it was asked to by SIGTERM, as an orderly stop does.

    Nothing stronger is ever sent. Raises CommandFailed, with nothing sent, when it is not beyond doubt that this is
    still that process, and a server.
    """
    refusal = f"pid {process.pid} was not asked to end"
    if not hasattr(os, "pidfd_open"):
        raise CommandFailed(f"{refusal}: this system cannot tell a process from another with its number.")
    try:
        # Of the process, not of its number: that may be another's by the time it is looked at.
        handle = os.pidfd_open(process.pid)
    except OSError:
        raise CommandFailed(f"{refusal}: it is gone already.") from None
    try:
        if process.started is None or _read_start(process.pid) != process.started or not _is_server(process.pid):
            raise CommandFailed(f"{refusal}: it is not the Scanwire that was found any more.")
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        return bool(select.select([handle], [], [], wait_s)[0])
    except OSError as error:
        raise CommandFailed(f"{refusal}: {error.strerror}.") from None
    finally:
        os.close(handle)
