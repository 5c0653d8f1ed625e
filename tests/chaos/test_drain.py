"""A stop: everybody hears of it in time, nothing is lost, and the next process goes on."""

import asyncio
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.core.scan import State, digest_rows
from tests.chaos.followers import Follower, count_streams
from tests.chaos.servers import Server, find_port, make_environment, started
from tests.conftest import Gate, until
from tests.serving import serve

UVICORN = ("-m", "uvicorn", "app.application:create_app", "--factory", "--no-proxy-headers", "--log-level", "warning")
WIRED = ("--http", "app.push.wire:HttpConnection", "--ws", "app.push.wire:WebSocketConnection")
LATE_S = 15.0  # far more than the 2 s that a stop takes beyond `drain_s` on a machine with nothing else to do


async def submit(server: Server, scanner: str, **params: Any) -> str:
    body = {"scanner": scanner, "params": params, "reuse": "never"}
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{server.url}/v1/scans", json=body)
    assert answer.status_code == 202, answer.text
    scan_id: str = answer.json()["id"]
    return scan_id


async def submit_running(server: Server, scanner: str, **params: Any) -> str:
    """As `submit`, once the scan's first chunks are under way."""
    scan_id = await submit(server, scanner, **params)
    async with asyncio.timeout(20), httpx.AsyncClient() as http:
        while (await http.get(f"{server.url}/v1/scans/{scan_id}")).json()["state"] != "running":  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return scan_id


async def follow(count: int, port: int, scans: list[str], *transports: str) -> tuple[list[Follower], asyncio.Task[Any]]:
    """So many followers, all connected, and the task that they run in."""
    followers = [Follower(port, scans, transports[place % len(transports)]) for place in range(count)]

    async def run_all() -> None:
        async with asyncio.TaskGroup() as group:
            for place, follower in enumerate(followers):
                group.create_task(follower.run())
                if place % 50 == 49:
                    await follower.is_connected.wait()

    running = asyncio.create_task(run_all())
    async with asyncio.timeout(60):
        for follower in followers:
            await follower.is_connected.wait()
    return followers, running


def assert_whole(events: list[dict[str, Any]], scan: str) -> None:
    """Every durable event of the scan, once and in order; its rows are those of the digest."""
    own = [event for event in events if event["scan"] == scan]
    assert [event["seq"] for event in own] == list(range(1, len(own) + 1))
    rows = [row for event in own if event["type"] == "matches" for row in event["data"]["rows"]]
    assert own[-1]["type"] == "end"
    assert own[-1]["data"]["state"] == "completed"
    assert own[-1]["data"]["digest"] == digest_rows(rows)
    assert len(rows) == own[-1]["data"]["matches"]


