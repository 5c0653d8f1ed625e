"""Rules of a journal that cannot be written: full, read-only, held by another program, cut off in mid-write.

The faults are real ones. A limit on the size of files (RLIMIT_FSIZE) works everywhere, and to SQLite it is the same as
a disk that fails or a file system that was made read-only under a running server: a write that the system refuses. A
full disk is a small tmpfs of the server's own; where mounting is not allowed, that test is skipped, and so is the one
that makes the files immutable.
"""

import asyncio
import contextlib
import ctypes
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, closing
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from app.core.scan import State, digest_rows
from app.log.check import check_journal
from app.log.eventlog import EventLog
from app.log.journal import Checkpoint
from app.log.sqlite import SqliteJournal
from app.market.sample import make_synthetic
from tests.chaos.processes import ROOT, Server
from tests.conftest import Gate
from tests.test_engine import Engine, running
from tests.test_log import open_log
from tests.test_scan import QUEUED, STARTED, found, make_scan

PARAMS = {"preset": "relaxed", "gap_pct_min": 0.0, "vol_ratio_min": 0.0}
LIMIT_BYTES = 65_536
TMPFS_BYTES = 24 * 2**20


@pytest.fixture(scope="module")
def prices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prices") / "synthetic.parquet"
    make_synthetic(path, symbols=400, days=500, seed=7)
    return path


# Faults


@contextlib.asynccontextmanager
async def limit(server: Server, state_dir: Path) -> AsyncIterator[None]:
    """No file may grow past a few pages."""
    soft, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))
    yield
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.asynccontextmanager
async def fill(server: Server, state_dir: Path) -> AsyncIterator[None]:
    """Someone else's file takes all the room that is left on the disk."""
    filler = state_dir / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65_536))
    yield
    filler.unlink()


@contextlib.asynccontextmanager
async def freeze(server: Server, state_dir: Path) -> AsyncIterator[None]:
    """The files may not be changed, by nobody."""
    files = [str(state_dir / name) for name in ("journal.db", "journal.db-wal")]
    await asyncio.to_thread(subprocess.run, ["chattr", "+i", *files], check=True)
    try:
        yield
    finally:
        await asyncio.to_thread(subprocess.run, ["chattr", "-i", *files], check=True)


HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.asynccontextmanager
async def hold(server: Server | None, state_dir: Path) -> AsyncIterator[None]:
    """Another program has begun a transaction and takes its time."""
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLD, str(state_dir / "journal.db")),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"held\n"
    yield
    holder.stdin.close()
    await holder.wait()


def can_mount() -> bool:
    words = [*make_disk(Path("/tmp")), "true"]
    return (
        shutil.which("unshare") is not None and not subprocess.run(words, capture_output=True, check=False).returncode
    )


def make_disk(state_dir: Path) -> list[str]:
    """The words in front of a command that give it a small disk of its own at `state_dir`."""
    script = f'mount -t tmpfs -o size={TMPFS_BYTES} none "$0" && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(state_dir)]


def can_freeze(path: Path) -> bool:
    path.touch()
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", path], capture_output=True).returncode:
        return False
    subprocess.run(["chattr", "-i", path], check=True)
    return True


# A server under each of them


async def get_events(http: httpx.AsyncClient, scan_id: str, received: list[bytes]) -> None:
    """Keeps what a subscriber is shown of a scan, to its end."""
    async with http.stream("GET", f"/v1/scans/{scan_id}/events", headers={"Accept": "application/x-ndjson"}) as answer:
        async for line in answer.aiter_lines():
            received += [line.encode()] * ('"id":' in line[:8])


def copy_journal(state_dir: Path, target: Path) -> Path:
    """SQLite finds no way to a file on another process's own disk; copying does."""
    target.mkdir(exist_ok=True)
    for name in ("journal.db", "journal.db-wal"):
        shutil.copy(state_dir / name, target / name)
    return target / "journal.db"


def read_file(path: Path, scan_id: str) -> list[bytes]:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT json FROM events WHERE scan = ? ORDER BY n", (scan_id,))
        return [json for (json,) in rows]


async def until(is_so: Callable[[], Any]) -> None:
    async with asyncio.timeout(40):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


Fault = Callable[[Server, Path], AbstractAsyncContextManager[None]]


