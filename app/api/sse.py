"""Events as they come: server-sent events, and the same as newline-delimited JSON."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.formats import JSON, NDJSON, SSE, choose_format
from app.api.polling import get_events_page, read_cursor, require_known
from app.api.service import Service, get_client, get_service
from app.core.errors import AtCapacity, RateLimited, ScanwireError, UnknownScan
from app.core.event import Cursor, EventType, make_event
from app.engine.limits import StreamLease
from app.push.frames import HEARTBEAT_NDJSON, HEARTBEAT_SSE, LINES, STREAM, Framing, frame_sse, open_sse
from app.push.plain import encode_fields
from app.push.puller import Puller
from app.push.reader import Reader
from app.push.subscriber import Subscriber
from app.push.wire import HttpConnection, find_wire

_UNSTORED = ((b"cache-control", b"no-store"), (b"x-accel-buffering", b"no"))
_HEADS = {
    STREAM: ((b"content-type", SSE.encode() + b"; charset=utf-8"), *_UNSTORED),
    LINES: ((b"content-type", NDJSON.encode()), *_UNSTORED),
}


async def get_scan_events(request: Request) -> ASGIApp:
    """GET /v1/scans/{id}/events"""
    return await _answer(request, [request.path_params["id"]])


async def get_events(request: Request) -> ASGIApp:
    """GET /v1/events?scan=A&scan=B"""
    return await _answer(request, request.query_params.getlist("scan"))


async def _answer(request: Request, scan_ids: Sequence[str]) -> ASGIApp:
    service, client = get_service(request), get_client(request)
    format_ = choose_format(request.headers.get("accept"), (JSON, SSE, NDJSON))
    require_known(service, scan_ids)
    scan_ids = list(dict.fromkeys(scan_ids))
    cursor = read_cursor(request)
    if format_ == JSON:
        return await get_events_page(request, scan_ids, cursor)
    if request.method == "HEAD":
        return Response(media_type=format_)
    answer = open_stream(service, client, scan_ids, cursor, STREAM if format_ == SSE else LINES)
    if isinstance(answer, Response):
        return answer
    wire: HttpConnection | None = find_wire(request.scope)
    return answer.pull if wire is None else partial(answer.push, wire)


def open_stream(
    service: Service, client: str, scan_ids: Sequence[str], cursor: Cursor | None, framing: Framing
) -> "Stream | Response":
    """A stream that has its place, to be pushed or pulled; or the answer in place of one. Raises RateLimited and
    AtCapacity, but to an EventSource."""
    try:
        service.limits.charge("connect", client)
        if _is_caught_up(service, scan_ids, cursor):
            # Not an empty stream: this is what makes an EventSource stop coming back.
            return Response(status_code=204, headers=service.limits.headers("connect", client))
        lease = service.limits.open_stream(client)
    except (RateLimited, AtCapacity) as refusal:
        if framing is STREAM:
            return _make_throttled(service, refusal)
        raise
    return Stream(service, client, lease, scan_ids, cursor, framing)


@dataclass(frozen=True, slots=True)
class Stream:
    """One open stream, before it is known how it will be written."""

    service: Service
    client: str
    lease: StreamLease
    scan_ids: Sequence[str]
    cursor: Cursor | None
    framing: Framing

    @property
    def opening(self) -> bytes:
        """Sent at once: the head of the answer leaves with the first byte, and what holds it back is found out."""
        return open_sse(self.service.settings.retry_ms) if self.framing is STREAM else HEARTBEAT_NDJSON

    @property
    def head(self) -> list[tuple[bytes, bytes]]:
        return [*self.service.limits.raw_headers("connect", self.client), *_HEADS[self.framing]]

    async def push(self, wire: HttpConnection, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with the head; frames are written straight to the transport."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.head})
        except BaseException:
            self.lease.close()
            raise
        wire.rest = partial(self._push_rest, wire, b"")

    def push_ahead(self, wire: HttpConnection, fields: bytes) -> None:
        """As `push`, ahead of all layers, which would add these fields."""
        wire.rest = partial(self._push_rest, wire, wire.begin(200, encode_fields(self.head) + fields))

    async def _push_rest(self, wire: HttpConnection, head: bytes, receive: Receive, send: Send) -> None:
        opening = head + self.framing.wrap(self.opening)
        with (
            self.lease,
            self.service.hub.push(wire, self.framing, ends=True, client=self.client) as subscriber,
            self.service.sessions.stream(self.client, self.scan_ids),
        ):
            try:
                self._subscribe(subscriber)
            except UnknownScan:  # reaped in this very moment; the client is told when it comes back
                wire.write(opening)
            else:
                self.service.hub.start(subscriber, opening)
                del head, opening  # it may be open for hours
                await wire.finished
        await send({"type": "http.response.body", "body": b""})

    async def pull(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers on any ASGI server."""
        with (
            self.lease,
            self.service.hub.pull(self.framing.name) as subscriber,
            self.service.sessions.stream(self.client, self.scan_ids),
            contextlib.suppress(SendTimeoutError),
        ):
            self._subscribe(subscriber)
            subscriber.wake()
            body = self._write(subscriber)
            head = {name.decode(): value.decode() for name, value in self.head}
            if self.framing is STREAM:
                stall_s = self.service.settings.stall_s
                response: ASGIApp = EventSourceResponse(body, headers=head, ping=0, send_timeout=stall_s)
            else:
                response = StreamingResponse(body, headers=head)
            await response(scope, receive, send)

    def _subscribe(self, subscriber: Subscriber) -> None:
        for scan_id in self.scan_ids:
            self.service.hub.subscribe(subscriber, scan_id, self.cursor)

    async def _write(self, subscriber: Puller) -> AsyncIterator[bytes]:
        yield self.opening
        heartbeat = HEARTBEAT_SSE if self.framing is STREAM else HEARTBEAT_NDJSON
        async with contextlib.aclosing(subscriber.batches(heartbeat_s=self.service.settings.heartbeat_s)) as batches:
            async for batch in batches:
                yield b"".join(map(self.framing.frame, batch)) or heartbeat


def _is_caught_up(service: Service, scan_ids: Sequence[str], cursor: Cursor | None) -> bool:
    reader = Reader(service.log)
    for scan_id in scan_ids:
        reader.watch(scan_id, cursor)
    return reader.is_done


def _make_throttled(service: Service, refusal: ScanwireError) -> Response:
    """A refusal that an EventSource survives: it gives up for good on any status but 200."""
    retry_ms = int((refusal.retry_after_s or 1) * 1000)
    data = {"retry_after_s": refusal.retry_after_s, "problem": refusal.to_problem()}
    event = make_event(EventType.THROTTLED, "", 0, data, service.log.now_ms())
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **refusal.headers}
    return Response(open_sse(retry_ms) + frame_sse(event), headers=headers, media_type=SSE)
