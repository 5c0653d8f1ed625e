"""The script of the page: its types, how much of it there is, and that it never makes markup of what it is given."""

import re
from collections import Counter
from pathlib import Path

from playwright.async_api import expect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.browser.pages import Producer, fetch, launch, profile
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


class Wire:
    """Counts the bytes of scripts as they are sent, to pages and to workers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.sent: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_counted(message: Message) -> None:
            if scope.get("path", "").endswith(".js"):
                self.sent[scope["path"]] += len(message.get("body", b""))
            await send(message)

        await self.app(scope, receive, send_counted)


async def test_the_script_is_small_and_all_comes_from_here(tmp_path: Path, sample_prices: Path) -> None:
    wires: list[Wire] = []

    def wrap(app: ASGIApp) -> ASGIApp:
        wires.append(Wire(app))
        return wires[0]

    serving_counted = serve(tmp_path, sample_prices, wrap=wrap)
    async with launch() as browser, serving_counted as serving, profile(browser) as context:
        page = await context.new_page()
        await page.goto(f"{serving.url}/")
        await expect(page.locator("#field-where")).to_be_visible()
        producer = await Producer.start(serving.url)
        await page.goto(f"{serving.url}/scans/{producer.id}")
        await expect(page.locator("#connection[data-state=live]")).to_be_visible()
        loaded = await page.evaluate("performance.getEntriesByType('resource').map((one) => one.name)")
    assert all(name.startswith(serving.url) for name in loaded)
    sent = wires[0].sent
    assert {f"/static/{module.relative_to(STATIC)}" for module in MODULES} < set(sent)
    assert "/static/scanwire/worker.js" in sent
    assert 0 < sum(sent.values()) < MAX_SCRIPT_BYTES
