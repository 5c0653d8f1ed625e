"""What operations are told, posted to an address outside: signed, tried again, and never more than some that wait."""

import asyncio
import hashlib
import hmac
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import httpx
import orjson

from app.core.settings import Settings

logger = logging.getLogger(__name__)

SIGNATURE = "Scanwire-Signature"
TRIED_AGAIN = frozenset((408, 425, 429))  # and every 5xx; another refusal would be the same the next time


def sign(secret: str, at: int, body: bytes) -> str:
    """`t=SECONDS,v1=HEX`: HMAC-SHA-256 over `SECONDS.BODY`. Whoever checks it refuses what is old."""
    mac = hmac.new(secret.encode(), b"%d." % at + body, hashlib.sha256)
    return f"t={at},v1={mac.hexdigest()}"


class Webhook:
    """Posts in order, one at a time. Past `max_webhook_waiting` the oldest is given up, and logged."""

    def __init__(self, settings: Settings, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._settings = settings
        self._sleep = sleep
        self._waiting: deque[bytes] = deque()
        self._news = asyncio.Event()
        self.given_up = 0

    def submit(self, told: Mapping[str, Any]) -> None:
        """Never waits."""
        if self._settings.webhook_url is None:
            return
        self._waiting.append(orjson.dumps(told))
        if len(self._waiting) > self._settings.max_webhook_waiting:
            self._waiting.popleft()
            self._give_up("too many wait")
        self._news.set()

    async def run(self) -> None:
        """Posts for ever."""
        if self._settings.webhook_url is None:
            return
        async with httpx.AsyncClient(timeout=self._settings.webhook_wait_s) as http:
            while True:
                self._news.clear()
                while self._waiting:
                    await self._post(http, self._settings.webhook_url, self._waiting.popleft())
                await self._news.wait()

    async def _post(self, http: httpx.AsyncClient, url: str, body: bytes) -> None:
        settings = self._settings
        reason = ""
        for tried in range(settings.webhook_tries):
            if tried:
                await self._sleep(settings.webhook_backoff_s * 2 ** (tried - 1) * (1 + random.random() / 4))
            headers = {"Content-Type": "application/json", "User-Agent": "scanwire"}
            if settings.webhook_secret is not None:
                headers[SIGNATURE] = sign(settings.webhook_secret.get_secret_value(), int(time.time()), body)
            try:
                answer = await http.post(url, content=body, headers=headers)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                reason = type(error).__name__
                continue
            if answer.is_success:
                return
            reason = str(answer.status_code)
            if answer.status_code < 500 and answer.status_code not in TRIED_AGAIN:
                break
        self._give_up(reason)

    def _give_up(self, reason: str) -> None:
        self.given_up += 1
        logger.error("a webhook is given up: %s", reason, extra={"action": "webhook_given_up"})