@pytest.mark.parametrize("fault", [limit, fill, freeze, hold])
async def test_under_a_fault_nothing_uncommitted_is_shown_no_scan_is_taken_and_all_goes_on_without_a_restart(
    tmp_path: Path, prices: Path, fault: Fault
) -> None:
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    before: list[str] = []
    if fault is fill:
        if not await asyncio.to_thread(can_mount):
            pytest.skip("no file system may be mounted here, so there is no disk to fill")
        before = make_disk(state_dir)
    if fault is freeze and not await asyncio.to_thread(can_freeze, tmp_path / "frozen"):
        pytest.skip("no file can be made immutable here")
    server = Server(state_dir, prices, *before, commit_wait_s=1)
    async with server.running(), httpx.AsyncClient(base_url=server.url, timeout=20) as http:
        await server.until_ready()
        seen_dir = Path(f"/proc/{server.pid}/root{state_dir}") if fault is fill else state_dir
        body = {"scanner": "gap-up", "params": PARAMS, "reuse": "never"}
        scan_id = (await http.post("/v1/scans", json=body)).json()["id"]
        received: list[bytes] = []
        watching = asyncio.create_task(get_events(http, scan_id, received))
        await until(lambda: len(received) > 20)

        async with fault(server, seen_dir):
            async with asyncio.timeout(40):
                while (ready := await http.get("/readyz")).status_code == 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert "The journal cannot be written" in ready.json()["checks"]["journal"]
            refusal = await http.post("/v1/scans", json=body)
            assert refusal.status_code == 503
            assert refusal.headers["content-type"] == "application/problem+json"
            assert "The journal cannot be written" in refusal.json()["detail"]
            assert int(refusal.headers["retry-after"]) > 0
            # What was committed before is shown and can be read; nothing comes on top while the fault lasts.
            await until(lambda: received == read_file(copy_journal(seen_dir, tmp_path / "during"), scan_id))
            assert not watching.done()
            snapshot = (await http.get(f"/v1/scans/{scan_id}")).json()
            assert (snapshot["state"], snapshot["cursor"]) == ("running", orjson.loads(received[-1])["id"])
            before_count = len(received)

        async with asyncio.timeout(60):
            await watching
        assert len(received) > before_count
        kept = copy_journal(seen_dir, tmp_path / "after")
        assert received == read_file(kept, scan_id)
        assert check_journal(kept).problems == []
        end = orjson.loads(received[-1])["data"]
        rows = [row for event in received for row in orjson.loads(event)["data"].get("rows", ())]
        assert (end["state"], end["digest"]) == ("completed", digest_rows(rows))
        assert (await http.get("/readyz")).status_code == 200
        assert (await http.post("/v1/scans", json=body)).status_code == 202


def drop_override() -> None:
    """Root too is bound by the modes of files from here on."""
    if os.geteuid() == 0:
        pr_capbset_drop, cap_dac_override = 24, 1
        ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0)


def test_a_directory_that_cannot_be_written_stops_the_start_and_says_so(tmp_path: Path, prices: Path) -> None:
    state_dir = tmp_path / "state"
    state_dir.mkdir(mode=0o555)
    command = [sys.executable, "-m", "app", "serve", "--state-dir", str(state_dir), "--prices", str(prices)]
    command += ["--port", str(Server(state_dir, prices).port)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, preexec_fn=drop_override, check=False
    )
    assert done.returncode == 2
    assert "Permission denied" in done.stderr
    assert "Check that the directory can be written" in done.stderr


@pytest.mark.usefixtures("trial_scanners")
async def test_a_start_does_not_wait_for_a_journal_that_cannot_be_written(
    tmp_path: Path, sample_prices: Path, synthetic_prices: Path, gate: Gate
) -> None:
    async with running(tmp_path, sample_prices) as engine:
        scan = await engine.submit(gate=str(gate.path))
        await engine.until_running(scan)
    engine = Engine(tmp_path, synthetic_prices, commit_wait_s=0.2)
    async with contextlib.AsyncExitStack() as held:
        await held.enter_async_context(hold(None, tmp_path))
        async with asyncio.timeout(20), engine.run():
            assert engine.log.get(scan.id).state is State.RUNNING  # nobody was told otherwise
            await until(lambda: engine.log.fault)
            await held.aclose()
            assert (await engine.finish(scan)).state is State.LOST


# Killed in mid-write

APPEND = """
import asyncio, itertools, os, signal, sys
from pathlib import Path
from app.log.eventlog import EventLog
from app.log.journal import Checkpoint
from app.log.sqlite import SqliteJournal
from tests.test_scan import QUEUED, STARTED, found, make_scan

path, fatal = Path(sys.argv[1]), int(sys.argv[2])
commits = itertools.count(1)

class FatalJournal(SqliteJournal):
    def _connect(self):
        connection = super()._connect()
        connection.set_trace_callback(self.note)
        return connection

    def note(self, statement):
        if statement == "COMMIT" and next(commits) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

async def append():
    log = EventLog(FatalJournal(path), now_ms=lambda: 1000, memory_bytes=0)
    await log.open()
    log.create(make_scan())
    for number in itertools.count():
        part = (QUEUED, STARTED)[number] if number < 2 else found(200)
        checkpoint = Checkpoint(chunk=0, found=200) if number == 2 else None
        print((await log.append("s_test", part, checkpoint=checkpoint)).seq, flush=True)

asyncio.run(append())
"""


