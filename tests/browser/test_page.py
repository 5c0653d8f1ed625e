"""The page in a real Chromium, against a real server: a scan from the form to the end, and all that is beside it."""

import csv
import io
import re
from collections.abc import AsyncIterator
from datetime import date
from pathlib import Path

import polars as pl
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from app.core.settings import hash_key
from app.market.store import write_store
from tests.browser.pages import Producer, profile, read_table, wait_for_rows, wait_for_state
from tests.conftest import Gate
from tests.serving import Serving, serve

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("trial_scanners")]

# Scrolls there, if told to, and gives the text in the second line of what is in sight.
SCROLL_AND_LOOK = """async (top) => {
  const grid = document.getElementById("grid");
  if (top !== null) grid.scrollTop = top;
  await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
  const box = grid.getBoundingClientRect();
  return document.elementFromPoint(box.left + 20, box.top + 28 * 2.5).textContent;
}"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(
    browser: Browser, trial_scanners: None, tmp_path_factory: pytest.TempPathFactory, synthetic_prices: Path
) -> AsyncIterator[Serving]:
    state = tmp_path_factory.mktemp("state")
    async with serve(state, synthetic_prices, chunk_rows=2000, max_running=2) as serving:
        yield serving


async def start(page: Page, serving: Serving, scanner: str, **values: str) -> None:
    """Fills in the form and sends it."""
    await page.goto(f"{serving.url}/")
    await page.select_option("#scanner", scanner)
    for name, value in values.items():
        await page.fill(f"#field-{name}", value)
    await page.click("#start")


async def test_a_scan_from_the_form_to_its_rows_a_chart_an_export_and_a_second_reader(
    page: Page, serving: Serving, browser: Browser, gate: Gate
) -> None:
    held = serving.service.store.symbols[-1].symbol
    await start(page, serving, "trial-gated", gate=str(gate.path), only_symbol=held)
    # The address is that of the scan, and rows are there, while the scan still runs.
    await page.wait_for_url("**/scans/s_*")
    at = f"/v1/scans/{page.url.rpartition('/')[2]}"
    await wait_for_state(page, "running")
    await expect(page.locator("#stat-matches")).to_have_text("96")
    await wait_for_rows(page, 96)
    await expect(page.locator("#scan-synthetic")).to_be_visible()
    await expect(page).to_have_title(re.compile(r"^\(9\d %\) trial-gated$"))
    await expect(page.locator("#progress")).to_have_attribute("aria-valuenow", "96")
    await page.reload()
    await wait_for_rows(page, 96)
    await expect(page.locator("#stat-matches")).to_have_text("96")
    gate.open()
    await wait_for_state(page, "completed")
    snapshot = (await serving.http.get(at)).json()
    rows = (await serving.http.get(f"{at}/matches")).json()["rows"]
    assert len(rows) == snapshot["matches"] == 100
    assert [texts[:2] for texts in await read_table(page)] == [[row["symbol"], row["date"]] for row in rows]

    # A row opens the prices around it, the day marked.
    await page.evaluate("document.getElementById('grid').scrollTop = 0")
    await page.click("#grid [data-place='3']")
    plot = page.locator("#chart [role=slider]")
    await expect(plot).to_be_visible()
    assert await page.text_content("#chart-title") == f"{rows[3]['symbol']}, {rows[3]['date']}"
    assert "the match" in (await plot.get_attribute("aria-valuetext") or "")
    assert await page.locator("#chart svg rect.mark").count() == 1
    await expect(page.locator("#chart-synthetic")).to_be_visible()
    # It is the first day of the symbol: the 30 days from it on.
    assert await plot.get_attribute("aria-valuemax") == "30"

    async with page.expect_download() as downloading:
        await page.click("#export-csv")
    download = await downloading.value
    assert download.suggested_filename.startswith("synthetic-trial-gated-")
    text = Path(await download.path()).read_text()  # noqa: ASYNC240
    assert [line["symbol"] for line in csv.DictReader(io.StringIO(text))] == [row["symbol"] for row in rows]

    await page.reload()
    await wait_for_rows(page, 100)
    assert await page.text_content("#scan-state") == "completed"
    async with profile(browser, color_scheme="dark") as other:
        shared = await other.new_page()
        await shared.goto(page.url)
        await wait_for_rows(shared, 100)
        assert await read_table(shared) == await read_table(page)
        await shared.click("#to-scans")
        await expect(shared.locator(f"#list a[href='{page.url.removeprefix(serving.url)}']")).to_be_visible()

    # Back is the form; on is the scan again.
    await page.go_back()
    await expect(page.locator("#form")).to_be_visible()
    await page.go_forward()
    await wait_for_rows(page, 100)


async def test_a_scan_is_run_again_with_other_parameters(page: Page, serving: Serving) -> None:
    scan = await serving.submit("gap-up", preset="relaxed", where="close > 3", symbols=["SYN00001"])
    await serving.finish(scan["id"])
    await page.goto(f"{serving.url}/scans/{scan['id']}")
    await wait_for_state(page, "completed")
    await page.click("#again")
    await expect(page.locator("#field-where")).to_have_value("close > 3")
    await expect(page.locator("#field-symbols")).to_have_value("SYN00001")
    await expect(page.locator("#field-gap_pct_min")).to_have_value("0.02")
    await page.fill("#field-where", "close > 4")
    await page.click("#start")
    await page.wait_for_url(lambda url: "/scans/" in url and scan["id"] not in url)
    again = (await serving.http.get(f"/v1/{page.url.removeprefix(serving.url + '/')}")).json()
    assert again["params"] == {**scan["params"], "where": "close > 4"}


async def test_a_preset_fills_the_form_and_the_schema_says_what_may_be_in_it(page: Page, serving: Serving) -> None:
    await page.goto(f"{serving.url}/?scanner=gap-up")
    field = page.locator("#field-gap_pct_min")
    await expect(field).to_have_value("0.05")
    assert [await field.get_attribute(name) for name in ("type", "min", "max")] == ["number", "-1", "100"]
    await page.select_option("#preset", "relaxed")
    await expect(field).to_have_value("0.02")
    await field.fill("101")
    await page.click("#start")
    await expect(page.locator("#field-gap_pct_min-error")).to_contain_text("100")
    await expect(field).to_be_focused()
    assert page.url.endswith("/?scanner=gap-up")


async def test_what_the_server_finds_wrong_is_said_beside_the_field(page: Page, serving: Serving) -> None:
    await start(page, serving, "gap-up", where="nothing_known > 1", start="2020-01-02", end="2020-01-01")
    error = page.locator("#field-start-error")
    await expect(error).to_contain_text("is after end")
    await page.fill("#field-end", "")
    await page.click("#start")
    await expect(page.locator("#field-where-error")).to_contain_text("nothing_known")
    await expect(page.locator("#field-where")).to_be_focused()
    assert await page.get_attribute("#field-where", "aria-invalid") == "true"
    await expect(error).to_be_empty()


async def test_a_refusal_says_when_to_try_again(browser: Browser, tmp_path: Path, synthetic_prices: Path) -> None:
    async with serve(tmp_path, synthetic_prices, submit_per_min=1) as serving, profile(browser) as context:
        page = await context.new_page()
        await start(page, serving, "gap-up", where="close > 1")
        await page.wait_for_url("**/scans/s_*")
        await start(page, serving, "gap-up", where="close > 2")
        refusal = page.locator("#refusal")
        await expect(refusal).to_contain_text(re.compile(r"1 per 60 s\. .* Try again in \d+ s\.$"))
        # It is counted down, and read aloud once.
        assert (await refusal.text_content() or "").count("Try again in") == 1
        said = await page.text_content("#refusal [role=alert]")
        before = await refusal.text_content()
        await expect(refusal).not_to_have_text(before or "")
        assert await page.text_content("#refusal [role=alert]") == said
        assert await page.is_enabled("#start")


async def test_a_cancel_shows_at_once_and_then_how_it_ended(page: Page, serving: Serving) -> None:
    producer = await Producer.start(serving.url, total=100)
    await producer.post_rows(10)
    await page.goto(f"{serving.url}/scans/{producer.id}")
    await wait_for_rows(page, 10)
    await page.evaluate(
        """() => {
          globalThis.states = [];
          const badge = document.getElementById("scan-state");
          new MutationObserver(() => states.push(badge.textContent)).observe(badge, { childList: true });
        }"""
    )
    await page.click("#cancel")
    await wait_for_state(page, "cancelled")
    assert await page.evaluate("states") == ["cancelling…", "cancelled"]
    await expect(page.locator("#stat-text")).to_contain_text("Cancelled after")
    await expect(page.locator("#cancel")).to_be_hidden()


async def test_a_scan_without_matches_says_so_and_one_that_fails_says_why(page: Page, serving: Serving) -> None:
    await start(page, serving, "gap-up", where="close < 0.001")
    await wait_for_state(page, "completed")
    await expect(page.locator(".grid-empty")).to_contain_text("Nothing matched")
    await start(page, serving, "trial-raising")
    await wait_for_state(page, "failed")
    await expect(page.locator("#stat-text")).to_contain_text("The scanner trial-raising failed with RuntimeError")


async def test_the_token_of_a_producer_is_shown_to_who_submitted_once(page: Page, serving: Serving) -> None:
    await start(page, serving, "external", title="Nightly <b>report</b>")
    await expect(page.locator("#scan-title")).to_have_text("Nightly <b>report</b>")
    await expect(page.locator("#token-text")).to_contain_text("Authorization: Bearer ")
    await page.reload()
    await expect(page.locator("#scan-title")).to_have_text("Nightly <b>report</b>")
    await expect(page.locator("#token")).to_be_hidden()


async def test_what_was_left_out_is_said_with_the_reason(page: Page, tmp_path: Path) -> None:
    days = pl.date_range(date(2020, 1, 1), date(2020, 3, 1), eager=True)
    close = [10.0, None, *[10.0] * (len(days) - 2)]
    frame = pl.DataFrame({"symbol": ["A"] * len(days), "date": days, "volume": [1000.0] * len(days)})
    frame = frame.with_columns(pl.Series(name, close) for name in ("open", "high", "low", "close"))
    write_store(frame, tmp_path / "prices.parquet", source="made up")
    async with serve(tmp_path / "state", tmp_path / "prices.parquet") as serving:
        await start(page, serving, "gap-up")
        await wait_for_state(page, "completed")
        await page.click("#skipped-title")
        await expect(page.locator("#skipped")).to_contain_text("Left out: 1 symbol")
        await expect(page.locator("#skipped-list")).to_have_text("rows without a priceA (1)")
        await expect(page.locator("#scan-synthetic")).to_be_hidden()


async def test_only_who_submitted_a_scan_can_cancel_it_and_is_told_so(
    browser: Browser, tmp_path: Path, synthetic_prices: Path
) -> None:
    keys = (f"ann:{hash_key('ann-secret')}", f"bob:{hash_key('bob-secret')}")
    async with serve(tmp_path, synthetic_prices, api_keys=keys) as serving, profile(browser) as context:
        serving.http.headers["Authorization"] = "Bearer ann-secret"
        scan = await serving.submit("external")
        page = await context.new_page()
        await page.goto(f"{serving.url}/scans/{scan['id']}")
        # Without a key the page asks for one, and goes on where it was.
        await page.fill("#key-input", "bob-secret")
        await page.click("#key button")
        await wait_for_state(page, "running")
        await page.click("#cancel")
        await expect(page.locator("#trouble")).to_be_visible()
        await wait_for_state(page, "running")
        async with page.expect_download() as downloading:
            await page.click("#export-json")
        assert (await downloading.value).suggested_filename == f"external-{scan['id'][2:10]}.json"


async def test_the_table_sorts_filters_pauses_and_keeps_its_place(page: Page, serving: Serving) -> None:
    producer = await Producer.start(serving.url)
    for value in (3, 1, 2):
        await producer.post_rows(200, value=value, flag=True)
    await page.goto(f"{serving.url}/scans/{producer.id}")
    await wait_for_rows(page, 600)
    await page.click("#grid [role=columnheader] >> text=value")
    first = page.locator("#grid [role=row][aria-rowindex='2'] [role=gridcell]")
    await expect(first.first).to_have_text("row-0")
    await expect(page.locator("#grid [aria-sort=descending]")).to_have_text("value")

    # Rows that go above the one that is looked at do not move it.
    before = await page.evaluate(SCROLL_AND_LOOK, 28 * 300)
    assert before.startswith("row-")
    await producer.post_rows(150, value=9)
    await wait_for_rows(page, 750)
    assert await page.evaluate(SCROLL_AND_LOOK, None) == before

    await page.click("#pause")
    await producer.post_rows(50, value=9)
    await expect(page.locator("#shown")).to_have_text("750 rows, 50 new wait")
    await page.click("#pause")
    await wait_for_rows(page, 800)
    await page.fill("#filter", "value>2 row-7")
    await expect(page.locator("#shown")).to_have_text("111 of 800 rows")  # 7, 70 to 79, 700 to 799
    await producer.end()
    await wait_for_state(page, "completed")


async def test_all_of_it_is_done_by_the_keyboard(page: Page, serving: Serving) -> None:
    await page.goto(f"{serving.url}/?scanner=gap-up")
    await expect(page.locator("#field-where")).to_be_visible()
    await page.focus("#field-where")
    await page.keyboard.type("close > 1.5")
    await page.keyboard.press("Enter")
    await wait_for_state(page, "completed")
    await expect(page.locator("#scan-title")).to_be_focused()
    for _ in range(30):
        if await page.evaluate("document.activeElement.id") == "grid":
            break
        await page.keyboard.press("Tab")
    for key in ("ArrowDown", "ArrowDown", "End", "Home", "ArrowDown", "Enter"):
        await page.keyboard.press(key)
    active = page.locator("#grid [aria-selected=true]")
    await expect(active).to_have_attribute("aria-rowindex", "3")
    assert await page.get_attribute("#grid", "aria-activedescendant") == await active.get_attribute("id")
    plot = page.locator("#chart [role=slider]")
    await plot.focus()
    now = int(await plot.get_attribute("aria-valuenow") or 0)
    await page.keyboard.press("ArrowLeft")
    await expect(plot).to_have_attribute("aria-valuenow", str(now - 1))
    await page.keyboard.press("Escape")
    await expect(plot).to_be_hidden()
    await expect(page.locator("#grid")).to_be_focused()


async def test_the_list_shows_what_runs_as_it_runs(page: Page, serving: Serving) -> None:
    await page.goto(f"{serving.url}/")
    producer = await Producer.start(serving.url, total=400)
    await page.reload()
    line = page.locator("#list tr", has=page.locator(f"a[href='/scans/{producer.id}']"))
    await expect(line.locator(".badge")).to_contain_text("running")
    await producer.post_rows(100)
    await expect(line.locator(".badge")).to_have_text("running, 25 %")
    await expect(line.locator("td").nth(2)).to_have_text("100")
    await producer.end()
    await expect(line.locator(".badge")).to_have_text("completed")
