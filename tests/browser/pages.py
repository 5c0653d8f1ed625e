"""What the tests in a real browser share: Chromium, a producer, and what a page shows."""

import asyncio
import contextlib
import os
import shutil
import subprocess
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect

from tests.conftest import require
from tests.test_cli import find_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
# Where npm packages are kept between runs.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scanwire-test"
WAIT_MS = 20_000

# Goes through the whole table as a reader would, and gives the texts of each row once for each place it was seen at.
_READ_TABLE = """async () => {
  const grid = document.getElementById("grid");
  const seen = new Map();
  const frame = () => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
  for (let top = 0; top < grid.scrollHeight; top += Math.max(grid.clientHeight - 60, 30)) {
    grid.scrollTop = top;
    await frame();
    for (const row of grid.querySelectorAll(".grid-body > [role=row]:not([hidden])")) {
      seen.set(Number(row.getAttribute("aria-rowindex")), [...row.children].map((cell) => cell.textContent));
    }
  }
  return [...seen].sort((a, b) => a[0] - b[0]).map(([, texts]) => texts);
}"""


async def wait_for_answer(url: str) -> None:
    """Until a process that is starting answers there."""
    async with asyncio.timeout(30), httpx.AsyncClient() as http:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get(url)).is_success:
                    return
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def launch() -> AsyncIterator[Browser]:
    require(bool(CHROMIUM), "Chromium")
    async with async_playwright() as playwright:
        # Root, as in a container, has no sandbox.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        try:
            yield browser
        finally:
            await browser.close()


@contextlib.asynccontextmanager
async def launch_plain(state: Path) -> AsyncIterator[BrowserContext]:
    """Chromium as people have it: a tab behind another is hidden and can be frozen, and a page that is left is kept.

    With Playwright's own launch every tab thinks that it is shown, and no page is kept.
    """
    require(bool(CHROMIUM), "Chromium")
    port = find_port()
    flags = ["--headless=new", "--no-first-run", f"--remote-debugging-port={port}", f"--user-data-dir={state}"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []
    process = await asyncio.create_subprocess_exec(CHROMIUM, *flags, "about:blank", stdout=DEVNULL, stderr=DEVNULL)
    try:
        await wait_for_answer(f"http://127.0.0.1:{port}/json/version")
        async with async_playwright() as playwright:
            browser = await playwright.chromium.connect_over_cdp(f"http://127.0.0.1:{port}", no_defaults=True)
            (context,) = browser.contexts
            context.set_default_timeout(WAIT_MS)
            yield context
            await (await browser.new_browser_cdp_session()).send("Browser.close")
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def profile(browser: Browser, *, shares: str = "worker", **options: Any) -> AsyncIterator[BrowserContext]:
    """A browser profile of its own; with `shares="leader"` it is one of those that have no SharedWorker."""
    context = await browser.new_context(locale="en-US", **options)
    context.set_default_timeout(WAIT_MS)
    if shares == "leader":
        await context.add_init_script("delete globalThis.SharedWorker")
    faults: list[str] = []
    context.on("weberror", lambda error: faults.append(str(error.error)))
    context.on("console", lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None)
    try:
        yield context
    finally:
        await context.close()
    assert faults == []


async def wait_for_state(page: Page, state: str) -> None:
    await page.wait_for_selector(f"#scan-state[data-state={state}]")


async def wait_for_rows(page: Page, count: int) -> None:
    """Until the table has this many rows."""
    await expect(page.locator("#grid")).to_have_attribute("aria-rowcount", str(count + 1), timeout=WAIT_MS)


async def read_table(page: Page) -> list[list[str]]:
    """The texts of all rows, in order, as a reader sees them who goes through the table."""
    await page.bring_to_front()  # others are drawn about once a second
    texts: list[list[str]] = await page.evaluate(_READ_TABLE)
    return texts


class Relay:
    """The network between browser and server, which can be cut; with `holds` it passes on no stream before its end."""

    def __init__(self, target: int, holds: bool = False) -> None:
        self._target = target
        self._holds = holds
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = find_port()

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", self.port)

    async def cut(self) -> None:
        """All connections end, and no new one is taken."""
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await self._server.wait_closed()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.gather(self._pass_on(reader, far_writer), self._pass_on(far_reader, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        held = b""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                if self._holds and (held or b"content-type: text/event-stream" in data):
                    held += data
                    continue
                writer.write(data)
                await writer.drain()
            writer.write(held)
        writer.close()
        self._writers.discard(writer)


def fetch(package: str, file: str) -> Path:
    """A file of an npm package, which is fetched when it is not there yet."""
    require(bool(shutil.which("npm") and shutil.which("node")), f"npm and node, for {package}")
    path = CACHE / "node_modules" / file
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        words = ["npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(CACHE), package]
        subprocess.run(words, check=True, timeout=300)
    return path


class Producer:
    """Posts the rows of an external scan, which has the column `name`: row-0, row-1 …"""

    def __init__(self, url: str, snapshot: dict[str, Any]) -> None:
        self.id: str = snapshot["id"]
        self.sent = 0
        self._events = f"{url}{snapshot['links']['events']}"
        self._headers = {"Authorization": f"Bearer {snapshot['producer_token']}"}

    @classmethod
    async def start(cls, url: str, total: int | None = None) -> "Producer":
        async with httpx.AsyncClient() as http:
            params = {"title": "A report", "total": total, "unit": "pages"}
            answer = await http.post(f"{url}/v1/scans", json={"scanner": "external", "params": params})
            assert answer.status_code == 202, answer.text
            return cls(url, answer.json())

    async def post(self, *events: dict[str, Any]) -> None:
        async with httpx.AsyncClient() as http:
            answer = await http.post(self._events, json=list(events), headers=self._headers)
            assert answer.status_code == 202, answer.text

    async def post_rows(self, count: int, **columns: Any) -> None:
        rows = [{"name": f"row-{self.sent + index}", **columns} for index in range(count)]
        self.sent += count
        await self.post({"type": "matches", "rows": rows}, {"type": "progress", "done": self.sent})

    async def stream(self, rows_per_s: int, seconds: float) -> None:
        """Rows at a steady rate, twenty times a second."""
        loop = asyncio.get_running_loop()
        begin, times = loop.time(), int(seconds * 20)
        for time in range(times):
            await self.post_rows(rows_per_s // 20, value=time * 1.5, date=f"20{time % 25:02}-{time % 12 + 1:02}-15")
            await asyncio.sleep(max(begin + time / 20 - loop.time(), 0))

    async def end(self, state: str = "completed") -> None:
        await self.post({"type": "end", "state": state})

    @property
    def names(self) -> list[str]:
        """Of all rows that were sent, in order."""
        return [f"row-{number}" for number in range(self.sent)]
