"""The page in a real Chromium while things break, and while much happens: nothing is lost or shown twice."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from tests.browser.pages import (
    WAIT_MS,
    Producer,
    Relay,
    fetch,
    profile,
    read_table,
    wait_for_answer,
    wait_for_rows,
    wait_for_state,
)
from tests.serving import Serving, serve
from tests.test_cli import find_port

pytestmark = pytest.mark.asyncio(loop_scope="module")

# What a browser lacks that has this transport left, by its name on the page.
LACKS = {
    "event stream": (),
    "WebSocket": ("Response.prototype.body",),
    "EventSource": ("Response.prototype.body", "globalThis.WebSocket"),
    "Polling": ("Response.prototype.body", "globalThis.WebSocket", "globalThis.EventSource"),
}
# Long tasks and layout shifts from now on.
OBSERVE = """() => {
  const observe = (type, values, read) =>
    new PerformanceObserver((list) => values.push(...list.getEntries().map(read))).observe({ type });
  observe("longtask", (globalThis.tasks = []), (entry) => entry.duration);
  observe("layout-shift", (globalThis.shifts = []), (entry) => entry.value);
}"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory, synthetic_prices: Path
) -> AsyncIterator[Serving]:
    async with serve(tmp_path_factory.mktemp("state"), synthetic_prices) as serving:
        yield serving


async def check_table(page: Page, producer: Producer) -> None:
    """The table has every row that was sent, in order, once."""
    await wait_for_rows(page, producer.sent)
    assert [texts[0] for texts in await read_table(page)] == producer.names


