"""One process works in a state directory; another takes it over without anybody losing an event or much time."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from app.client import Client, Production, ScanEvent
from app.log.lock import StateLock
from tests.chaos.followers import Follower
from tests.chaos.servers import SERVE, Server, find_port, make_environment, spawn, started
from tests.chaos.test_drain import UVICORN, WIRED, assert_whole, follow, submit, submit_running
from tests.conftest import Gate

TAKEOVER = (*SERVE, "--takeover")
AWAY_S = 3.0


async def take_over(port: int, environment: dict[str, str], *words: str) -> Server:
    """The successor, once it takes scans."""
    server = await spawn(port, environment, *TAKEOVER, *words)
    try:
        await server.until_said('"ready"')
    except BaseException:
        await server.kill()
        raise
    return server


async def refuse(port: int, environment: dict[str, str], *words: str) -> str:
    """What a start says that is refused."""
    server = await spawn(port, environment, *words)
    try:
        code, _ = await server.ended()
    finally:
        await server.kill()
    assert code == 2
    return "".join(line for line in server.said if not line.startswith("{"))


async def watch(url: str, scan: str, form: str) -> list[dict[str, Any]]:
    """The durable events of a scan, by the Python client."""
    async with Client(url, formats=(form,), patience_s=60) as client:
        events: list[ScanEvent] = [event async for event in client.watch([scan]) if event.id is not None]
    return [
        {"scan": scan, "type": event.type, "seq": event.seq, "data": orjson.loads(orjson.dumps(event.data))}
        for event in events
    ]


async def produce(scan: Production, stop: asyncio.Event) -> int:
    """Posts rows without a pause until it is told to stop; gives their number."""
    place = 0
    while not stop.is_set():
        await scan.matches([{"place": place}])
        place += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.03):
                await stop.wait()
    return place


async def test_a_rolling_restart_under_load_loses_no_event_and_nobody_is_away_for_long(
    tmp_path: Path, synthetic_prices: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = find_port()
    environment = make_environment(tmp_path, synthetic_prices, drain_s=10, chunk_rows=1000)
    url = f"http://127.0.0.1:{port}"
    stop = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(started(port, environment))
        client = await stack.enter_async_context(Client(url, patience_s=60))
        slow = await submit(server, "trial-slow", pause_ms=600)
        async with client.produce("rolling restart") as production:
            external = production.id
            producing = asyncio.create_task(produce(production, stop))
            followers, running = await follow(
                100, port, [external, slow], "sse", "websocket", "sse", "websocket", "poll"
            )
            forms = ("text/event-stream", "application/x-ndjson", "application/json")
            watching = [asyncio.create_task(watch(url, external, form)) for form in forms]
            took_s = []
            for _ in range(3):
                began = time.monotonic()
                successor = await take_over(port, environment)
                stack.push_async_callback(successor.kill)
                code, _ = await server.ended()
                assert code == 0
                server = successor
                took_s.append(time.monotonic() - began)
                async with asyncio.timeout(AWAY_S):
                    for follower in followers:
                        await follower.is_connected.wait()
            await submit(server, "gap-up")  # the last one takes scans
            stop.set()
            rows = await producing
        try:
            async with asyncio.timeout(60):
                await running
                watched = await asyncio.gather(*watching)
        finally:
            server.process.send_signal(signal.SIGTERM)
            code, _ = await server.ended()
    assert code == 0
    for follower in followers:
        assert_whole(follower.events, external)
        assert_whole(follower.events, slow)
        found = [row for e in follower.events if e["type"] == "matches" and e["scan"] == external for row in rows_of(e)]
        assert found == [{"place": place} for place in range(rows)]
    for events in watched:
        assert_whole(events, external)
    attempts = [e["data"]["attempt"] for e in followers[0].events if e["type"] == "started" and e["scan"] == slow]
    assert attempts == list(range(1, len(attempts) + 1))
    assert len(attempts) > 1
    away = {name: max(f.away_s for f in followers if f.transport == name) for name in ("sse", "websocket", "poll")}
    with capsys.disabled():
        longest = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in away.items())
        print(
            f"\n3 take-overs in {', '.join(f'{s:.1f}' for s in took_s)} s; {rows} rows posted meanwhile; longest away: "
            f"{longest}; {sum(f.refused for f in followers)} connections refused"
        )
    assert max(away.values()) < AWAY_S


def rows_of(event: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = event["data"]["rows"]
    return rows


async def test_a_second_start_says_who_holds_the_directory_and_how_to_take_over(
    tmp_path: Path, synthetic_prices: Path
) -> None:
    port, other = find_port(), find_port()
    environment = make_environment(tmp_path, synthetic_prices)
    async with started(port, environment) as server:
        for words in (SERVE, UVICORN):
            said = await refuse(other, environment, *words) if words is SERVE else await _fail(other, environment)
            assert f"pid {server.process.pid}, since 20" in said
            assert str(tmp_path / "state") in said
            assert "--takeover" in said
            if words is SERVE:
                assert f"serving on http://127.0.0.1:{port}" in said
        assert server.process.returncode is None
        # Killed, it leaves its note, and is in nobody's way.
        server.process.kill()
        await server.process.wait()
        async with started(other, environment, *TAKEOVER):
            pass


async def _fail(port: int, environment: dict[str, str]) -> str:
    server = await spawn(port, environment, *UVICORN)
    assert await server.process.wait() != 0
    assert server._reading is not None
    await server._reading
    return "".join(server.said)


async def test_a_taken_port_names_its_holder(tmp_path: Path, synthetic_prices: Path) -> None:
    port = find_port()
    environment = make_environment(tmp_path, synthetic_prices)
    elsewhere = environment | {"SCANWIRE_STATE_DIR": str(tmp_path / "elsewhere")}
    async with started(port, environment) as server:
        said = await refuse(port, elsewhere, *SERVE)
        assert f"Port {port} of 127.0.0.1 is taken." in said
        assert f"held by pid {server.process.pid} (" in said
        assert f"-m app serve --port {port}), a Scanwire on {tmp_path / 'state'}." in said
    with held_port() as (port, pid):
        said = await refuse(port, environment, *SERVE)
        assert f"held by pid {pid} (" in said
        assert "a Scanwire on" not in said


@contextlib.contextmanager
def held_port() -> Any:
    """A port that another program listens on, with its pid."""
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), process.pid
        finally:
            process.kill()


async def test_a_port_of_another_program_is_not_taken_over_and_nothing_is_changed(
    tmp_path: Path, synthetic_prices: Path
) -> None:
    port = find_port()
    environment = make_environment(tmp_path, synthetic_prices)
    async with started(port, environment) as server:
        with held_port() as (taken, pid):
            said = await refuse(taken, environment, *TAKEOVER)
            assert f"Port {taken} is taken, and not by the Scanwire (pid {server.process.pid}" in said
            assert f"held by pid {pid} (" in said
        await server.until_ready()
        assert not any("draining" in line for line in server.said)


async def test_no_process_is_asked_to_end_that_the_kernel_does_not_name_as_the_holder(
    tmp_path: Path, synthetic_prices: Path
) -> None:
    environment = make_environment(tmp_path, synthetic_prices)
    lock = StateLock(tmp_path / "state" / "journal.lock")
    lock.acquire()
    innocent = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
    try:
        # As after a crash, when the number was given to another process, and the next holder could write no note.
        lock.path.write_text(f'{{"pid": {innocent.pid}, "since": "2026-01-01T00:00:00Z"}}\n')
        said = await refuse(find_port(), environment, *TAKEOVER)
        assert "does not confirm that it is this process" in said
        lock.path.write_text("")
        said = await refuse(find_port(), environment, *TAKEOVER)
        assert "end it yourself" in said
    finally:
        lock.release()
        await innocent.communicate(b"\n")
    assert innocent.returncode == 0  # by its own end, and no signal


@pytest.mark.parametrize("words", [UVICORN, UVICORN + WIRED], ids=["plain", "wired"])
async def test_the_server_of_uvicorns_own_command_is_taken_over_as_well(
    tmp_path: Path, synthetic_prices: Path, words: tuple[str, ...]
) -> None:
    port = find_port()
    environment = make_environment(tmp_path, synthetic_prices, chunk_rows=2500)
    async with started(port, environment, *words) as server:
        scan = await submit(server, "trial-slow", pause_ms=300)
        followers, running = await follow(20, port, [scan], "sse", "websocket", "poll")
        successor = await take_over(port, environment)
        try:
            await server.ended()
            async with asyncio.timeout(60):
                await running
        finally:
            successor.process.send_signal(signal.SIGTERM)
            code, _ = await successor.ended()
            await successor.kill()
    assert code == 0
    for follower in followers:
        assert_whole(follower.events, scan)
    assert max(follower.away_s for follower in followers) < AWAY_S


async def test_there_is_one_successor_and_it_waits_no_longer_than_it_may(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    port = find_port()
    environment = make_environment(tmp_path, sample_prices, drain_s=30, chunk_rows=1, takeover_wait_s=8)
    async with started(port, environment) as server:
        scan = await submit_running(server, "trial-gated", gate=str(gate.path))
        follower = Follower(port, [scan], "sse")
        running = asyncio.create_task(follower.run())
        await follower.is_connected.wait()
        first = asyncio.create_task(refuse(port, environment, *TAKEOVER))
        await server.until_said('"draining"')
        said = await refuse(port, environment, *TAKEOVER)
        assert "Another process is taking over" in said
        said = await first
        assert f"pid {server.process.pid}" in said
        assert "still holds the state directory after 8 s" in said
        # It was asked, and ends when its work is at a checkpoint; until then its streams go on.
        assert follower.is_connected.is_set()
        gate.open()
        code, _ = await server.ended()
        assert code == 0
    async with started(port, environment):
        async with asyncio.timeout(30):
            await running
    assert_whole(follower.events, scan)
