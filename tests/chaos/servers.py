"""`scanwire serve` as a process of its own, started and ended by a test."""

import asyncio
import contextlib
import os
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.serving import GENEROUS
from tests.trial_scanners import ENTRY_POINTS

ROOT = Path(__file__).parents[2]
SERVE = ("-m", "app", "serve")


def find_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def make_environment(folder: Path, prices: Path, **settings: object) -> dict[str, str]:
    """What a server needs: its state and prices, the trial scanners, and limits that are in nobody's way."""
    info = folder / "site" / "trial_scanners-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trial-scanners\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SCANWIRE_")}
    given = GENEROUS | {"state_dir": folder / "state", "prices": prices, "log_format": "json"} | settings
    path = os.pathsep.join((str(ROOT), str(folder / "site")))
    return clean | {"PYTHONPATH": path} | {f"SCANWIRE_{name.upper()}": str(value) for name, value in given.items()}


@dataclass(eq=False)
class Server:
    """A process that was started; everything that it writes to stderr is kept."""

    process: Process
    url: str
    said: list[str] = field(default_factory=list)
    _reading: asyncio.Task[None] | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.said.append(line.decode())
            self._news.set()

    async def until_said(self, text: str) -> None:
        async with asyncio.timeout(60):
            while not any(text in line for line in self.said):
                self._news.clear()
                await self._news.wait()

    async def until_ready(self) -> None:
        """New scans are taken."""
        async with asyncio.timeout(60), httpx.AsyncClient() as http:
            while self.process.returncode is None:
                with contextlib.suppress(httpx.TransportError):
                    if (await http.get(f"{self.url}/readyz")).status_code == 200:
                        return
                await asyncio.sleep(0.02)
        raise AssertionError("".join(self.said))

    async def ended(self, within_s: float = 60) -> tuple[int, float]:
        """The exit code, and the seconds that it took from now."""
        began = time.monotonic()
        async with asyncio.timeout(within_s):
            code = await self.process.wait()
        seconds = time.monotonic() - began
        if self._reading is not None:
            await self._reading
        assert not any("Traceback" in line for line in self.said), "".join(self.said)
        return code, seconds

    async def kill(self) -> None:
        """Ends it for certain, if it still runs."""
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        if self._reading is not None:
            await self._reading


async def spawn(port: int, environment: dict[str, str], *words: str) -> Server:
    """Starts a server; it is not ready yet."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, "--port", str(port), cwd=ROOT, env=environment, stdout=asyncio.subprocess.DEVNULL,
        stderr=PIPE, start_new_session=True,
    )  # fmt: skip
    server = Server(process, f"http://127.0.0.1:{port}")
    server._reading = asyncio.create_task(server._read())
    return server


@contextlib.asynccontextmanager
async def started(port: int, environment: dict[str, str], *words: str) -> AsyncIterator[Server]:
    """A server that is ready; killed at the end of the block when it still runs."""
    server = await spawn(port, environment, *(words or SERVE))
    try:
        await server.until_ready()
        yield server
    finally:
        await server.kill()
