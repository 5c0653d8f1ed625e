"""The script of the page: its types, how much of it there is, and that it never makes markup of what it is given."""

import re
from pathlib import Path

from playwright.async_api import expect

from tests.browser.pages import fetch, launch, profile
from tests.serving import serve
from tests.test_javascript import STATIC, TSC_FLAGS, run

MODULES = sorted([STATIC / "page.js", *(STATIC / "page").glob("*.js")])
MAX_SCRIPT_BYTES = 100_000  # as it is sent, the client with it
MARKUP = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|\beval\b"
)


def test_the_types_of_the_page_hold_strictly() -> None:
    for module in MODULES:
        assert module.read_text().startswith("// @ts-check\n"), module.name
    run(fetch("typescript@7", ".bin/tsc"), *TSC_FLAGS, *MODULES, timeout_s=120)


def test_nothing_that_is_received_becomes_markup() -> None:
    for module in MODULES:
        assert not MARKUP.search(module.read_text()), module.name
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]* src=)|https?:", page)


async def test_the_script_is_small_and_all_comes_from_here(tmp_path: Path, sample_prices: Path) -> None:
    async with launch() as browser, serve(tmp_path, sample_prices, workers=1) as serving, profile(browser) as context:
        page = await context.new_page()
        await page.goto(f"{serving.url}/")
        await expect(page.locator("#field-where")).to_be_visible()
        loaded = await page.evaluate("performance.getEntriesByType('resource').map((e) => [e.name, e.encodedBodySize])")
    assert all(name.startswith(serving.url) for name, _ in loaded)
    sizes = {name.removeprefix(f"{serving.url}/static/"): size for name, size in loaded if name.endswith(".js")}
    assert {str(module.relative_to(STATIC)) for module in MODULES} < set(sizes)
    assert 0 < sum(sizes.values()) < MAX_SCRIPT_BYTES
