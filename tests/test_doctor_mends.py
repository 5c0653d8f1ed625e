"""`scanwire doctor` mends what it finds: when it is told to, in order, and nothing that is not Scanwire's."""

import asyncio
import contextlib
import json
import os
import pty
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.commands.environment import CommandFailed
from app.commands.holder import end_server, find_port_holder, list_users
from app.log.lock import StateLock
from tests.conftest import until
from tests.test_cli import find_port, finish, read_screen, read_until, run, start

pytestmark = pytest.mark.usefixtures("trial_scanners")


class Server:
    """`scanwire serve` as a process of its own."""

    def __init__(self, process: Process, port: int, state: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.state = state
        self.doctor = ("doctor", "--url", self.url, "--state-dir", str(state))

    async def ask(self, method: str, path: str, **options: Any) -> Any:
        async with httpx.AsyncClient(base_url=self.url) as http:
            answer = await http.request(method, path, **options)
        assert answer.is_success, answer.text
        return answer.json()

    async def doctor_on_a_terminal(self, answer: str, *words: str) -> str:
        """What it showed, with every question answered so."""
        ours, theirs = pty.openpty()
        os.write(ours, f"{answer}\n".encode() * 3)
        process = await start(*(words or self.doctor), out=theirs, given=theirs, env={"TERM": "dumb", "COLUMNS": "200"})
        os.close(theirs)
        screen, _ = await asyncio.gather(asyncio.to_thread(read_screen, ours), finish(process))
        return screen


@contextlib.asynccontextmanager
async def serving(state: Path, prices: Path) -> AsyncIterator[Server]:
    port = find_port()
    process = await start("serve", "--port", str(port), "--state-dir", str(state), "--prices", str(prices))
    try:
        await read_until(process, "Scanwire serves on")
        yield Server(process, port, state)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.wait()


async def test_a_server_in_the_way_is_ended_after_a_yes_and_left_alone_otherwise(
    tmp_path: Path, sample_prices: Path
) -> None:
    """It answers elsewhere, and holds the state directory that was asked about."""
    async with serving(tmp_path, sample_prices) as server:
        elsewhere = ("doctor", "--url", f"http://127.0.0.1:{find_port()}", "--state-dir", str(tmp_path))
        question = f"End pid {server.process.pid} in order (SIGTERM)? [y/N]"
        for answer in ("", "n", "no way"):
            shown = await server.doctor_on_a_terminal(answer, *elsewhere)
            assert question in shown
            assert f"`kill {server.process.pid}` ends it in order" in shown
        piped, fixed = await run(*elsewhere), await run(*elsewhere, "--fix")  # it is well: no pipeline ends it
        assert question not in piped.out + fixed.out
        assert f"`kill {server.process.pid}` ends it in order" in fixed.out
        asked = await server.doctor_on_a_terminal("y")  # about the address where it answers: nothing is in the way
        assert "[y/N]" not in asked
        await server.ask("GET", "/healthz")

        shown = await server.doctor_on_a_terminal("y", *elsewhere)
        assert f"pid {server.process.pid} has ended, after " in shown
        assert await asyncio.wait_for(server.process.wait(), 5) == 0  # an orderly stop
        assert not (tmp_path / "journal.db-wal").exists()


async def test_a_server_that_lost_its_lock_to_another_is_ended_with_fix_and_the_other_is_not(
    tmp_path: Path, sample_prices: Path
) -> None:
    """Somebody deleted the lock file, and a second server started on the same journal."""
    async with serving(tmp_path, sample_prices) as old:
        (tmp_path / "journal.lock").unlink()
        async with serving(tmp_path, sample_prices) as new:
            told = await run(*new.doctor)
            assert told.code == 1
            assert f"pid {old.process.pid} works in {tmp_path}, serving on {old.url}" in told.out
            assert "It does not hold the lock that is there, and must not write" in told.out
            fixed = await run(*new.doctor, "--fix")
            assert f"End pid {old.process.pid} in order (SIGTERM): pid {old.process.pid} has ended, after " in fixed.out
            assert await asyncio.wait_for(old.process.wait(), 5) == 0
            assert fixed.code == 0
            await new.ask("GET", "/healthz")


async def test_a_server_that_hangs_is_asked_to_end_and_never_killed(tmp_path: Path, sample_prices: Path) -> None:
    async with serving(tmp_path, sample_prices) as server:
        server.process.send_signal(signal.SIGSTOP)
        asking = await start(*server.doctor, "--fix", "--json", env={"SCANWIRE_TAKEOVER_WAIT_S": "0.5"})
        hung = await finish(asking)
        (port, directory) = json.loads(hung.out)["here"]
        assert hung.code == 2
        assert "does not answer as it should" in port["what"]
        assert port["is_wrong"]
        assert f"pid {server.process.pid} was asked to end, and has not after 0.5 s" in port["done"]
        assert directory["done"] is None
        server.process.send_signal(signal.SIGCONT)
        assert await asyncio.wait_for(server.process.wait(), 20) == 0


async def test_what_a_crashed_server_left_is_cleared_up_and_nothing_that_was_accepted_is_lost(
    tmp_path: Path, sample_prices: Path
) -> None:
    abandoned, fresh = tmp_path / ".sample.parquet.left", tmp_path / ".sample.parquet.made"
    async with serving(tmp_path, sample_prices) as server:
        scan = await server.ask("POST", "/v1/scans", json={"scanner": "external"})
        server.process.kill()
        await server.process.wait()
        for path in (abandoned, fresh):
            path.write_bytes(b"x" * 2**20)
        os.utime(abandoned, (0, 0))

        told = await run(*server.doctor)
        assert "its journal was not closed" in told.out
        assert f"left 1 file (1.0 MB): {abandoned}" in told.out
        shown = await server.doctor_on_a_terminal("")
        assert shown.count("[y/N]") == 2
        assert (tmp_path / "journal.db-wal").stat().st_size > 0
        assert abandoned.exists()

        fixed = await run(*server.doctor, "--fix")
        assert "It is closed. The next start goes on with the scans that had not ended." in fixed.out
        assert "Remove what it left: 1 of 1 removed." in fixed.out
        assert not (tmp_path / "journal.db-wal").exists()
        assert (abandoned.exists(), fresh.exists()) == (False, True)
        again = await run(*server.doctor)
        assert "was not closed" not in again.out
    async with serving(tmp_path, sample_prices) as server:
        assert (await server.ask("GET", f"/v1/scans/{scan['id']}"))["state"] == "running"


async def test_leftovers_are_left_to_a_server_that_has_started_meanwhile(tmp_path: Path, sample_prices: Path) -> None:
    async with serving(tmp_path, sample_prices) as server:
        server.process.kill()
        await server.process.wait()
        from app.commands.surroundings import look_around

        (leftover,) = (one for one in look_around(server.url, tmp_path, is_answering=False) if one.offer)
        lock = StateLock(tmp_path / "journal.lock")
        assert lock.try_acquire()
        assert leftover.mend() == "A server has started there meanwhile: nothing was changed."
        lock.release()
        assert leftover.is_wrong
        assert (tmp_path / "journal.db-wal").stat().st_size > 0


async def test_who_is_not_scanwire_is_never_ended(tmp_path: Path) -> None:
    """It has the journal open, or the port, as a backup or another program may."""
    (tmp_path / "journal.db").touch()
    port = find_port()
    code = (
        f"import socket, sys; journal = open({str(tmp_path / 'journal.db')!r}); lock = open("
        f"{str(tmp_path / 'journal.lock')!r}, 'w'); server = socket.create_server(('127.0.0.1', {port})); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdin=PIPE, stdout=PIPE)
    assert other.stdout is not None
    assert other.stdin is not None
    await other.stdout.readline()
    (user,) = list_users(tmp_path)
    assert (user.pid, user.is_server) == (other.pid, False)
    url = f"http://127.0.0.1:{port}"
    asking = await start("doctor", "--url", url, "--state-dir", str(tmp_path), "--fix")
    await until(lambda: other.returncode is None)
    other_dies = asyncio.create_task(other.wait())
    done = await finish(asking)
    assert f"pid {other.pid}" in done.out
    assert "SIGTERM" not in done.out
    assert not other_dies.done()
    with pytest.raises(CommandFailed, match="not the Scanwire that was found"):
        end_server(user._replace(is_server=True), 1)
    other.stdin.close()
    assert await other_dies == 0
    with pytest.raises(CommandFailed, match="gone already"):
        end_server(user, 1)


async def test_a_process_that_only_has_the_pid_of_a_server_is_left_alone(tmp_path: Path, sample_prices: Path) -> None:
    async with serving(tmp_path, sample_prices) as server:
        found = find_port_holder(int(server.url.rpartition(":")[2]))
        assert found is not None
        assert found.is_server
        assert found.started is not None
        with pytest.raises(CommandFailed, match="not the Scanwire that was found"):
            end_server(found._replace(started=found.started - 1), 1)
        await server.ask("GET", "/healthz")
