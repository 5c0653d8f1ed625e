"""The Python client: submit a scan, be told what it finds, and never lose an event to a broken connection.

    async with Client("http://127.0.0.1:8000") as client:
        scan = await client.submit("gap-up", {"start": "2012-01-01"})
        async for event in scan:
            print(event.type, event.data)
        rows = await scan.matches()

Its errors are a tree, drawn in `app.follow`.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from random import random
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import quote

import httpx
import orjson

from app import eventstream
from app.core.event import EventType
from app.core.scan import digest_rows
from app.eventstream import MAX_FRAME_BYTES, ScanEvent
from app.follow import (
    BACKOFF_BASE_S,
    CONNECT_S,
    NDJSON,
    POLL,
    SSE,
    BrokenStream,
    ClientError,
    Follower,
    Habits,
    RequestRefused,
    ResultLost,
    Unreachable,
    describe_break,
    read_refusal,
)
from app.produce import Accepted, Production

__all__ = [
    "BrokenStream",
    "Client",
    "ClientError",
    "Production",
    "RemoteScan",
    "RequestRefused",
    "Result",
    "ResultLost",
    "ScanEvent",
    "Unreachable",
]

EXTERNAL = "external"
REQUEST_S = 30.0
REQUEST_TRIES = 3  # of one request, while connections break
LIST_PAGE = 200


class Result(NamedTuple):
    """How a scan ended, and every row it found: their digest is the one in `end`."""

    end: dict[str, Any]
    rows: list[dict[str, Any]]


class Client:
    """A Scanwire server, as its clients see it; use it in `async with`.

    `heartbeat_s` is the server's: a stream that is silent for three of them is taken for broken. `patience_s` bounds
    how long a stream goes on reconnecting without anything new. `formats` are tried in their order: the next one
    when a stream gives no first byte within `first_byte_s` of its head, or cannot be had. `clock` and `sleep` are in
    seconds, `random` gives numbers in [0, 1).

    Every method raises RequestRefused and Unreachable.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        heartbeat_s: float = 15.0,
        patience_s: float = 300.0,
        head_s: float = 10.0,
        first_byte_s: float = 2.0,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        formats: Sequence[str] = (SSE, NDJSON, POLL),
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = random,
    ) -> None:
        headers = {"User-Agent": "scanwire-client", "Accept": POLL}
        if api_key is not None:
            if not (api_key.isascii() and api_key.isprintable()):
                raise ClientError("The API key has characters that no key has; is it the one from `scanwire key NAME`?")
            headers["Authorization"] = f"Bearer {api_key}"
        try:
            self._http = httpx.AsyncClient(
                base_url=url, headers=headers, transport=transport, timeout=httpx.Timeout(REQUEST_S, connect=CONNECT_S)
            )
        except httpx.InvalidURL as error:
            raise Unreachable(f"{url!r} is not an address such as http://127.0.0.1:8000: {error}.") from None
        self._habits = Habits(
            heartbeat_s=heartbeat_s,
            patience_s=patience_s,
            head_s=head_s,
            first_byte_s=first_byte_s,
            max_frame_bytes=max_frame_bytes,
            formats=tuple(formats),
            clock=clock,
            sleep=sleep,
            random=random,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def submit(
        self,
        scanner: str,
        params: Mapping[str, Any] | None = None,
        /,
        *,
        reuse: Literal["auto", "never"] = "auto",
        cancel_when_unwatched_s: float | None = None,
        idempotency_key: str | None = None,
        **more_params: Any,
    ) -> "RemoteScan":
        """A scan that the server has accepted; over breaking connections it is submitted once all the same.

        Parameters are given as a mapping, by name, or both. `reuse="never"` forces a run of its own.
        """
        body: dict[str, Any] = {"scanner": scanner, "params": {**(params or {}), **more_params}, "reuse": reuse}
        if cancel_when_unwatched_s is not None:
            body["cancel_when_unwatched_s"] = cancel_when_unwatched_s
        headers = {"Idempotency-Key": idempotency_key or secrets.token_urlsafe(16), "Content-Type": POLL}
        snapshot = await self.request("POST", "/v1/scans", headers=headers, content=orjson.dumps(body))
        return RemoteScan(self, snapshot["id"], snapshot)

    def produce(
        self,
        title: str,
        *,
        total: int | None = None,
        unit: str | None = None,
        cancel_when_unwatched_s: float | None = None,
    ) -> Production:
        """A scan whose work is done here: use it in `async with`, and say in the block what was done.

        `total` counts units of work, if that is known; `unit` names them.
        """
        given = {"title": title, "total": total, "unit": unit}
        params = {name: value for name, value in given.items() if value is not None}

        async def submit() -> Accepted:
            for _ in range(REQUEST_TRIES):
                scan = await self.submit(EXTERNAL, params, cancel_when_unwatched_s=cancel_when_unwatched_s)
                answer = scan.submitted or {}
                if "producer_token" in answer:
                    return Accepted(scan.id, answer["links"]["events"], answer["producer_token"])
                # The connection broke over the answer with the token, and it is not told twice.
                await scan.cancel()
            raise Unreachable("The connection broke over every answer to the submission.")

        return Production(self._http, self._habits, submit)

    def scan(self, scan_id: str) -> "RemoteScan":
        """A scan that exists already; nothing is asked of the server yet."""
        return RemoteScan(self, scan_id, None)

    async def watch(self, scan_ids: Iterable[str], *, after: str | None = None) -> AsyncGenerator[ScanEvent, None]:
        """The events of these scans over one connection, until each has ended: each durable one once, in order.

        Without a cursor in `after` they come from the first on. A `reset` event says that what came before of its
        scan counts for nothing: everything that is kept of it follows again. Raises BrokenStream.
        """
        follower = Follower(self._http, eventstream.Sequence(scan_ids, after), self._habits)
        async with contextlib.aclosing(follower.events()) as events:
            async for event in events:
                yield event

    async def scanners(self) -> list[dict[str, Any]]:
        """Each scanner with the JSON Schema of its parameters."""
        scanners: list[dict[str, Any]] = (await self.request("GET", "/v1/scanners"))["scanners"]
        return scanners

    async def list(self, limit: int = 50) -> "list[dict[str, Any]]":
        """Snapshots of this client's own scans, newest first, `limit` of them at the most."""
        snapshots: list[dict[str, Any]] = []
        page_path: str | None = f"/v1/scans?limit={min(limit, LIST_PAGE)}"
        while page_path is not None and len(snapshots) < limit:
            page = await self.request("GET", page_path)
            snapshots += page["scans"]
            page_path = page["next"]
        return snapshots[:limit]

    async def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, content: bytes | None = None
    ) -> Any:
        """The JSON of one answer. A request whose connection broke is sent again, REQUEST_TRIES times in all."""
        for attempt in range(REQUEST_TRIES):
            try:
                answer = await self._http.request(method, path, headers=headers, content=content)
                break
            except httpx.RequestError as error:
                if attempt == REQUEST_TRIES - 1 or isinstance(error, httpx.UnsupportedProtocol):
                    raise describe_break(self._http, error) from error
                await self._habits.sleep(self._habits.random() * BACKOFF_BASE_S * 2**attempt)
        if not answer.is_success:
            raise read_refusal(answer)
        try:
            return orjson.loads(answer.content)
        except orjson.JSONDecodeError:
            raise Unreachable(f"What answers at {self._http.base_url} is not a Scanwire server.") from None


