"""A server in a process of its own, for what no process survives."""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from tests.serving import GENEROUS
from tests.test_cli import find_port

ROOT = Path(__file__).parents[2]


class Server:
    """`scanwire serve`, again and again on the same port and state directory."""

    def __init__(self, state_dir: Path, prices: Path, *before: str, **settings: object) -> None:
        """`before` are the words in front of the command."""
        self.port = find_port()
        self.url = f"http://127.0.0.1:{self.port}"
        own = {"state_dir": state_dir, "prices": prices, "chunk_rows": 500} | GENEROUS | settings
        others = {name: value for name, value in os.environ.items() if not name.startswith("SCANWIRE_")}
        self._env = others | {f"SCANWIRE_{name.upper()}": str(value) for name, value in own.items()}
        self._before = before
        self._said = state_dir.with_suffix(".log")
        self._process: asyncio.subprocess.Process | None = None
        self.started = 0.0

    async def start(self) -> None:
        self.started = time.monotonic()
        with self._said.open("ab") as said:
            self._process = await asyncio.create_subprocess_exec(
                *(*self._before, sys.executable, "-m", "app", "serve", "--port", str(self.port)),
                cwd=ROOT,
                env=self._env,
                stdout=said,
                stderr=said,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def until_ready(self) -> None:
        async with asyncio.timeout(30), httpx.AsyncClient(base_url=self.url) as http:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    await http.get("/healthz")
                    return
                assert self._process is not None
                assert self._process.returncode is None, self._said.read_text()
                await asyncio.sleep(0.02)

    async def kill(self) -> None:
        assert self._process is not None
        assert self._process.returncode is None, self._said.read_text()
        self._process.kill()
        await self._process.wait()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await self.start()
        try:
            yield
        finally:
            assert self._process is not None
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