async def append_until_killed(path: Path, *, at_commit: int = 0, after_events: int = 0, delay_s: float = 0) -> int:
    """The last event that was acknowledged before the process died."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", APPEND, str(path), str(at_commit)),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    said = b""
    async with asyncio.timeout(60):
        if not at_commit:
            while said.count(b"\n") < after_events:
                said += await process.stdout.readline()
            await asyncio.sleep(delay_s)
            process.kill()
        said += await process.stdout.read()
        assert await process.wait() == -9
    return int(([b"0", *said.split(b"\n")[:-1]])[-1])


async def read_back(path: Path) -> list[int]:
    assert check_journal(path).problems == []
    async with open_log(path.parent) as log:
        scan = log.find("s_test")
        events = [] if scan is None else await log.read("s_test", 0, 2**30)
        assert scan is None or (scan.seq, scan.n) == (len(events), events[-1].n)
        return [event.seq for event in events]


@pytest.mark.parametrize("commit", range(1, 7))
async def test_killed_between_write_and_commit_leaves_what_was_acknowledged_and_no_more(
    tmp_path: Path, commit: int
) -> None:
    path = tmp_path / "journal.db"
    acknowledged = await append_until_killed(path, at_commit=commit)
    assert acknowledged == commit - 1
    assert await read_back(path) == list(range(1, commit))


@pytest.mark.parametrize("seed", range(5))
async def test_killed_at_any_moment_leaves_what_was_acknowledged_and_whole_transactions(
    tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    path = tmp_path / "journal.db"
    delay_s = dice.uniform(0, 0.02)
    acknowledged = await append_until_killed(path, after_events=dice.randint(3, 400), delay_s=delay_s)
    seqs = await read_back(path)
    assert seqs == list(range(1, len(seqs) + 1))
    assert acknowledged <= len(seqs) <= acknowledged + 1  # the last one may not have been told any more


# The power goes


async def crash(source: Path, target: Path, **options: Any) -> tuple[str, int]:
    """Commits something, and leaves the files as a machine does that goes down; gives epoch and last number."""
    log = EventLog(
        SqliteJournal(source / "journal.db", boot_id="first", **options), now_ms=lambda: 1000, memory_bytes=0
    )
    await log.open()
    log.create(make_scan())
    scan = await log.append("s_test", QUEUED, STARTED, found(2), checkpoint=Checkpoint(chunk=0, found=2))
    shutil.copytree(source, target)
    await log.close()
    return log.epoch, scan.n


async def reopen(path: Path, boot_id: str) -> tuple[str, list[str]]:
    async with open_log(path, journal=SqliteJournal(path / "journal.db", boot_id=boot_id)) as log:
        epoch = log.epoch
        events = await log.read("s_test", 0)
    assert check_journal(path / "journal.db").problems == []
    return epoch, [event.id or "" for event in events]


async def test_after_a_power_cut_cursors_of_what_may_be_lost_do_not_fit_any_more(tmp_path: Path) -> None:
    epoch, last_n = await crash(tmp_path / "live", tmp_path / "cut")
    renewed, ids = await reopen(tmp_path / "cut", "second")
    assert renewed != epoch
    assert ids == [f"{renewed}-{n}" for n in range(1, last_n + 1)]
    # It went down in an orderly way since: whatever happens to the machine, nothing can be lost.
    assert (await reopen(tmp_path / "cut", "third"))[0] == renewed


async def test_a_killed_process_and_an_orderly_stop_keep_every_cursor(tmp_path: Path) -> None:
    epoch, _ = await crash(tmp_path / "live", tmp_path / "killed")
    assert (await reopen(tmp_path / "killed", "first"))[0] == epoch
    assert (await reopen(tmp_path / "live", "second"))[0] == epoch


async def test_with_the_durability_power_every_cursor_outlives_a_power_cut(tmp_path: Path) -> None:
    epoch, _ = await crash(tmp_path / "live", tmp_path / "cut", durability="power")
    assert (await reopen(tmp_path / "cut", "second"))[0] == epoch


@pytest.mark.parametrize(("durability", "level"), [("process", 1), ("power", 2)])
async def test_the_durability_is_how_sqlite_flushes(tmp_path: Path, durability: Any, level: int) -> None:
    levels: list[int] = []

    class Asked(SqliteJournal):
        def _commit(self, connection: sqlite3.Connection, writes: Any) -> None:
            super()._commit(connection, writes)
            levels.append(connection.execute("PRAGMA synchronous").fetchone()[0])

    async with open_log(tmp_path, journal=Asked(tmp_path / "journal.db", durability)) as log:
        log.create(make_scan())
        await log.append("s_test", QUEUED)
        await log.append("s_test", STARTED)
    assert levels == [level, level]
