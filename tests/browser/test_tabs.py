"""Tabs of a real Chromium as people have it: hidden, frozen, killed and left ones lose nothing and cost little."""

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from playwright.async_api import BrowserContext, CDPSession, Page

from tests.browser.pages import Producer, launch_plain, read_table, wait_for_rows, wait_for_state
from tests.serving import Serving, serve

pytestmark = pytest.mark.asyncio(loop_scope="module")

TABS = 12
KILLS = 5
# Until the title says so; it is written as an event comes, in a hidden tab as well.
WAIT_FOR_TITLE = """(start) => new Promise((resolve) => {
  const look = () => document.title.startsWith(start) && resolve();
  new MutationObserver(look).observe(document.querySelector("title"), { childList: true });
  look();
})"""
IS_LEADER = """() => navigator.locks.request(`probe ${Math.random()}`, async (probe) => {
  const { held } = await navigator.locks.query();
  const { clientId } = held.find(({ name }) => name === probe.name);
  return held.some((lock) => lock.name.startsWith("scanwire ") && lock.clientId === clientId);
})"""
NOTE_LIFE = """() => {
  globalThis.life = [];
  globalThis.ticks = 0;
  setInterval(() => (ticks += 1), 20);
  for (const type of ["freeze", "resume"]) document.addEventListener(type, () => life.push(type));
  const note = ({ type, persisted }) => life.push(`${type} ${persisted}`);
  for (const type of ["pagehide", "pageshow"]) addEventListener(type, note);
}"""
NOTE_NOTIFICATIONS = """
  globalThis.notes = [];
  globalThis.Notification = class extends Notification {
    constructor(title, options) {
      super(title, options);
      notes.push([title, options.tag]);
    }
    static requestPermission() {
      sessionStorage.asked = Number(sessionStorage.asked ?? 0) + 1;
      return super.requestPermission();
    }
  };
"""
# Of the clock by which the page draws what it says of passing time.
LONGER_THAN_A_TICK = "() => new Promise((resolve) => setTimeout(resolve, 500))"
NOTE_DRAWING = """() => {
  globalThis.drawn = 0;
  const note = (changes) => (drawn += changes.length);
  const all = { childList: true, subtree: true, attributes: true, characterData: true };
  new MutationObserver(note).observe(document.getElementById("scan"), all);
}"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[BrowserContext]:
    async with launch_plain(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(
    browser: BrowserContext, tmp_path_factory: pytest.TempPathFactory, synthetic_prices: Path
) -> AsyncIterator[Serving]:
    async with serve(tmp_path_factory.mktemp("state"), synthetic_prices) as serving:
        yield serving


@contextlib.asynccontextmanager
async def open_tabs(
    browser: BrowserContext, serving: Serving, count: int, shares: str
) -> AsyncIterator[tuple[list[Page], Producer]]:
    """Tabs on one scan of 1,000 pages, of which 290 are there; the last tab is in front."""
    producer = await Producer.start(serving.url, total=1000)
    await producer.post_rows(290)  # 0.29 * 100 is less than 29, and yet it is 29 %
    tabs = [await browser.new_page() for _ in range(count)]
    faults: list[str] = []
    try:
        for tab in tabs:
            tab.on("pageerror", lambda error: faults.append(str(error)))
            if shares == "leader":
                await tab.add_init_script("delete globalThis.SharedWorker")
        await asyncio.gather(*(tab.goto(f"{serving.url}/scans/{producer.id}") for tab in tabs))
        await asyncio.gather(*(wait_for_share(tab, producer) for tab in tabs))
        await wait_for_streams(serving.http, 1)
        yield tabs, producer
    finally:
        for tab in tabs:
            await tab.close()
    assert faults == []
    await wait_for_streams(serving.http, 0)


def write_share(producer: Producer) -> str:
    return f"({producer.sent // 10} %) "


async def wait_for_share(page: Page, producer: Producer) -> None:
    """Until a tab was told of all that was sent so far. How long a leader who is gone may cost the others is tested in
    time that is made up, by tests/node/sharing.test.mjs."""
    async with asyncio.timeout(20):
        await page.evaluate(WAIT_FOR_TITLE, write_share(producer))


async def wait_for_streams(http: httpx.AsyncClient, count: int) -> None:
    """Until the server has so many open, of all transports."""
    async with asyncio.timeout(20):
        while True:
            text = (await http.get("/metrics")).text
            found = re.findall(r'^scanwire_subscribers\{transport="[^"]+"\} (\S+)', text, re.M)
            if sum(map(float, found)) == count:
                return
            await asyncio.sleep(0.05)


async def check_all(tabs: list[Page], producer: Producer, serving: Serving) -> None:
    """After the end every table has what the server has: every row, in order, once."""
    await producer.end()
    rows = (await serving.http.get(f"/v1/scans/{producer.id}/matches")).json()["rows"]
    assert [row["name"] for row in rows] == producer.names
    for tab in tabs:
        await tab.bring_to_front()
        await wait_for_state(tab, "completed")
        await wait_for_rows(tab, producer.sent)
        assert [texts[0] for texts in await read_table(tab)] == producer.names


async def find_leader(tabs: list[Page]) -> Page:
    async with asyncio.timeout(20):
        while True:
            for tab in tabs:
                if await tab.evaluate(IS_LEADER):
                    return tab


async def find_renderer(browser: BrowserContext, thread: str) -> int:
    """The process of this browser that has a thread of this name, once there is one."""
    assert browser.browser is not None
    session = await browser.browser.new_browser_cdp_session()
    try:
        async with asyncio.timeout(20):
            while True:
                for process in (await session.send("SystemInfo.getProcessInfo"))["processInfo"]:
                    if process["type"] == "renderer" and thread in read_threads(process["id"]):
                        pid: int = process["id"]
                        return pid
    finally:
        await session.detach()


def read_threads(pid: int) -> set[str]:
    names: set[str] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            names.add(path.read_text().strip())
    return names


async def kill_worker(browser: BrowserContext, tabs: list[Page]) -> None:
    """The process that the SharedWorker runs in dies, and with it the tab that it belongs to."""
    pid = await find_renderer(browser, "SharedWorker th")
    os.kill(pid, signal.SIGKILL)


async def kill_leader(browser: BrowserContext, tabs: list[Page]) -> None:
    """The process of the tab that leads dies."""
    leader = await find_leader(tabs)
    session = await browser.new_cdp_session(leader)
    async with leader.expect_event("crash"):
        crashing = asyncio.create_task(session.send("Page.crash"))
    crashing.cancel()  # the dead answer nothing


@pytest.mark.parametrize(("shares", "kill"), [("worker", kill_worker), ("leader", kill_leader)])
async def test_twelve_tabs_have_one_connection_and_lose_nothing_when_their_leader_is_killed_five_times(
    browser: BrowserContext,
    serving: Serving,
    shares: str,
    kill: Callable[[BrowserContext, list[Page]], Awaitable[None]],
) -> None:
    async with open_tabs(browser, serving, TABS, shares) as (tabs, producer):
        alive = list(tabs)
        crashed: asyncio.Queue[Page] = asyncio.Queue()
        for tab in tabs:
            tab.on("crash", lambda tab: crashed.put_nowait(tab))
        for _ in range(KILLS):
            await producer.post_rows(10)
            await kill(browser, alive)
            alive.remove(await crashed.get())
            await producer.post_rows(10)
            await asyncio.gather(*(wait_for_share(tab, producer) for tab in alive))
            await wait_for_streams(serving.http, 1)
        # One that is closed costs no more.
        closing = await find_leader(alive) if shares == "leader" else alive[0]
        alive.remove(closing)
        await closing.close()
        await producer.post_rows(20)
        await asyncio.gather(*(wait_for_share(tab, producer) for tab in alive))
        await check_all(alive, producer, serving)


@pytest.mark.parametrize("shares", ["worker", "leader"])
async def test_a_hidden_tab_draws_nothing_and_has_everything_once_it_is_shown(
    browser: BrowserContext, serving: Serving, shares: str
) -> None:
    async with open_tabs(browser, serving, 2, shares) as (tabs, producer):
        hidden, shown = tabs
        await hidden.bring_to_front()
        await wait_for_rows(hidden, producer.sent)
        await shown.bring_to_front()
        await hidden.evaluate(LONGER_THAN_A_TICK)  # what was due is drawn
        await hidden.evaluate(NOTE_DRAWING)
        for _ in range(4):
            await producer.post_rows(20)
            await asyncio.gather(*(wait_for_share(tab, producer) for tab in tabs))
        await wait_for_rows(shown, producer.sent)
        await hidden.evaluate(LONGER_THAN_A_TICK)
        assert await hidden.evaluate("[document.visibilityState, drawn]") == ["hidden", 0]
        await hidden.bring_to_front()
        await wait_for_rows(hidden, producer.sent)
        assert await hidden.evaluate("drawn") > 0
        await check_all(tabs, producer, serving)


@pytest.mark.parametrize("shares", ["worker", "leader"])
async def test_a_tab_that_is_frozen_costs_the_others_nothing_and_has_everything_once_it_is_thawed(
    browser: BrowserContext, serving: Serving, shares: str
) -> None:
    async with open_tabs(browser, serving, 3, shares) as (tabs, producer):
        frozen = await find_leader(tabs) if shares == "leader" else tabs[0]
        others = [tab for tab in tabs if tab is not frozen]
        await others[0].bring_to_front()  # one that is shown is not frozen
        await frozen.evaluate(NOTE_LIFE)
        session = await browser.new_cdp_session(frozen)
        await session.send("Page.setWebLifecycleState", {"state": "frozen"})
        ticks = await look(session, "ticks")
        for _ in range(5):
            await producer.post_rows(20)
            for tab in others:
                await wait_for_share(tab, producer)
        assert await look(session, "ticks") == ticks
        assert await look(session, "life.join()") == "freeze"
        assert await look(session, "document.title.slice(0, 6)") == "(29 %)"
        await wait_for_streams(serving.http, 1)
        await session.send("Page.setWebLifecycleState", {"state": "active"})
        await wait_for_share(frozen, producer)
        assert await look(session, "life.join()") == "freeze,resume"
        await check_all(tabs, producer, serving)


async def test_a_leader_that_stops_without_a_word_is_replaced_and_steps_back_when_it_goes_on(
    browser: BrowserContext, serving: Serving
) -> None:
    async with open_tabs(browser, serving, 3, "leader") as (tabs, producer):
        leader = await find_leader(tabs)
        others = [tab for tab in tabs if tab is not leader]
        await others[0].bring_to_front()
        # A thread of its own tells its process from the others.
        await leader.evaluate(
            "() => void (globalThis.own = new Worker('/static/scanwire/ladder.js', { type: 'module' }))"
        )
        pid = await find_renderer(browser, "DedicatedWorker")
        os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(2):
                await producer.post_rows(20)
                for tab in others:
                    await wait_for_share(tab, producer)
        finally:
            os.kill(pid, signal.SIGCONT)
        await wait_for_share(leader, producer)
        await wait_for_streams(serving.http, 1)
        assert not await leader.evaluate(IS_LEADER)
        await producer.post_rows(20)
        await check_all(tabs, producer, serving)


async def look(session: CDPSession, expression: str) -> Any:
    """What an expression comes to in a page that may be frozen, or gone and back."""
    return (await session.send("Runtime.evaluate", {"expression": expression, "returnByValue": True}))["result"][
        "value"
    ]


@pytest.mark.parametrize("shares", ["worker", "leader"])
async def test_a_page_that_is_left_is_kept_and_has_everything_when_one_comes_back(
    browser: BrowserContext, serving: Serving, shares: str
) -> None:
    async with open_tabs(browser, serving, 2, shares) as (tabs, producer):
        left = await find_leader(tabs) if shares == "leader" else tabs[0]
        (other,) = (tab for tab in tabs if tab is not left)
        await left.bring_to_front()
        await left.evaluate(NOTE_LIFE)
        session = await browser.new_cdp_session(left)
        await left.goto(f"{serving.url}/openapi.json")
        await producer.post_rows(20)
        await wait_for_share(other, producer)
        await look(session, "history.back(), 0")
        await left.wait_for_url("**/scans/*", wait_until="commit")
        await wait_for_rows(left, producer.sent)
        life = await look(session, "life.filter((one) => one.startsWith('page')).join()")
        assert life == "pagehide true,pageshow true"
        await wait_for_streams(serving.http, 1)
        await producer.post_rows(20)
        await check_all(tabs, producer, serving)


async def test_a_notification_comes_at_the_end_to_who_asked_for_it_and_nobody_else_is_asked(
    browser: BrowserContext, serving: Serving
) -> None:
    await browser.grant_permissions(["notifications"], origin=serving.url)
    shown = await browser.new_page()
    tab = await browser.new_page()
    await tab.add_init_script(NOTE_NOTIFICATIONS)
    try:
        for is_asked_for in (False, True):
            producer = await Producer.start(serving.url, total=10)
            await tab.bring_to_front()
            await tab.goto(f"{serving.url}/scans/{producer.id}")
            await wait_for_state(tab, "running")
            if is_asked_for:
                await tab.check("#notify")
                await tab.reload()  # it is remembered
                await wait_for_state(tab, "running")
                assert await tab.is_checked("#notify")
            await shown.bring_to_front()
            await producer.post_rows(3)
            await tab.evaluate(WAIT_FOR_TITLE, "(30 %) ")
            await producer.end()
            await tab.evaluate(WAIT_FOR_TITLE, "A report · ")  # the share has gone from it
            notes = [["A report: completed", producer.id]] if is_asked_for else []
            assert await tab.evaluate("notes") == notes
        assert await tab.evaluate("sessionStorage.asked") == "1"
        # Who sees the end needs no notification.
        producer = await Producer.start(serving.url)
        await tab.bring_to_front()
        await tab.goto(f"{serving.url}/scans/{producer.id}")
        await producer.end()
        await wait_for_state(tab, "completed")
        assert await tab.evaluate("notes") == []
    finally:
        await tab.close()
        await shown.close()
