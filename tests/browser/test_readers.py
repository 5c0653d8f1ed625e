"""What the page owes its readers: it keeps what they wrote, stays in its place, and is whole by keyboard and locale."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from tests.browser.pages import Producer, read_table, wait_for_rows, wait_for_state
from tests.serving import Serving, serve

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("trial_scanners")]

# Shifts from the very start of a page.
OBSERVE_SHIFTS = """globalThis.shifts = [];
new PerformanceObserver((list) => {
  for (const { value, sources } of list.getEntries()) shifts.push([value, sources.map(({ node }) => node?.id)]);
}).observe({ type: "layout-shift", buffered: true });"""
IS_WIDER = "() => document.documentElement.scrollWidth > innerWidth"
CUT_OFF = """() => [...document.querySelectorAll("#stats dt, #stats dd")]
  .filter((part) => part.scrollWidth > part.clientWidth).map((part) => part.textContent)"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(
    browser: Browser, trial_scanners: None, tmp_path_factory: pytest.TempPathFactory, synthetic_prices: Path
) -> AsyncIterator[Serving]:
    state = tmp_path_factory.mktemp("state")
    async with serve(state, synthetic_prices, chunk_rows=2000, max_running=1) as serving:
        yield serving


async def tab_to(page: Page, selector: str) -> None:
    """Goes on with the tab key until it is there."""
    for _ in range(60):
        await page.keyboard.press("Tab")
        if await page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            break
    await expect(page.locator(selector).first).to_be_focused()


async def test_going_back_finds_the_form_as_it_was_left(page: Page, serving: Serving) -> None:
    await page.goto(f"{serving.url}/?scanner=gap-up")
    where = page.locator("#field-where")
    await where.fill("close > 12")
    await page.click("#to-scans")
    await expect(where).to_have_value("close > 12")
    await page.click("#start")
    await page.wait_for_url("**/scans/s_*")
    await page.go_back()
    await expect(where).to_be_visible()
    await expect(where).to_have_value("close > 12")
    await page.click("#to-new")
    await expect(where).to_have_value("")
    # A link to where one is makes no second step to go back over.
    steps = await page.evaluate("history.length")
    await page.click("#to-new")
    assert await page.evaluate("history.length") == steps


async def test_the_whole_way_goes_without_a_mouse(page: Page, serving: Serving) -> None:
    await page.goto(f"{serving.url}/")
    await expect(page.locator("#field-where")).to_be_visible()
    await tab_to(page, "#scanner")
    await page.keyboard.type("Gap up")
    await expect(page.locator("#field-gap_pct_min")).to_be_visible()
    await tab_to(page, "#preset")
    await page.keyboard.type("relaxed")
    await expect(page.locator("#field-gap_pct_min")).to_have_value("0.02")
    await tab_to(page, "#start")
    await page.keyboard.press("Enter")
    await wait_for_state(page, "completed")
    count = json.loads(await (await page.request.get(f"{serving.url}/v1{_path(page, serving)}")).text())["matches"]
    await wait_for_rows(page, count)

    await tab_to(page, "#grid [role=columnheader]:nth-child(3) button")
    await page.keyboard.press("Enter")
    await expect(page.locator("#grid [aria-sort=descending]")).to_have_text("close")
    await page.keyboard.press("Shift+Tab")
    await page.keyboard.press("Shift+Tab")
    await page.keyboard.press("Shift+Tab")
    await expect(page.locator("#grid")).to_be_focused()
    await page.keyboard.press("ArrowDown")
    await page.keyboard.press("Enter")
    plot = page.locator("#chart [role=slider]")
    await expect(plot).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(plot).to_be_hidden()

    # The months are read out one by one, and one of them chosen.
    months = page.locator("#months [role=slider]")
    await tab_to(page, "#months [role=slider]")
    await page.keyboard.press("Home")
    await page.keyboard.press("ArrowRight")
    await expect(months).to_have_attribute("aria-valuenow", "2")
    text = await months.get_attribute("aria-valuetext")
    assert text == await page.text_content("#months .readout")
    await page.keyboard.press("Enter")
    assert text is not None
    shown = text.rpartition(": ")[2].split()[0]
    await expect(page.locator("#shown")).to_have_text(f"{shown} of {count} rows")


