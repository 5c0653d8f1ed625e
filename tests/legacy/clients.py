"""Clients of old, small and faithful: what they send, when they ask, what they take for an answer, when they give up.

Their paces are theirs (2 s, 1 s, 5 to 30 s); the time that they wait by is handed in, so that half an hour is over in
seconds, while the server's limits go by the same clock.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from datetime import date, timedelta
from typing import Any, NamedTuple

import httpx
import websockets

Rows = list[dict[str, Any]]


class Clock:
    """Seconds that pass when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


class GaveUpError(Exception):
    """What the client shows in place of results."""


async def see_nothing(status: dict[str, Any]) -> None:
    pass


class ServiceClient:
    """Executes, asks for the status every 2 s for half an hour, then fetches the results. Any failed poll is fatal."""

    WAIT_S, PAUSE_S = 1800.0, 2.0

    def __init__(
        self, http: httpx.AsyncClient, clock: Clock, see: Callable[[dict[str, Any]], Awaitable[None]] = see_nothing
    ) -> None:
        self.http, self.clock, self.see = http, clock, see
        self.polls = 0

    async def execute(self, **request: Any) -> dict[str, Any]:
        answer = await self.http.post("/api/scan/execute", json=request)
        if not answer.is_success:
            raise GaveUpError(answer.text)
        executed: dict[str, Any] = answer.json()
        return executed

    async def get_status(self, scan_id: str) -> dict[str, Any]:
        answer = await self.http.get(f"/api/scan/status/{scan_id}")
        if not answer.is_success:
            raise GaveUpError(answer.text)
        status: dict[str, Any] = answer.json()
        return status

    async def run(self, **request: Any) -> Rows:
        executed = await self.execute(**request)
        if not executed["success"]:
            raise GaveUpError(executed["message"])
        started = self.clock.now
        while self.clock.now - started < self.WAIT_S:
            status = await self.get_status(executed["scan_id"])
            self.polls += 1
            await self.see(status)
            if status["status"] == "completed":
                return await self.fetch(executed["scan_id"])
            if status["status"] == "error":
                raise GaveUpError(status["error"])
            await self.clock.sleep(self.PAUSE_S)
        raise GaveUpError("no end in half an hour")

    async def fetch(self, scan_id: str) -> Rows:
        answer = await self.http.get(f"/api/scan/results/{scan_id}")
        if answer.status_code != 200:
            raise GaveUpError(answer.text)
        rows: Rows = answer.json()["results"]
        return rows


class Seen(NamedTuple):
    """What a page has at the end: the rows by its socket and by its polls, and all messages."""

    pushed: Rows
    polled: Rows
    messages: list[dict[str, Any]]


class PageClient(ServiceClient):
    """Opens the socket and polls every second at the same time. Closes the socket at `final`, and at the first message
    of any type whose status is `completed`: what that has no rows in, is lost."""

    PAUSE_S = 1.0

    def __init__(self, url: str, *others: Any) -> None:
        super().__init__(*others)
        self.url = url.replace("http", "ws", 1)

    async def watch(self, scan_id: str) -> list[dict[str, Any]]:
        messages = []
        async with asyncio.timeout(60), websockets.connect(f"{self.url}/api/scan/progress/{scan_id}") as socket:
            async for text in socket:
                messages.append(json.loads(text))
                if messages[-1]["type"] == "final" or messages[-1].get("status") == "completed":
                    break
        return messages

    async def poll(self, scan_id: str) -> Rows:
        while (status := await self.get_status(scan_id))["status"] != "completed":
            self.polls += 1
            await self.see(status)
            if status["status"] == "error":
                raise GaveUpError(status["error"])
            await self.clock.sleep(self.PAUSE_S)
        rows: Rows = status["results"]
        return rows

    async def show(self, **request: Any) -> Seen:
        scan_id = (await self.execute(**request))["scan_id"]
        messages, polled = await asyncio.gather(self.watch(scan_id), self.poll(scan_id))
        return Seen(messages[-1].get("results", []), polled, messages)


class ChunkingClient(ServiceClient):
    """Cuts ranges over 60 days into pieces and sends three at a time; the first answer to each is its last word."""

    AT_A_TIME, PAUSE_S = 3, 1.0

    async def run(self, **request: Any) -> Rows:
        start, end = (date.fromisoformat(request[name]) for name in ("start_date", "end_date"))
        pieces = list(self.cut(start, end))
        rows: Rows = []
        for place in range(0, len(pieces), self.AT_A_TIME):
            batch = pieces[place : place + self.AT_A_TIME]
            for answer in await asyncio.gather(*(self.ask(request, *piece) for piece in batch)):
                rows += answer["results"] if answer["success"] else []
            await self.clock.sleep(self.PAUSE_S)
        return rows

    async def ask(self, request: dict[str, Any], start: date, end: date) -> dict[str, Any]:
        return await self.execute(**request | {"start_date": start.isoformat(), "end_date": end.isoformat()})

    def cut(self, start: date, end: date) -> Iterator[tuple[date, date]]:
        days = (end - start).days
        size = next((size for most, size in ((30, days), (90, 30), (180, 45), (365, 60)) if days <= most), 90)
        while start < end:
            yield start, min(start + timedelta(days=size - 1), end)
            start += timedelta(days=size)


class BackoffPoller(ServiceClient):
    """The playbook's cure for aggressive polling: 5 s to 30 s, a fifth more each time, at most 100 attempts."""

    FIRST_S, MOST_S, GROWTH, ATTEMPTS = 5.0, 30.0, 1.2, 100

    async def run(self, **request: Any) -> Rows:
        scan_id = (await self.execute(**request))["scan_id"]
        pause_s = self.FIRST_S
        for _ in range(self.ATTEMPTS):
            await self.clock.sleep(pause_s)
            status = await self.get_status(scan_id)
            self.polls += 1
            await self.see(status)
            if status["status"] == "completed":
                return await self.fetch(scan_id)
            pause_s = min(pause_s * self.GROWTH, self.MOST_S)
        raise GaveUpError("100 attempts")


async def try_rate_limit(http: httpx.AsyncClient, body: Any) -> list[int]:
    """The playbook's test of a limit: three posts, one after the other."""
    return [(await http.post("/api/operation/execute", json=body)).status_code for _ in range(3)]


class Benchmark(NamedTuple):
    average_s: float
    max_s: float
    min_s: float
    error_rate: float


async def benchmark(http: httpx.AsyncClient, method: str, path: str, **request: Any) -> Benchmark:
    """The playbook's benchmark: ten requests, one after the other."""
    answers = [await http.request(method, path, **request) for _ in range(10)]
    times = [answer.elapsed.total_seconds() for answer in answers]
    errors = sum(not answer.is_success for answer in answers)
    return Benchmark(sum(times) / len(times), max(times), min(times), errors / len(answers))


async def listen(url: str, scan_id: str) -> list[dict[str, Any]]:
    """All messages of a socket, up to the server's close."""
    address = f"{url.replace('http', 'ws', 1)}/api/scan/progress/{scan_id}"
    async with asyncio.timeout(60), websockets.connect(address) as socket:
        return [json.loads(text) async for text in socket]
