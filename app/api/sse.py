"""Events as they come: server-sent events, and the same as newline-delimited JSON."""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.formats import JSON, NDJSON, SSE, choose_format
from app.api.polling import get_events_page, read_cursor, require_known
from app.api.service import Service, get_client, get_service
from app.core.errors import AtCapacity, RateLimited, ScanwireError
from app.core.event import Cursor, Event, EventType, make_event
from app.push.frames import HEARTBEAT_NDJSON, HEARTBEAT_SSE, frame_ndjson, frame_sse, open_sse
from app.push.subscriber import Subscriber


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
    try:
        service.limits.charge("connect", client)
        if _is_caught_up(service, scan_ids, cursor):
            # Not an empty stream: this is what makes an EventSource stop coming back.
            return Response(status_code=204, headers=service.limits.headers("connect", client))
        lease = service.limits.open_stream(client)
    except (RateLimited, AtCapacity) as refusal:
        if format_ == SSE:
            return _make_throttled(service, refusal)
        raise
    make_body, media_type = (_write_sse, SSE) if format_ == SSE else (_write_ndjson, NDJSON)

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        with (
            lease,
            service.hub.connect(media_type.rpartition("/")[2]) as subscriber,
            service.sessions.stream(client, scan_ids),
            contextlib.suppress(SendTimeoutError),
        ):
            for scan_id in scan_ids:
                service.hub.subscribe(subscriber, scan_id, cursor)
            body = make_body(service, subscriber)
            headers = service.limits.headers("connect", client)
            if media_type == SSE:
                response: ASGIApp = EventSourceResponse(
                    body, headers=headers, ping=0, send_timeout=service.settings.send_timeout_s
                )
            else:
                headers |= {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
                response = StreamingResponse(body, headers=headers, media_type=NDJSON)
            await response(scope, receive, send)

    return respond


def _is_caught_up(service: Service, scan_ids: Sequence[str], cursor: Cursor | None) -> bool:
    subscriber = Subscriber(service.log, "check")
    for scan_id in scan_ids:
        subscriber.watch(scan_id, cursor)
    return subscriber.is_done


async def _write_sse(service: Service, subscriber: Subscriber) -> AsyncIterator[bytes]:
    yield open_sse(service.settings.retry_ms)
    async for part in _write(service, subscriber, frame_sse, HEARTBEAT_SSE):
        yield part


async def _write_ndjson(service: Service, subscriber: Subscriber) -> AsyncIterator[bytes]:
    yield HEARTBEAT_NDJSON  # the head of the answer leaves with the first byte
    async for part in _write(service, subscriber, frame_ndjson, HEARTBEAT_NDJSON):
        yield part


async def _write(
    service: Service, subscriber: Subscriber, frame: Callable[[Event], bytes], heartbeat: bytes
) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(subscriber.batches(heartbeat_s=service.settings.heartbeat_s)) as batches:
        async for batch in batches:
            yield b"".join(map(frame, batch)) or heartbeat
            service.metrics.note_pushed(subscriber, batch)


def _make_throttled(service: Service, refusal: ScanwireError) -> Response:
    """A refusal that an EventSource survives: it gives up for good on any status but 200."""
    retry_ms = int((refusal.retry_after_s or 1) * 1000)
    data = {"retry_after_s": refusal.retry_after_s, "problem": refusal.to_problem()}
    event = make_event(EventType.THROTTLED, "", 0, data, service.log.now_ms())
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **refusal.headers}
    return Response(open_sse(retry_ms) + frame_sse(event), headers=headers, media_type=SSE)