def _path(page: Page, serving: Serving) -> str:
    return page.url.removeprefix(serving.url)


async def test_without_scanners_nothing_can_be_started_and_the_next_attempt_is_counted_down(
    page: Page, serving: Serving
) -> None:
    await page.route("**/v1/scanners", lambda route: route.abort())
    await page.goto(f"{serving.url}/")
    await expect(page.locator("#trouble-when")).to_contain_text("Next attempt in")
    await expect(page.locator("#start")).to_be_disabled()
    await page.unroute("**/v1/scanners")
    await expect(page.locator("#field-where")).to_be_visible()
    await expect(page.locator("#start")).to_be_enabled()
    await expect(page.locator("#trouble")).to_be_hidden()


async def test_what_is_on_its_way_pushes_nothing_aside(page: Page, serving: Serving) -> None:
    scan = await serving.submit("gap-up", preset="relaxed")
    await serving.finish(scan["id"])
    await page.add_init_script(OBSERVE_SHIFTS)
    for address in ("/?scanner=gap-up", f"/scans/{scan['id']}"):
        await page.goto(f"{serving.url}{address}")
        await expect(page.locator("#list-body tr").first if "?" in address else page.locator("#row-1")).to_be_visible()
        await expect(page.locator("#connection[data-state=connecting]")).to_have_count(0)
        shifts = await page.evaluate("shifts")
        assert sum(value for value, _ in shifts) < 0.001, shifts


async def test_numbers_are_right_whatever_the_first_rows_of_a_column_hold(page: Page, serving: Serving) -> None:
    producer = await Producer.start(serving.url)
    await producer.post_rows(210, late=None, size=3)
    await page.goto(f"{serving.url}/scans/{producer.id}")
    await wait_for_rows(page, 210)
    await producer.post_rows(1, late=0.0212, size=2.5)
    await wait_for_rows(page, 211)
    assert (await read_table(page))[-1] == ["row-210", "0.0212", "2.5"]
    header = page.locator("#grid [role=columnheader]", has_text="late")
    await expect(header).to_have_class("num")
    # A filter is written as a condition of the form is.
    await page.fill("#filter", "size < 3")
    await expect(page.locator("#shown")).to_have_text("1 of 211 rows")
    await producer.end()


async def test_the_list_says_how_long_and_at_what_place(page: Page, serving: Serving) -> None:
    running = await serving.submit("trial-slow", pause_ms=400)
    queued = await serving.submit("trial-slow", pause_ms=1)
    quiet = await Producer.start(serving.url)
    await page.goto(f"{serving.url}/")

    def find_line(scan_id: str) -> Any:
        return page.locator("#list tr", has=page.locator(f"a[href='/scans/{scan_id}']"))

    await expect(find_line(queued["id"]).locator(".badge").last).to_have_text("1st in the queue")
    # Nothing has come of it since the page was opened.
    await expect(find_line(quiet.id).locator("td").nth(3)).to_contain_text(" s")
    await page.goto(f"{serving.url}/scans/{queued['id']}")
    await expect(page.locator("#stat-done")).to_have_text("–")
    await expect(page.locator("#stat-text")).to_contain_text("1st in the queue, ")
    for one in (running, queued):
        await serving.http.delete(f"/v1/scans/{one['id']}")
    await quiet.end()


@pytest.mark.parametrize("name", [f"s_{'A' * 22}", "nothing", "%E0%A4%A"])
async def test_a_scan_that_is_not_kept_is_said_so_in_place_of_dead_controls(
    page: Page, serving: Serving, name: str
) -> None:
    await page.goto(f"{serving.url}/scans/{name}")
    await expect(page.locator("#gone")).to_contain_text("It may be past its retention; submit it again.")
    await expect(page.locator("#scan")).to_be_hidden()
    await page.click("#gone >> text=New scan")
    await expect(page.locator("#field-where")).to_be_visible()
    await expect(page.locator("#gone")).to_be_hidden()