@contextlib.asynccontextmanager
async def run_server(port: int, state: Path, prices: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A server in a process of its own, once it is ready."""
    words = ("serve", "--port", str(port), "--prices", str(prices), "--state-dir", str(state))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", *words, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await wait_for_answer(f"http://127.0.0.1:{port}/healthz")
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await process.wait()


async def test_a_server_that_is_killed_and_comes_back_costs_no_row(
    browser: Browser, tmp_path: Path, synthetic_prices: Path
) -> None:
    port = find_port()
    url = f"http://127.0.0.1:{port}"
    async with profile(browser) as context:
        page = await context.new_page()
        async with run_server(port, tmp_path, synthetic_prices) as process:
            producer = await Producer.start(url)
            await producer.post_rows(100)
            await page.goto(f"{url}/scans/{producer.id}")
            await wait_for_rows(page, 100)
            await producer.post_rows(50)
            os.kill(process.pid, signal.SIGKILL)
            await process.wait()
            await expect(page.locator("#connection[data-state=offline]")).to_be_visible(timeout=WAIT_MS)
            await expect(page.locator("#connection-text")).to_contain_text("next attempt in")
            await expect(page.locator("#connection-now")).to_be_visible()
        async with run_server(port, tmp_path, synthetic_prices):
            await page.dispatch_event("#connection-now", "click")
            await producer.post_rows(50)
            await expect(page.locator("#connection[data-state=live]")).to_be_visible(timeout=WAIT_MS)
            await producer.end()
            await wait_for_state(page, "completed")
            await check_table(page, producer)


async def test_a_network_that_goes_and_comes_back_costs_no_row(browser: Browser, serving: Serving) -> None:
    producer = await Producer.start(serving.url)
    await producer.post_rows(100)
    relay = Relay(int(serving.url.rpartition(":")[2]))
    await relay.mend()
    async with profile(browser) as context:
        page = await context.new_page()
        await page.goto(f"http://127.0.0.1:{relay.port}/scans/{producer.id}")
        await wait_for_rows(page, 100)
        await context.set_offline(True)  # the page hears of it; but what is open stays open
        await relay.cut()
        await producer.post_rows(50)
        await expect(page.locator("#connection[data-state=offline]")).to_be_visible(timeout=WAIT_MS)
        assert await page.get_attribute("#grid", "aria-rowcount") == "101"
        await relay.mend()
        await context.set_offline(False)
        await producer.post_rows(50)
        await check_table(page, producer)
        await producer.end()
        await wait_for_state(page, "completed")
    await relay.cut()


@pytest.mark.parametrize("transport", LACKS)
async def test_over_each_transport_a_connection_that_breaks_costs_no_row(
    browser: Browser, serving: Serving, transport: str
) -> None:
    producer = await Producer.start(serving.url)
    await producer.post_rows(50)
    relay = Relay(int(serving.url.rpartition(":")[2]))
    await relay.mend()
    async with profile(browser, shares="leader") as context:
        await context.add_init_script("\n".join(f"delete {part};" for part in LACKS[transport]))
        page = await context.new_page()
        await page.goto(f"http://127.0.0.1:{relay.port}/scans/{producer.id}")
        for _ in range(2):
            await expect(page.locator("#connection-text")).to_contain_text(transport, timeout=WAIT_MS)
            await wait_for_rows(page, producer.sent)
            await producer.post_rows(10)
            await relay.cut()
            await producer.post_rows(10)
            await relay.mend()
        await producer.post_rows(10)
        await check_table(page, producer)
        await producer.end()
        await wait_for_state(page, "completed")
        await check_table(page, producer)
    await relay.cut()


async def test_a_proxy_that_buffers_costs_no_row(browser: Browser, serving: Serving) -> None:
    producer = await Producer.start(serving.url)
    await producer.post_rows(50)
    relay = Relay(int(serving.url.rpartition(":")[2]), holds=True)
    await relay.mend()
    async with profile(browser) as context:
        page = await context.new_page()
        await page.goto(f"http://127.0.0.1:{relay.port}/scans/{producer.id}")
        await expect(page.locator("#connection-text")).to_have_text("Live · WebSocket", timeout=WAIT_MS)
        await producer.post_rows(50)
        await check_table(page, producer)
        await producer.end()
        await wait_for_state(page, "completed")
        await check_table(page, producer)
    await relay.cut()


async def test_a_thousand_rows_a_second_hold_up_nothing_and_shift_nothing(browser: Browser, serving: Serving) -> None:
    producer = await Producer.start(serving.url)
    await producer.post_rows(100, value=0.5, date="2010-01-15")
    async with profile(browser, viewport={"width": 1280, "height": 1800}) as context:
        page = await context.new_page()
        await page.goto(f"{serving.url}/scans/{producer.id}")
        await wait_for_rows(page, 100)
        await page.click("#grid [role=columnheader] >> text=value")  # each row that comes goes in between
        await page.evaluate(OBSERVE)
        await producer.stream(1000, seconds=5)
        await producer.end()
        await wait_for_state(page, "completed")
        await wait_for_rows(page, producer.sent)
        tasks, shifts = await page.evaluate("[tasks, shifts]")
        assert [task for task in tasks if task > 100] == []
        assert sum(shifts) < 0.001, shifts
        names = [texts[0] for texts in await read_table(page)]
        assert len(names) == producer.sent
        assert set(names) == set(producer.names)


async def test_a_hundred_thousand_rows_are_a_few_elements(browser: Browser, serving: Serving) -> None:
    producer = await Producer.start(serving.url)
    for _ in range(50):
        await producer.post_rows(2000, value=1.5)
    await producer.end()
    async with profile(browser) as context:
        page = await context.new_page()
        await page.goto(f"{serving.url}/scans/{producer.id}")
        await wait_for_rows(page, 100_000)
        await page.evaluate(OBSERVE)
        await page.focus("#grid")
        for key in ("End", "PageUp", "Home", "PageDown"):
            await page.keyboard.press(key)
        await page.click("#grid [role=columnheader] >> text=name")
        await expect(page.locator("#grid [aria-rowindex='2'] [role=gridcell]").first).to_have_text("row-0")
        await page.fill("#filter", "row-9999")
        await expect(page.locator("#shown")).to_have_text("11 of 100,000 rows")
        assert await page.locator("#grid [role=row]").count() < 120
        assert max(await page.evaluate("tasks"), default=0) < 300


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 360)])
async def test_axe_finds_nothing_wrong(browser: Browser, serving: Serving, scheme: Any, width: int) -> None:
    axe = fetch("axe-core", "axe-core/axe.min.js").read_text()
    async with profile(browser, color_scheme=scheme, viewport={"width": width, "height": 800}) as context:
        page = await context.new_page()

        async def look() -> None:
            await page.evaluate(axe)
            found = (await page.evaluate("axe.run()"))["violations"]
            assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")

        await page.goto(f"{serving.url}/?scanner=gap-up")
        await page.fill("#field-gap_pct_min", "-2")
        await page.click("#start")
        await expect(page.locator("#field-gap_pct_min-error")).not_to_be_empty()
        await look()
        running = await Producer.start(serving.url, total=100)
        await running.post_rows(30, value=1.5, date="2020-01-02")
        await page.goto(f"{serving.url}/scans/{running.id}")
        await wait_for_rows(page, 30)
        await page.click("#pause")
        await look()
        await running.end()
        scan = await serving.submit("gap-up", preset="relaxed")
        await page.goto(f"{serving.url}/scans/{scan['id']}")
        await wait_for_state(page, "completed")
        await page.locator("#grid .grid-body [role=row]:visible").nth(1).click()
        await expect(page.locator("#chart [role=slider]")).to_be_visible()
        await look()
