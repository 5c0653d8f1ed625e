"""Reads the events of scans to their end, over as many connections as it takes, in the first format that gets through.

What can go wrong, here and in `app.client`:

    ClientError
    ├── RequestRefused    the server said no, and why: `problem`, `status`, `retry_after_s`
    ├── Unreachable       no connection, or none that brought anything new, for `patience_s`
    ├── BrokenStream      the server goes on leaving out events, or sends what are none
    └── ResultLost        the rows of a scan are not kept any more, or are not the ones that it found
"""

import asyncio
import contextlib
import email.utils
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from random import random
from typing import Any
from urllib.parse import quote

import httpx
import orjson

from app.core.event import EventType
from app.eventstream import MAX_FRAME_BYTES, Decoder, Gap, Garbled, NdjsonDecoder, ScanEvent, Sequence, SseDecoder

SSE, NDJSON, POLL = "text/event-stream", "application/x-ndjson", "application/json"

BACKOFF_BASE_S, BACKOFF_MAX_S = 0.5, 30.0
CONNECT_S = 5.0
SILENT_HEARTBEATS = 3  # a stream that was silent for so many is broken
LONG_POLL_S = 25
HELD_POLL_S = 1.0  # the longest wait after a poll that the server held open: nothing else happened meanwhile
SAME_GAP_MAX = 3  # reading again has not closed it
_FORMAT_STATUS = frozenset((406, 415))
LATER_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))


class ClientError(Exception):
    """What happened, in one sentence that may be shown to people."""


class RequestRefused(ClientError):
    """The server's answer was a refusal. `problem` is its problem object (RFC 9457)."""

    def __init__(self, problem: Mapping[str, Any], status: int, retry_after_s: float | None = None) -> None:
        super().__init__(str(problem.get("detail") or problem.get("title") or f"The server answered {status}."))
        self.problem = problem
        self.status = status
        self.retry_after_s = retry_after_s


class Unreachable(ClientError):
    pass


class BrokenStream(ClientError):
    pass


class ResultLost(ClientError):
    pass


class _NextFormat(Exception):
    """Something on the way holds the stream back, or it cannot be had in this format."""


class _CaughtUp(Exception):
    """The server has no more of these scans, now and later."""


