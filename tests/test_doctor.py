"""`scanwire doctor`: what it tells of a server, and of the machine that it runs on."""

import asyncio
import json
import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import until
from tests.serving import serve
from tests.test_cli import find_port, finish, read_until, run, start

pytestmark = pytest.mark.usefixtures("trial_scanners")


async def test_a_healthy_server_is_told_so_with_every_measure(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path / "state", sample_prices) as serving:
        await serving.finish((await serving.submit())["id"])
        ended = await run("doctor", "--url", serving.url, "--state-dir", str(tmp_path / "other"))
        assert ended.code == 0, ended
        lines = ended.out.splitlines()
        assert next(line for line in lines if line.startswith("scan duration p95")).split()[-1] == "healthy"
        assert "Open incidents: none" in lines
        port = serving.url.rpartition(":")[2]
        assert f"Port {port} answers. It is held by pid {os.getpid()}" in ended.out


async def test_a_mistreated_server_is_told_with_cause_culprit_and_cure(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path / "state", sample_prices, early_polls_max=20) as serving:
        scan = (await serving.http.post("/v1/scans", json={"scanner": "external"})).json()
        for _ in range(40):
            await serving.http.get(scan["links"]["self"])
        words = ("doctor", "--url", serving.url, "--state-dir", str(tmp_path / "other"))
        ended, as_json = await asyncio.gather(run(*words), run(*words, "--json"))
        assert ended.code == as_json.code == 1, ended
        assert re.search(r"aggressive polling \(API behaviour\), (just now|for \d+ s): 1 client polled ", ended.out)
        assert "  who: " in ended.out
        assert "  → Wait for `poll_after_s` of each answer" in ended.out
        told: Any = json.loads(as_json.out)
        assert [cause["name"] for cause in told["diagnosis"]["causes"]] == ["aggressive polling"]


async def test_a_server_that_crashed_is_told_by_what_it_left_and_one_that_runs_by_its_pid(
    tmp_path: Path, sample_prices: Path
) -> None:
    port, state = find_port(), tmp_path / "state"
    words = ("--port", str(port), "--state-dir", str(state), "--prices", str(sample_prices))
    url = f"http://127.0.0.1:{port}"
    server = await start("serve", *words)
    await read_until(server, "Scanwire serves on")
    running = await run("doctor", "--url", url, "--state-dir", str(state))
    assert running.code == 0, running
    assert f"pid {server.pid} works in {state}, serving on {url}" in running.out
    assert f"`kill {server.pid}` ends it in order" in running.out

    server.send_signal(signal.SIGKILL)
    await server.wait()
    crashed = await run("doctor", "--url", url, "--state-dir", str(state))
    assert crashed.code == 2
    assert "did not stop in order" in crashed.out
    assert "No Scanwire server can be reached" in crashed.err

    again = await start("serve", *words)
    await read_until(again, "Scanwire serves on")
    again.send_signal(signal.SIGTERM)
    assert (await finish(again)).code == 0
    stopped = await run("doctor", "--url", url, "--state-dir", str(state))
    assert "did not stop in order" not in stopped.out
    assert f"Nobody that this user may look at holds port {port}." in stopped.out


async def test_whoever_else_holds_the_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = await asyncio.start_server(lambda reader, writer: writer.close(), sock=listener)
        async with server:
            await until(server.is_serving)
            ended = await run("doctor", "--url", f"http://127.0.0.1:{port}", "--state-dir", str(tmp_path))
    assert ended.code == 2
    assert f"Port {port} does not answer as it should. It is held by pid {os.getpid()}" in ended.out