async def test_numbers_and_times_are_those_of_the_reader_and_utc_is_on_hover(
    browser: Browser, serving: Serving
) -> None:
    producer = await Producer.start(serving.url, total=5000)
    await producer.post_rows(1234, value=1234.5)
    context = await browser.new_context(locale="de-DE", timezone_id="Asia/Tokyo")
    page = await context.new_page()
    await page.goto(f"{serving.url}/scans/{producer.id}")
    await wait_for_rows(page, 1234)
    await expect(page.locator("#stat-done")).to_have_text("1.234 of 5.000 pages, 24 %")
    assert (await read_table(page))[0][1] == "1.234,50"
    started = (await serving.http.get(f"/v1/scans/{producer.id}")).json()["started_ts"]
    since = page.locator("#stat-since time")
    utc = await page.evaluate("(ts) => new Date(ts).toISOString().slice(0, 19).replace('T', ' ') + ' UTC'", started)
    assert await since.get_attribute("title") == utc
    tokyo = await page.evaluate("(ts) => new Date(ts).toLocaleTimeString([], { timeStyle: 'short' })", started)
    assert await since.text_content() == tokyo
    assert await page.evaluate("import('/static/page/format.js').then((f) => f.formatRange([0.2, 2]))") == "up to 2 s"
    await context.close()
    await producer.end()


async def test_every_export_holds_the_rows_of_the_table(page: Page, serving: Serving) -> None:
    scan = await serving.submit("gap-up", preset="relaxed", symbols=["SYN00001", "SYN00002", "SYN00003"])
    end = await serving.finish(scan["id"])
    await page.goto(f"{serving.url}/scans/{scan['id']}")
    await wait_for_rows(page, end["matches"])
    files = {}
    for kind in ("csv", "json", "parquet"):
        async with page.expect_download() as downloading:
            await page.click(f"#export-{kind}")
        files[kind] = await (await downloading.value).path()
    table = [texts[:2] for texts in await read_table(page)]
    assert len(table) > 1
    rows = json.loads(Path(files["json"]).read_text())["rows"]  # noqa: ASYNC240
    assert [[row["symbol"], row["date"]] for row in rows] == table
    for frame in (pl.read_csv(files["csv"]), pl.read_parquet(files["parquet"])):
        assert [list(row) for row in frame.select(pl.col("symbol", "date").cast(pl.String)).iter_rows()] == table


async def test_nothing_is_cut_off_from_a_small_phone_to_a_wall(page: Page, serving: Serving) -> None:
    producer = await Producer.start(serving.url, total=300_000)
    await producer.post_rows(1000, value=1.5)
    for width in (360, 390, 768, 1024, 1280, 1360, 1440, 1920, 3840):
        await page.set_viewport_size({"width": width, "height": 900})
        await page.goto(f"{serving.url}/scans/{producer.id}")
        await wait_for_rows(page, 1000)
        assert not await page.evaluate(IS_WIDER), width
        assert await page.evaluate(CUT_OFF) == [], width
    await page.set_viewport_size({"width": 360, "height": 740})
    await page.goto(f"{serving.url}/#scans")
    await expect(page.locator("#field-where")).to_be_visible()
    assert not await page.evaluate(IS_WIDER)
    badge = page.locator("#list tr", has=page.locator(f"a[href='/scans/{producer.id}']")).locator(".badge")
    box = await badge.bounding_box()
    assert box is not None
    assert box["x"] + box["width"] < 350
    await producer.end()


async def test_a_share_is_the_same_whole_percent_wherever_it_stands(page: Page, serving: Serving) -> None:
    producer = await Producer.start(serving.url, total=1000)
    await producer.post_rows(290)  # 0.29 * 100 is less than 29
    await page.goto(f"{serving.url}/scans/{producer.id}")
    await expect(page.locator("#stats")).to_contain_text("290 of 1,000 pages, 29 %")
    await expect(page.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "29")
    await expect(page).to_have_title(re.compile(r"^\(29 %\)"))