class _ComeBack(Exception):
    """This connection is over; reading goes on in another one, `floor_s` seconds from now at the earliest.

    Without it, what the server once asked for holds.
    """

    def __init__(self, cause: ClientError, floor_s: float | None = None) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.floor_s = floor_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How a follower waits, and what it puts up with."""

    heartbeat_s: float = 15.0  # the server's; three of them without a byte, and the connection is broken
    patience_s: float = 300.0  # how long to go on reconnecting without anything new
    head_s: float = 10.0  # until the head of a stream
    first_byte_s: float = 2.0  # from there until the first byte; the server sends one at once
    max_frame_bytes: int = MAX_FRAME_BYTES
    formats: tuple[str, ...] = (SSE, NDJSON, POLL)  # in the order in which they are tried
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: Callable[[], float] = random


def read_refusal(answer: httpx.Response) -> RequestRefused:
    """The refusal in an answer that was read; one is made up when something else than Scanwire refused."""
    try:
        problem = orjson.loads(answer.content)
    except orjson.JSONDecodeError:
        problem = None
    if not isinstance(problem, dict):
        detail = f"The server answered {answer.status_code} {answer.reason_phrase}."
        problem = {"type": "about:blank", "title": answer.reason_phrase, "status": answer.status_code, "detail": detail}
    exact = problem.get("retry_after_s")
    if not isinstance(exact, int | float):
        exact = _read_retry_after(answer.headers.get("retry-after"))
    return RequestRefused(problem, answer.status_code, exact)


def _read_retry_after(text: str | None) -> float | None:
    """Seconds; RFC 9110 allows a date as well."""
    if text is None:
        return None
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def describe_break(http: httpx.AsyncClient, error: Exception) -> Unreachable:
    url = str(http.base_url).rstrip("/")
    if isinstance(error, httpx.UnsupportedProtocol):
        return Unreachable(f"{url!r} is not the address of a server, such as http://127.0.0.1:8000.")
    return Unreachable(f"No Scanwire server can be reached at {url}: {str(error) or type(error).__name__}.")


class Follower:
    """The events of a `Sequence`, each durable one once and in order, until all its scans are closed."""

    def __init__(self, http: httpx.AsyncClient, sequence: Sequence, habits: Habits) -> None:
        self._http = http
        self._sequence = sequence
        self._habits = habits
        self._formats = list(habits.formats)
        self._works = False  # the first format has brought a byte: from now on silence is a broken connection
        self._retry_s = 0.0  # the wait before a reconnect that the server asked for
        self._failures = 0  # in a row, without anything new
        self._failing_since = 0.0
        self._gap: tuple[str, int, int] | None = None
        self._gap_seen = 0  # times in a row

    async def events(self) -> AsyncGenerator[ScanEvent, None]:
        """Raises RequestRefused, Unreachable, BrokenStream. `bye` and `throttled` are obeyed, not shown."""
        while self._sequence.open:
            opened = self._habits.clock()
            try:
                async with contextlib.aclosing(self._connect()) as received:
                    async for event in received:
                        self._obey(event)
                        if self._sequence.admit(event):
                            self._failures = self._gap_seen = 0
                            yield event
                            if not self._sequence.open:
                                return
                raise _ComeBack(Unreachable("The connection ended before the scan did."))
            except _CaughtUp:
                return
            except _NextFormat as error:
                if len(self._formats) > 1:
                    del self._formats[0]
                    self._works = False
                else:
                    await self._back_off(_ComeBack(BrokenStream(str(error))), opened)
            except _ComeBack as parting:
                await self._back_off(parting, opened)
            except Gap as gap:
                await self._back_off(_ComeBack(self._count_gap(gap)), opened)
            except Garbled as error:
                await self._back_off(_ComeBack(BrokenStream(str(error))), opened)
            except httpx.RequestError as error:
                await self._back_off(_ComeBack(describe_break(self._http, error)), opened)

    def _connect(self) -> AsyncGenerator[ScanEvent, None]:
        return self._poll() if self._formats[0] == POLL else self._stream(self._formats[0])

    def _obey(self, event: ScanEvent) -> None:
        """Raises _ComeBack when the server sends the client away for a while."""
        if event.type == EventType.BYE:
            wait_ms = event.data.get("reconnect_ms", 0)
            raise _ComeBack(Unreachable("The server is stopping."), wait_ms / 1000)
        if event.type == EventType.THROTTLED:
            problem = event.data.get("problem") or {"title": "Too many requests", "status": 429}
            wait_s = event.data.get("retry_after_s")
            raise _ComeBack(RequestRefused(problem, problem.get("status", 429), wait_s), wait_s)

    def _count_gap(self, gap: Gap) -> BrokenStream:
        self._gap_seen = self._gap_seen + 1 if gap.place == self._gap else 1
        self._gap = gap.place
        error = BrokenStream(f"The server leaves out events: {gap}")
        if self._gap_seen >= SAME_GAP_MAX:
            raise error
        return error

    async def _back_off(self, parting: _ComeBack, opened: float) -> None:
        """Waits: what the server asked for, and full jitter on top, so that not all clients come back at once.

        Raises the cause when that would be past all patience.
        """
        habits = self._habits
        now = habits.clock()
        if self._failures == 0 or now - opened > habits.heartbeat_s:  # one that held for a while was none
            self._failures, self._failing_since = 0, now
        ceiling = min(BACKOFF_MAX_S, BACKOFF_BASE_S * 2 ** min(self._failures, 16))
        self._failures += 1
        floor_s = self._retry_s if parting.floor_s is None else parting.floor_s
        wait_s = floor_s + habits.random() * ceiling
        if now + wait_s - self._failing_since > habits.patience_s:
            raise parting.cause
        await habits.sleep(wait_s)

    def _build_request(self, format_: str, headers: Mapping[str, str], read_s: float) -> httpx.Request:
        scans = self._sequence.open
        path = f"/v1/scans/{quote(scans[0], safe='')}/events" if len(scans) == 1 else "/v1/events"
        params: list[tuple[str, str | int | float | bool | None]] = []
        if len(scans) > 1:
            params += [("scan", scan) for scan in scans]
        if self._sequence.cursor is not None:
            params.append(("after", self._sequence.cursor))
        return self._http.build_request(
            "GET",
            path,
            params=params,
            headers={"Accept": format_, "Cache-Control": "no-store", **headers},
            timeout=httpx.Timeout(read_s, connect=CONNECT_S),
        )

    async def _stream(self, format_: str) -> AsyncGenerator[ScanEvent, None]:
        """The events of one connection. Raises _NextFormat, _CaughtUp, _ComeBack, Garbled, httpx.RequestError."""
        habits = self._habits
        silence_s = habits.heartbeat_s * SILENT_HEARTBEATS
        request = self._build_request(format_, {"Accept-Encoding": "identity"}, silence_s)
        try:
            async with asyncio.timeout(habits.head_s):
                answer = await self._http.send(request, stream=True)
        except TimeoutError:
            raise self._blame_silence(f"no answer for {habits.head_s:g} s") from None
        try:
            await _check_answer(answer, format_)
            decoder: Decoder = (SseDecoder if format_ == SSE else NdjsonDecoder)(habits.max_frame_bytes)
            chunks = answer.aiter_bytes()
            try:
                async with asyncio.timeout(None if self._works else habits.first_byte_s):
                    chunk = await anext(chunks, None)
            except TimeoutError:
                raise self._blame_silence(f"no byte for {habits.first_byte_s:g} s") from None
            while chunk is not None:
                self._works = True
                for event in decoder.feed(chunk):
                    yield event
                if decoder.retry_s is not None:
                    self._retry_s = decoder.retry_s
                chunk = await anext(chunks, None)
        finally:
            await answer.aclose()

    def _blame_silence(self, silence: str) -> Exception:
        if self._works:
            return _ComeBack(Unreachable(f"The connection broke: {silence}."))
        return _NextFormat(f"Something on the way holds the stream back: {silence}.")

    async def _poll(self) -> AsyncGenerator[ScanEvent, None]:
        """Pages of events, asked for when the server said that it is worth it. Raises as `_stream`."""
        habits = self._habits
        while True:
            read_s = LONG_POLL_S + habits.heartbeat_s * SILENT_HEARTBEATS
            answer = await self._http.send(self._build_request(POLL, {"Prefer": f"wait={LONG_POLL_S}"}, read_s))
            await _check_answer(answer, POLL)
            try:
                page = orjson.loads(answer.content)
                events = [ScanEvent.parse(orjson.dumps(event)) for event in page["events"]]
                is_closed, poll_after_s = page["closed"], float(page["poll_after_s"] or 0)
            except (ValueError, KeyError, TypeError):
                raise Garbled("This is not a page of events.") from None
            for event in events:
                yield event
            if is_closed:
                raise _CaughtUp
            was_held = "preference-applied" in answer.headers
            await habits.sleep(min(poll_after_s, HELD_POLL_S) if was_held else poll_after_s)


async def _check_answer(answer: httpx.Response, format_: str) -> None:
    """Returns for an answer that holds events. Raises what is to be done otherwise."""
    if answer.status_code == 204:
        raise _CaughtUp
    if answer.status_code == 200:
        media_type = answer.headers.get("content-type", "nothing")
        if media_type.partition(";")[0].strip().lower() != format_:
            raise _NextFormat(f"The server answered with {media_type} instead of {format_}.")
        return
    await answer.aread()
    if answer.status_code in _FORMAT_STATUS:
        raise _NextFormat(str(read_refusal(answer)))
    refusal = read_refusal(answer)
    if answer.status_code in LATER_STATUS:
        raise _ComeBack(refusal, refusal.retry_after_s)
    raise refusal
