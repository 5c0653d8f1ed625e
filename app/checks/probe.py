"""How `scanwire check` asks a server: as an honest client that waits as it is told, and cleans up after itself."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import httpx
import orjson
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

from app.core.event import EventType
from app.eventstream import Garbled, NdjsonDecoder, ScanEvent, SseDecoder
from app.follow import CONNECT_S, SSE, ClientError, RequestRefused, describe_break, read_refusal

WEBSOCKET = "WebSocket"
REQUEST_S = 30.0
FIRST_BYTE_S = 2.0  # from the head of a stream; servers send one at once, so who waits longer is held back
LONGEST_WAIT_S = 65.0  # that is waited when told so; a minute is the longest of any default limit
ENOUGH = 5  # refusals of one request that are waited for
TITLE = "scanwire check"


class Unmet(Exception):
    """What was asked for does not hold, with what was seen instead."""


class NotApplicable(Exception):
    """It cannot be checked on this server, and why."""


def fail(evidence: str) -> NoReturn:
    raise Unmet(evidence)


def read_limit(answer: httpx.Response) -> tuple[int, float, int] | None:
    """Quota, its window in seconds, and what is left of it, by the RateLimit fields of an answer."""
    fields: dict[str, float] = {}
    for header in ("ratelimit-policy", "ratelimit"):
        for part in answer.headers.get(header, "").split(";")[1:]:
            name, _, value = part.strip().partition("=")
            with contextlib.suppress(ValueError):
                fields[name] = float(value)
    if not {"q", "w", "r"} <= set(fields):
        return None
    return int(fields["q"]), fields["w"], int(fields["r"])


class Probe:
    """One server as its clients see it. `scans` are those that were started here, with the token of each producer."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        say: Callable[[str], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.headers = {"User-Agent": "scanwire-check"}
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"
        try:
            self.http = httpx.AsyncClient(
                base_url=url,
                headers=self.headers,
                timeout=httpx.Timeout(REQUEST_S, connect=CONNECT_S),
                limits=httpx.Limits(max_connections=100),
            )
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise ClientError(f"{url!r} is not an address such as http://127.0.0.1:8000: {error}.") from None
        self.say = say
        self.scans: dict[str, str | None] = {}
        self.clock = clock
        self._sleep = sleep

    async def wait(self, seconds: float, why: str) -> None:
        """Waits as the server said. Raises Unmet when that is more than any limit has a reason for."""
        if seconds > LONGEST_WAIT_S:
            fail(f"{why}: told to wait {seconds:,.0f} s, which is more than {LONGEST_WAIT_S:g} s")
        if seconds >= 1:
            self.say(f"waiting {seconds:,.1f} s as told: {why}")
        await self._sleep(seconds)

    # Requests

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The answer, after the waits that the server asked for. What it refuses for another reason is an answer."""
        for _ in range(ENOUGH):
            answer = await self.http.request(method, path, **options)
            refusal = read_refusal(answer) if answer.status_code in (429, 503) else None
            if refusal is None or refusal.retry_after_s is None:
                break
            await self.wait(refusal.retry_after_s, str(refusal.problem.get("title")).lower())
        return answer

    async def get_json(self, path: str, **options: Any) -> Any:
        """Raises Unmet for anything but 200 with JSON."""
        return self.read_json(await self.request("GET", path, **options), 200)

    def read_json(self, answer: httpx.Response, *statuses: int) -> Any:
        """Raises Unmet for any other status, and for what is not a JSON object."""
        where = f"{answer.request.method} {answer.request.url.path}"
        if answer.status_code not in statuses:
            fail(f"{where} was answered with {answer.status_code}: {str(read_refusal(answer))[:120]}")
        try:
            body = orjson.loads(answer.content)
        except orjson.JSONDecodeError:
            fail(f"{where} was answered with {answer.status_code}, and not with JSON")
        if not isinstance(body, dict):
            fail(f"{where} was answered with JSON that is no object")
        return body

    # Scans

    async def submit(self, body: dict[str, Any], *, waits: bool = True) -> httpx.Response:
        """The answer to a submission; the scan is cleaned up at the end."""
        if waits:
            answer = await self.request("POST", "/v1/scans", json=body)
        else:
            answer = await self.http.post("/v1/scans", json=body)
        if answer.is_success:
            with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
                scan = orjson.loads(answer.content)
                token = scan.get("producer_token") or self.scans.get(scan["id"])
                self.scans[scan["id"]] = token
        return answer

    async def submit_external(self, *, waits: bool = True) -> httpx.Response:
        """A scan that is worked on here: what it says, and when, is ours to choose."""
        return await self.submit({"scanner": "external", "params": {"title": TITLE, "total": 100}}, waits=waits)

    async def post(self, scan_id: str, events: list[dict[str, Any]]) -> None:
        """As the producer of an external scan."""
        headers = {"Authorization": f"Bearer {self.scans[scan_id]}"}
        answer = await self.request("POST", f"/v1/scans/{scan_id}/events", json=events, headers=headers)
        self.read_json(answer, 202)

    async def clean_up(self) -> list[str]:
        """Ends every scan that was started here; gives those that could not be ended."""
        left = []
        for scan_id, token in self.scans.items():
            if await self._cancel(scan_id):
                continue
            if token is not None:  # its producer has another way
                with contextlib.suppress(httpx.HTTPError, Unmet):
                    await self.post(scan_id, [{"type": "end", "state": "cancelled"}])
                    continue
            left.append(scan_id)
        return left

    async def _cancel(self, scan_id: str) -> bool:
        """Whether it has ended, soon at the latest."""
        with contextlib.suppress(httpx.HTTPError, Unmet):
            answer = await self.request("DELETE", f"/v1/scans/{scan_id}")
            snapshot = self.read_json(answer, 200, 202)
            for _ in range(ENOUGH):
                if snapshot.get("end") is not None:
                    return True
                await self._sleep(float(snapshot.get("poll_after_s") or 1))
                snapshot = await self.get_json(f"/v1/scans/{scan_id}")
        return False

    # Streams

    @contextlib.asynccontextmanager
    async def stream(
        self, format_: str, scan_ids: str | list[str], after: str | None = None
    ) -> AsyncIterator[AsyncGenerator[ScanEvent, None]]:
        """The events of scans over one connection, from the cursor on. Entered when the stream is open.

        Raises Unmet when it does not open as it should, and RequestRefused.
        """
        ids = [scan_ids] if isinstance(scan_ids, str) else scan_ids
        open_ = self._open_websocket if format_ == WEBSOCKET else self._open_http
        for attempt in range(ENOUGH):
            async with contextlib.AsyncExitStack() as stack:
                try:
                    events = await stack.enter_async_context(open_(format_, ids, after))
                except RequestRefused as refusal:
                    if refusal.status not in (429, 503) or refusal.retry_after_s is None or attempt == ENOUGH - 1:
                        raise
                    waits_s, why = refusal.retry_after_s, str(refusal.problem.get("title")).lower()
                else:
                    yield events
                    return
            await self.wait(waits_s, why)

    @contextlib.asynccontextmanager
    async def _open_http(
        self, format_: str, ids: list[str], after: str | None
    ) -> AsyncIterator[AsyncGenerator[ScanEvent, None]]:
        headers = {"Accept": format_, "Accept-Encoding": "identity"}
        params: list[tuple[str, str | int | float | bool | None]] = (
            [("scan", scan_id) for scan_id in ids] if len(ids) > 1 else []
        )
        if after is not None and format_ == SSE:
            headers["Last-Event-ID"] = after  # as browsers send it
        elif after is not None:
            params.append(("after", after))
        path = "/v1/events" if len(ids) > 1 else f"/v1/scans/{ids[0]}/events"
        async with self.http.stream("GET", path, params=params, headers=headers) as answer:
            if answer.status_code != 200:
                await answer.aread()
                raise read_refusal(answer)
            media_type = answer.headers.get("content-type", "nothing").partition(";")[0]
            if media_type != format_:
                fail(f"asked for {format_}, the answer is {media_type}")
            pieces = answer.aiter_bytes()
            try:
                async with asyncio.timeout(FIRST_BYTE_S):
                    first = await anext(pieces, b"")
            except TimeoutError:
                fail(f"no byte for {FIRST_BYTE_S:g} s after the head: something on the way holds the stream back")
            decoder = SseDecoder() if format_ == SSE else NdjsonDecoder()
            ready = list(decoder.feed(first))
            for event in ready:
                if event.type == EventType.THROTTLED:
                    problem = event.data.get("problem") or {}
                    raise RequestRefused(problem, 429, event.data.get("retry_after_s"))

            async def read() -> AsyncGenerator[ScanEvent, None]:
                for event in ready:
                    yield event
                async for piece in pieces:
                    for event in decoder.feed(piece):
                        yield event

            async with contextlib.aclosing(read()) as events:
                yield events

    @contextlib.asynccontextmanager
    async def _open_websocket(
        self, format_: str, ids: list[str], after: str | None
    ) -> AsyncIterator[AsyncGenerator[ScanEvent, None]]:
        url = str(self.http.base_url.join("/v1/ws")).replace("http", "ws", 1)
        try:
            async with asyncio.timeout(REQUEST_S):
                socket = await connect(
                    url,
                    additional_headers=self.headers,
                    subprotocols=[Subprotocol("scanwire.v1")],
                    compression=None,
                )
        except (OSError, WebSocketException) as error:
            response = getattr(error, "response", None)
            if response is not None:
                request = httpx.Request("GET", url)
                fields = list(response.headers.raw_items())
                raise read_refusal(
                    httpx.Response(response.status_code, headers=fields, content=response.body, request=request)
                ) from None
            fail(f"no WebSocket: {error}")
        async with socket:
            for scan_id in ids:
                await socket.send(orjson.dumps({"op": "subscribe", "scan": scan_id, "after": after}).decode())

            async def read() -> AsyncGenerator[ScanEvent, None]:
                async for message in socket:
                    body = orjson.loads(message)
                    if "error" in body:
                        fail(f"a subscription was refused: {body['error'].get('detail')}")
                    if "type" in body:
                        yield ScanEvent.parse(message if isinstance(message, bytes) else message.encode())

            async with contextlib.aclosing(read()) as events:
                yield events


def describe_failure(probe: Probe, error: BaseException) -> str:
    """In one line, what went wrong where nothing should have."""
    match error:
        case httpx.RequestError():
            return str(describe_break(probe.http, error))
        case RequestRefused():
            return f"refused with {error.status}: {error}"
        case TimeoutError():
            return "what was waited for did not come"
        case Garbled():
            return f"what came are no events: {error}"
        case WebSocketException():
            return f"the WebSocket broke: {error}"
        case _:
            return f"the answer is not what it should be ({type(error).__name__}: {error})"


def show_seconds(seconds: float) -> str:
    """Milliseconds for what is short."""
    return f"{math.ceil(seconds * 1000):,} ms" if seconds < 1 else f"{seconds:,.2f} s"