async def test_all_streams_are_told_when_to_come_back_and_resume_on_the_next_process(
    tmp_path: Path, synthetic_prices: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = count_streams(300)
    drain_s = 2 if count <= 400 else 10
    port = find_port()
    environment = make_environment(
        tmp_path, synthetic_prices, drain_s=drain_s, chunk_rows=2500, max_streams_per_client=count + 10
    )
    async with started(port, environment) as server, httpx.AsyncClient(base_url=server.url) as http:
        pause_ms = 400 if count <= 400 else 2000
        scans = [await submit(server, "trial-slow", pause_ms=pause_ms) for _ in range(2)]
        followers, running = await follow(count, port, scans, "sse", "websocket")
        await until(lambda: all(len(follower.seqs(scan)) > 2 for follower in followers for scan in scans))

        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        await server.until_said('"draining"')
        ready, refused = await http.get("/readyz"), await http.post("/v1/scans", json={"scanner": "gap-up"})
        assert ready.status_code == 503
        assert ready.json()["checks"]["draining"] != "ok"
        assert refused.status_code == 503
        assert refused.json()["title"] == "The server is stopping"
        assert int(refused.headers["retry-after"]) == refused.json()["retry_after_s"] == drain_s
        code, _ = await server.ended()
        took_s = time.monotonic() - began
    assert code == 0
    assert took_s < drain_s + LATE_S
    seen = [len(follower.events) for follower in followers]
    assert not any(event["type"] == "end" for follower in followers for event in follower.events)

    byes = [follower.byes[0] for follower in followers]
    assert all(len(follower.byes) == 1 and 0 <= follower.byes[0][1] <= drain_s for follower in followers)
    left = sorted(when - began for when, _ in byes)
    back = sorted(when - began + after_s for when, after_s in byes)
    over_s = min(drain_s - 0.5, count / 200)
    # Evenly over the time, and nobody is called back before the process has ended.
    for place in range(1, 10):
        assert left[count * place // 10] - left[0] == pytest.approx(over_s * place / 10, abs=0.2 * over_s)
    assert back[0] >= left[-1] + 0.3
    assert back[-1] - back[0] > 0.4 * over_s

    async with started(port, environment) as server:
        restarted = time.monotonic()
        async with asyncio.timeout(120):
            await running
        resumed_s = time.monotonic() - restarted
        for follower in followers:
            for scan in scans:
                assert_whole(follower.events, scan)
        attempts = [event["data"]["attempt"] for event in followers[0].events if event["type"] == "started"]
        assert sorted(attempts) == [1, 1, 2, 2]
        server.process.send_signal(signal.SIGTERM)
        code, seconds = await server.ended()
        assert (code, seconds < 1.5) == (0, True)
    with capsys.disabled():
        print(
            f"\n{count} streams: stopped in {took_s:.2f} s; byes from {left[0]:.2f} to {left[-1]:.2f} s; called back "
            f"from {back[0]:.2f} to {back[-1]:.2f} s; {min(seen)} to {max(seen)} events seen before, "
            f"{len(followers[0].events)} in the end; all ended {resumed_s:.1f} s after the restart"
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_with_nothing_under_way_takes_no_time(
    tmp_path: Path, synthetic_prices: Path, number: signal.Signals
) -> None:
    port = find_port()
    async with started(port, make_environment(tmp_path, synthetic_prices, drain_s=20)) as server:
        scan = await submit(server, "external")
        _, running = await follow(2, port, [scan], "sse", "websocket")  # two streams are not worth a wait
        server.process.send_signal(number)
        code, seconds = await server.ended()
        running.cancel()
        assert code == 0
        assert seconds < 1


async def test_a_chunk_under_way_is_finished_and_pushed_before_the_streams_end(
    tmp_path: Path, synthetic_prices: Path, gate: Gate
) -> None:
    port = find_port()
    environment = make_environment(tmp_path, synthetic_prices, drain_s=20, chunk_rows=2500, workers=1)
    async with started(port, environment) as server:
        scan = await submit_running(server, "trial-gated", gate=str(gate.path))
        follower = Follower(port, [scan], "sse")
        running = asyncio.create_task(follower.run())
        await follower.is_connected.wait()
        server.process.send_signal(signal.SIGTERM)
        await server.until_said('"draining"')
        assert len(follower.seqs(scan)) == 2
        gate.open()
        code, seconds = await server.ended()
        assert code == 0
        assert seconds < 5
        assert len(follower.byes) == 1
        done = _read_checkpoints(tmp_path, scan)
        chunks = [event["data"]["chunk"] for event in follower.events if event["type"] == "matches"]
        # Those that were on their way to the one worker, and no other.
        assert sorted(done) == chunks
        assert chunks in ([0], [0, 1])
    async with started(port, environment):
        async with asyncio.timeout(30):
            await running
    assert_whole(follower.events, scan)
    chunks = [event["data"]["chunk"] for event in follower.events if event["type"] == "matches"]
    assert chunks == list(range(20))


def _read_checkpoints(folder: Path, scan: str) -> list[int]:
    connection = sqlite3.connect(folder / "state" / "journal.db")
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return [chunk for (chunk,) in connection.execute("SELECT chunk FROM checkpoints WHERE scan = ?", (scan,))]
    finally:
        connection.close()


@pytest.mark.parametrize("words", [("-m", "app", "serve"), UVICORN, UVICORN + WIRED], ids=["serve", "plain", "wired"])
async def test_work_that_does_not_end_is_cut_off_in_time_and_done_again(
    tmp_path: Path, synthetic_prices: Path, gate: Gate, words: tuple[str, ...]
) -> None:
    """A chunk that hangs, and a client that asked for much and takes nothing: whatever the server would wait for."""
    port, drain_s = find_port(), 1.0
    environment = make_environment(tmp_path, synthetic_prices, drain_s=drain_s, chunk_rows=2500)
    async with started(port, environment, *words) as server:
        much = await submit(server, "trial-everything")
        async with httpx.AsyncClient(base_url=server.url) as http:
            await http.get(f"/v1/scans/{much}/events", headers={"Accept": "application/x-ndjson"})
        scan = await submit_running(server, "trial-gated", gate=str(gate.path))
        followers, running = await follow(6, port, [scan], "sse", "websocket")
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        for _ in range(20):
            writer.write(f"GET /v1/scans/{much}/matches HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        await reader.readexactly(1)
        server.process.send_signal(signal.SIGTERM)
        code, seconds = await server.ended()
        writer.close()
        assert seconds < drain_s + LATE_S
        # uvicorn's own command ends by the signal that it got.
        assert code == (0 if words[1] == "app" else -signal.SIGTERM)
        assert all(len(follower.byes) == 1 for follower in followers)
    gate.open()
    async with started(port, environment, *words):
        async with asyncio.timeout(60):
            await running
        for follower in followers:
            assert_whole(follower.events, scan)


async def test_a_second_ctrl_c_stops_at_once_and_leaves_everything_in_order(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    port = find_port()
    environment = make_environment(tmp_path, sample_prices, drain_s=30, chunk_rows=1)
    async with started(port, environment) as server:
        scan = await submit_running(server, "trial-gated", gate=str(gate.path))
        followers, running = await follow(2, port, [scan], "sse", "websocket")
        server.process.send_signal(signal.SIGINT)
        await server.until_said('"draining"')
        server.process.send_signal(signal.SIGINT)
        code, seconds = await server.ended()
        assert code == 0
        assert seconds < 1.5
    _read_checkpoints(tmp_path, scan)
    gate.open()
    async with started(port, environment):
        async with asyncio.timeout(60):
            await running
        for follower in followers:
            assert_whole(follower.events, scan)


async def test_a_scan_that_is_cancelled_while_the_server_drains_is_cancelled_by_the_next_one(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    port = find_port()
    environment = make_environment(tmp_path, sample_prices, drain_s=30, chunk_rows=1, workers=2)
    async with started(port, environment) as server, httpx.AsyncClient(base_url=server.url) as http:
        hung = await submit_running(
            server, "trial-gated", gate=str(gate.path), only_symbol="IBM"
        )  # holds the server up
        scan = await submit_running(server, "trial-slow", pause_ms=300)
        server.process.send_signal(signal.SIGTERM)
        await server.until_said('"draining"')
        async with asyncio.timeout(20):
            while (await http.get("/v1/performance")).json()["running"] > 1:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert (await http.delete(f"/v1/scans/{scan}")).json()["state"] == "cancelling"
        gate.open()
        code, _ = await server.ended()
        assert code == 0
    async with started(port, environment) as server, httpx.AsyncClient(base_url=server.url) as http:
        await http.get(f"/v1/scans/{scan}/events", headers={"Accept": "application/x-ndjson"})
        assert (await http.get(f"/v1/scans/{scan}")).json()["state"] == "cancelled"
        await http.get(f"/v1/scans/{hung}/events", headers={"Accept": "application/x-ndjson"})
        assert (await http.get(f"/v1/scans/{hung}")).json()["state"] == "completed"


async def test_a_second_ctrl_c_also_ends_what_the_server_itself_waits_for(
    tmp_path: Path, synthetic_prices: Path
) -> None:
    port = find_port()
    async with started(port, make_environment(tmp_path, synthetic_prices, drain_s=30)) as server:
        much = await submit(server, "trial-everything")
        async with httpx.AsyncClient(base_url=server.url) as http:
            await http.get(f"/v1/scans/{much}/events", headers={"Accept": "application/x-ndjson"})
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        for _ in range(20):  # a client that asks for much and takes nothing
            writer.write(f"GET /v1/scans/{much}/matches HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        await reader.readexactly(1)
        server.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            while await is_listening(port):  # noqa: ASYNC110 - until the server's own stop has begun
                await asyncio.sleep(0.01)
        assert server.process.returncode is None
        server.process.send_signal(signal.SIGINT)
        code, seconds = await server.ended()
        writer.close()
        assert code == 0
        assert seconds < 2
        assert '"stopped"' in server.said[-1]
    _read_checkpoints(tmp_path, much)


async def is_listening(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except (ConnectionRefusedError, ConnectionResetError):  # reset when it stops to listen in this very moment
        return False
    writer.close()
    return True


@pytest.mark.usefixtures("trial_scanners")
async def test_a_scan_whose_watchers_the_server_sent_away_is_not_cancelled_for_want_of_them(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with serve(tmp_path, sample_prices, chunk_rows=1, reap_every_s=1000, session_idle_s=0.001) as serving:
        params = {"gate": str(gate.path)}
        body = {"scanner": "trial-gated", "params": params, "cancel_when_unwatched_s": 0.001}
        scan_id = (await serving.http.post("/v1/scans", json=body)).json()["id"]
        service = serving.service
        await until(lambda: service.log.get(scan_id).state is State.RUNNING)
        # Who submitted it is there for a while, like any client that polls.
        await until(lambda: service.sessions.reap() or service.sessions.unwatched_s(scan_id) > 0.001)
        await until(lambda: service.sessions.unwatched_s(scan_id) > 0.001)
        service.admission.is_draining = True
        assert (await service.reaper.reap())["unwatched"] == 0
        service.admission.is_draining = False
        assert (await service.reaper.reap())["unwatched"] == 1
