"""The webhook: signed, in order, tried again while that helps, bounded, and in nobody's way."""

import asyncio
import contextlib
import hashlib
import hmac
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from app.core.settings import Settings
from app.observe.webhook import Webhook
from tests.conftest import until
from tests.serving import run_uvicorn, serve

SECRET = "a secret"


class Receiver:
    """A real server that keeps what is posted to it, and answers what it is told to."""

    def __init__(self) -> None:
        self.answers: list[int] = []  # for the next posts; then 204
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.url = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        self.got.append(({name.decode(): value.decode() for name, value in scope["headers"]}, body))
        status = self.answers.pop(0) if self.answers else 204
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    @property
    def ids(self) -> list[str]:
        return [orjson.loads(body)["id"] for _, body in self.got]


@contextlib.asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver.url = f"http://127.0.0.1:{listener.getsockname()[1]}/hook"
        async with run_uvicorn(receiver, listener, lifespan="off", log_level="warning"):
            yield receiver


@contextlib.asynccontextmanager
async def posting(**settings: Any) -> AsyncIterator[tuple[Webhook, list[float]]]:
    """A webhook that posts, and the waits between its tries."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    webhook = Webhook(Settings(webhook_secret=SECRET, **settings), sleep)
    running = asyncio.create_task(webhook.run())
    try:
        yield webhook, waits
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_what_operations_are_told_is_posted_and_signed(tmp_path: Path, sample_prices: Path) -> None:
    async with (
        receiving() as receiver,
        serve(tmp_path, sample_prices, webhook_url=receiver.url, webhook_secret=SECRET) as serving,
    ):
        for is_on in (True, False):
            await serving.http.post("/v1/operations/emergency", json={"is_on": is_on})
        await until(lambda: len(receiver.got) == 2)
    assert receiver.ids == ["1", "2"]
    for headers, body in receiver.got:
        at, _, mac = headers["scanwire-signature"].removeprefix("t=").partition(",v1=")
        assert mac == hmac.new(SECRET.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
        assert orjson.loads(body)["type"] == "emergency"


async def test_a_post_that_fails_is_tried_again_later_and_later_and_then_the_next_one_comes() -> None:
    async with receiving() as receiver, posting(webhook_url=receiver.url) as (webhook, waits):
        receiver.answers = [500, 503, 429]
        webhook.submit({"id": "1"})
        webhook.submit({"id": "2"})
        await until(lambda: len(receiver.got) == 5)
        assert receiver.ids == ["1", "1", "1", "1", "2"]
        assert [1 <= waits[0] <= 1.25, 2 <= waits[1] <= 2.5, 4 <= waits[2] <= 5] == [True] * 3


async def test_a_post_that_is_refused_for_good_or_has_failed_often_enough_is_given_up() -> None:
    async with receiving() as receiver, posting(webhook_url=receiver.url, webhook_tries=2) as (webhook, waits):
        receiver.answers = [404, 500, 500]
        for number in ("1", "2", "3"):
            webhook.submit({"id": number})
        await until(lambda: len(receiver.got) == 4)
        assert receiver.ids == ["1", "2", "2", "3"]
        assert (webhook.given_up, len(waits)) == (2, 1)


async def test_no_more_wait_than_may_and_the_newest_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    async with receiving() as receiver:
        webhook = Webhook(Settings(webhook_url=receiver.url, max_webhook_waiting=3))
        for number in range(10):
            webhook.submit({"id": str(number)})
        assert webhook.given_up == 7
        assert "given up: too many wait" in caplog.text
        running = asyncio.create_task(webhook.run())
        await until(lambda: len(receiver.got) == 3)
        assert receiver.ids == ["7", "8", "9"]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_without_an_address_nothing_waits() -> None:
    webhook = Webhook(Settings())
    webhook.submit({"id": "1"})
    await webhook.run()
    assert not webhook._waiting