class RemoteScan:
    """One scan on a server. Iterating gives its events from the first to the end, however often it is done."""

    def __init__(self, client: Client, scan_id: str, submitted: dict[str, Any] | None) -> None:
        self.id = scan_id
        # The answer to the submission; None for a scan that was looked up.
        self.submitted = submitted
        self._client = client
        self._path = f"/v1/scans/{quote(scan_id, safe='')}"
        self._received: Result | None = None  # by a complete iteration, not yet compared with its digest

    def __aiter__(self) -> AsyncIterator[ScanEvent]:
        return self.events()

    async def events(self, after: str | None = None) -> AsyncGenerator[ScanEvent, None]:
        """As `Client.watch`, for this scan."""
        rows: list[dict[str, Any]] = []
        async with contextlib.aclosing(self._client.watch([self.id], after=after)) as events:
            async for event in events:
                if event.type == EventType.RESET:
                    rows, after = [], None
                elif event.type == EventType.MATCHES:
                    rows += event.data["rows"]
                elif event.type == EventType.END and after is None:
                    self._received = Result(event.data, rows)
                yield event

    async def snapshot(self) -> dict[str, Any]:
        """Its state now, in one request."""
        snapshot: dict[str, Any] = await self._client.request("GET", self._path)
        return snapshot

    async def cancel(self) -> dict[str, Any]:
        """The snapshot after cancelling; of a finished scan the final one."""
        snapshot: dict[str, Any] = await self._client.request("DELETE", self._path)
        return snapshot

    async def matches(self) -> list[dict[str, Any]]:
        """The rows that there are just now: all of them once the scan has ended."""
        rows: list[dict[str, Any]] = (await self._client.request("GET", f"{self._path}/matches"))["rows"]
        return rows

    async def result(self) -> Result:
        """Waits for the end; the rows are the ones that the scan found, proved by `end.digest`.

        Nothing is read again when this object was iterated to its end before. Raises ResultLost.
        """
        if self._received is None:
            async with contextlib.aclosing(self.events()) as events:
                async for _ in events:
                    pass
        if self._received is None:
            raise ResultLost(f"The server does not keep scan {self.id} any more.")
        result, self._received = self._received, None  # what does not match is read anew the next time
        if digest_rows(result.rows) != result.end["digest"]:
            if result.end["matches"] and not result.rows:
                raise ResultLost(f"The rows of scan {self.id} are past their retention. Submit it again.")
            raise ResultLost(f"The rows received of scan {self.id} are not the ones that it found.")
        self._received = result
        return result
