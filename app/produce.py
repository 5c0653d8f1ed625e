"""What does the work of an external scan: it tells the server what it did, each event once over any connection.

async with Client(url) as client, client.produce("Nightly report", total=3, unit="pages") as scan:
    await scan.progress(1)
    await scan.matches([{"page": "a", "errors": 2}])
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx
import orjson

from app.follow import (
    BACKOFF_BASE_S,
    BACKOFF_MAX_S,
    LATER_STATUS,
    POLL,
    ClientError,
    Habits,
    RequestRefused,
    describe_break,
    read_refusal,
)

ALIVE_EVERY_S = 15.0  # a sign of life, when there is nothing else to say; servers wait for 60 s
PART_BYTES = 512 * 1024  # of rows in one request; servers take twice as much
PART_ROWS = 4000
MAX_ERROR_CHARS = 500
LAST_WORDS_S = 10.0  # to say that the work was broken off

Event = Mapping[str, Any]


class Accepted(NamedTuple):
    """An external scan that the server has accepted."""

    id: str
    path: str
    token: str


class _Request(NamedTuple):
    number: int
    body: bytes
    state: str | None  # that it puts an end to the scan with


class Production:
    """The work on one external scan. Entering the block submits it, and leaving the block ends it.

    Left normally it is completed, by an exception it failed (with the exception's message), by a cancellation it is
    cancelled. Each method returns once the server has it all in its journal, and raises RequestRefused (the scan may
    have been ended meanwhile: see `problem["state"]`) and Unreachable. One task at a time is served, the others wait.
    """

    def __init__(self, http: httpx.AsyncClient, habits: Habits, submit: Callable[[], Awaitable[Accepted]]) -> None:
        self._http = http
        self._habits = habits
        self._submit = submit
        self._accepted: Accepted | None = None
        self._lock = asyncio.Lock()
        self._number = 0  # of the last request that was begun
        # A request of which nobody knows whether it arrived. It is sent again ahead of the next one.
        self._unsure: _Request | None = None
        self._alive: asyncio.Task[None] | None = None
        self.state: str | None = None  # how it ended, once it has

    @property
    def id(self) -> str:
        return self._place.id

    @property
    def url(self) -> str:
        """The address of the scan, for whoever wants to watch."""
        return str(self._http.base_url.join(self._place.path.removesuffix("/events")))

    @property
    def _place(self) -> Accepted:
        if self._accepted is None:
            raise ClientError("The scan is not submitted yet: use `async with client.produce(…) as scan`.")
        return self._accepted

    async def __aenter__(self) -> Self:
        self._accepted = await self._submit()
        self._alive = asyncio.create_task(self._stay_alive())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._alive is not None:
            self._alive.cancel()
            await asyncio.gather(self._alive, return_exceptions=True)
        if self.state is not None:
            return
        if error is None:
            await self.end()
            return
        # What went wrong is raised anyhow, and matters more than that it could not be told.
        with contextlib.suppress(ClientError, TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                if isinstance(error, Exception):
                    await self.end("failed", f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS])
                else:
                    await self.end("cancelled")

    async def progress(self, done: int, *, total: int | None = None, phase: str | None = None) -> None:
        """So many units are done, never fewer than before."""
        said = {"type": "progress", "done": done, "total": total, "phase": phase}
        await self.post([{name: value for name, value in said.items() if value is not None}])

    async def matches(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows of plain values. Many are sent in several requests."""
        for part in split_rows(rows):
            await self.post([{"type": "matches", "rows": part}])

    async def end(self, state: str = "completed", error: str | None = None) -> None:
        """Ends the scan ahead of the block: `completed`, `failed` with the reason, or `cancelled`."""
        await self.post([{"type": "end", "state": state} | ({} if error is None else {"error": error})])

    async def post(self, events: Sequence[Event]) -> None:
        """Appends these events together, or none of them."""
        try:
            body = orjson.dumps(events)
        except orjson.JSONEncodeError as error:
            raise TypeError(f"What is posted must be JSON: {error}") from None
        state = next((event.get("state") for event in events if event.get("type") == "end"), None)
        async with self._lock:
            if self._unsure is not None:
                try:
                    await self._deliver(self._unsure)
                except RequestRefused:  # so it never happened, and whoever posted it has left
                    if self._unsure is not None:
                        raise
            self._unsure = _Request(self._number + 1, body, state)
            await self._deliver(self._unsure)

    async def _deliver(self, request: _Request) -> None:
        """Sends it until it is answered. What is refused has not happened, and leaves its number to the next."""
        try:
            await self._send(request.body, {"Producer-Seq": str(request.number)})
        except RequestRefused as refusal:
            if refusal.status not in LATER_STATUS:
                self._unsure = None
                self.state = refusal.problem.get("state", self.state)
            raise
        self._number, self._unsure = request.number, None
        self.state = request.state or self.state

    async def _send(self, body: bytes, headers: Mapping[str, str]) -> None:
        habits, place = self._habits, self._place
        headers = {**headers, "Authorization": f"Bearer {place.token}", "Content-Type": POLL}
        since, failures = habits.clock(), 0
        while True:
            cause: ClientError
            try:
                answer = await self._http.post(place.path, content=body, headers=headers)
                if answer.is_success:
                    return
                cause = refusal = read_refusal(answer)
                if refusal.status not in LATER_STATUS:
                    raise refusal
                floor_s = refusal.retry_after_s or 0.0
            except httpx.RequestError as error:
                cause, floor_s = describe_break(self._http, error), 0.0
            wait_s = floor_s + habits.random() * min(BACKOFF_MAX_S, BACKOFF_BASE_S * 2 ** min(failures, 16))
            if habits.clock() - since + wait_s > habits.patience_s:
                raise cause
            failures += 1
            await habits.sleep(wait_s)

    async def _stay_alive(self) -> None:
        """Says from time to time that the work goes on; what is wrong shows with the next event."""
        while self.state is None:
            await self._habits.sleep(ALIVE_EVERY_S)
            with contextlib.suppress(ClientError):
                await self._send(b"[]", {})


def split_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """The rows in parts of which each fits into one request."""
    part: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        bytes_ = len(orjson.dumps(row))
        if part and (len(part) >= PART_ROWS or size + bytes_ > PART_BYTES):
            yield part
            part, size = [], 0
        part.append(row)
        size += bytes_
    if part:
        yield part
