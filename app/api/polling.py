"""For clients that ask instead of being told: snapshots, long polls, pages of events, and when to ask again."""

import asyncio
import contextlib
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import orjson
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from app.api.formats import JSON
from app.api.service import Service, get_client, get_service
from app.core.errors import InvalidParams
from app.core.estimate import POLL_MIN_S, estimate_end
from app.core.event import Cursor, Event, EventType
from app.core.scan import Progress, Scan, State
from app.core.snapshot import make_snapshot
from app.push.puller import Puller

_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?\s*(?:$|[,;\s])", re.ASCII)


class _Encoded(NamedTuple):
    scan: Scan
    progress: Progress | None
    etag: bytes
    body: bytes  # the snapshot without `poll_after_s`, and without the closing brace


class SnapshotCache:
    """Snapshots as JSON, made once for each change of a scan, however many clients poll it."""

    def __init__(self, size: int = 1024) -> None:
        self._size = size
        self._encoded: dict[str, _Encoded] = {}

    def get(self, service: Service, scan: Scan) -> _Encoded:
        progress = service.log.get_progress(scan.id)
        encoded = self._encoded.get(scan.id)
        if encoded is None or encoded.scan is not scan or encoded.progress is not progress:
            snapshot = make_snapshot(scan, progress, service.log.epoch)
            del snapshot["poll_after_s"]
            done = 0 if progress is None else progress.done
            etag = f'W/"{service.log.epoch}-{scan.n}-{done}-{int(scan.is_trimmed)}"'
            encoded = _Encoded(scan, progress, etag.encode(), orjson.dumps(snapshot)[:-1])
            if len(self._encoded) >= self._size:
                del self._encoded[next(iter(self._encoded))]
            self._encoded[scan.id] = encoded
        return encoded


def encode_answer(
    service: Service, snapshots: SnapshotCache, client: str, scan: Scan, if_none_match: bytes
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, header fields and body of the answer to a snapshot poll; 304 when the client has it already."""
    encoded = snapshots.get(service, scan)
    poll_after_s = hint_next(service, client, scan)
    headers = service.limits.raw_headers("read", client)
    headers += [(b"etag", encoded.etag), (b"cache-control", b"no-cache")]
    hint = b"null"
    if poll_after_s is not None:
        hint = b"%.3f" % poll_after_s
        headers.append((b"retry-after", b"%d" % math.ceil(poll_after_s)))
    if if_none_match and encoded.etag in if_none_match:
        return 304, headers, b""
    body = encoded.body + b',"poll_after_s":' + hint + b"}"
    headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return 200, headers, body


def read_wait_s(request: Request, service: Service) -> float:
    """Seconds that the client is ready to wait (`Prefer: wait=25`, RFC 7240), at most `long_poll_max_s`."""
    match = _WAIT.search(request.headers.get("prefer", ""))
    return min(float(match[1]), service.settings.long_poll_max_s) if match else 0.0


def read_cursor(request: HTTPConnection) -> Cursor | None:
    """From `Last-Event-ID`, else from `?after=`. Raises InvalidCursor."""
    # A browser that reconnects sends the header, and the address it was opened with, which is older.
    given = (
        ("Last-Event-ID", request.headers.get("last-event-id")),
        ("after", request.query_params.get("after")),
    )
    cursors = [Cursor.parse(text, field) for field, text in given if text]
    return cursors[0] if cursors else None


def hint_next(service: Service, client: str, scan: Scan, after: int = 0) -> float | None:
    """Seconds until this client's next poll of this scan is worth making; None when nothing more will come.

    `after` is how far the client has read, for one that reads events: when that moved, something has changed.
    """
    if scan.state.is_terminal:
        return None
    progress = service.log.get_progress(scan.id)
    version = (scan.n, None if progress is None else progress.done, after)
    end_s = None
    if progress is not None and scan.state is not State.QUEUED:
        age_s = service.log.get_progress_age_s(scan.id)
        end_s = estimate_end(progress.done, progress.total, progress.rate, age_s)
    eta_s = service.runner.estimate_change(scan) if end_s is None else None
    return service.sessions.poll(client, scan.id, version, eta_s, end_s)


async def get_snapshot(request: Request) -> Response:
    """GET /v1/scans/{id}; a long poll with `?after=` and `Prefer: wait=`"""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)
    scan = service.log.get(request.path_params["id"])
    cursor, wait_s = read_cursor(request), read_wait_s(request, service)
    waits = wait_s > 0 and cursor is not None and not scan.state.is_terminal
    if waits:
        with service.hub.pull("long-poll") as subscriber:
            service.hub.subscribe(subscriber, scan.id, cursor)
            if not _has_durable(await subscriber.read()):
                await _hold(request, subscriber, [scan.id], wait_s)
        scan = service.log.get(scan.id)
    if_none_match = request.headers.get("if-none-match", "").encode("latin-1")
    status, headers, body = encode_answer(service, request.app.state.snapshots, client, scan, if_none_match)
    if waits:
        headers.append((b"preference-applied", b"wait=%g" % wait_s))
    response = Response(body, status)
    response.raw_headers = headers
    return response


async def _hold(request: Request, subscriber: Puller, scan_ids: Sequence[str], wait_s: float) -> list[Event]:
    """What comes next, as soon as something durable does; nothing when the time is over or the client has left.

    News of progress end the wait too, but not before POLL_MIN_S: a long poll should not become a fast one.
    """
    service, client = get_service(request), get_client(request)
    service.limits.charge("connect", client)
    with service.limits.open_stream(client), service.sessions.stream(client, scan_ids, is_poll=True):
        waiting = asyncio.create_task(_wait_for_news(subscriber, wait_s))
        leaving = asyncio.create_task(wait_until_gone(request))
        try:
            await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else []
        finally:
            waiting.cancel()
            leaving.cancel()
            await asyncio.gather(waiting, leaving, return_exceptions=True)


async def _wait_for_news(subscriber: Puller, wait_s: float) -> list[Event]:
    latest: list[Event] = []
    earliest = asyncio.get_running_loop().time() + POLL_MIN_S
    try:
        async with asyncio.timeout(wait_s) as limit, contextlib.aclosing(subscriber.batches()) as batches:
            async for latest in batches:
                if _has_durable(latest):
                    break
                limit.reschedule(min(earliest, limit.when() or earliest))
    except TimeoutError:
        pass
    finally:
        del limit  # which knows this task, whose exception knows this frame
    return latest


async def wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _has_durable(batch: Sequence[Event]) -> bool:
    return any(event.type is not EventType.PROGRESS for event in batch)


async def get_events_page(request: Request, scan_ids: Sequence[str], cursor: Cursor | None) -> Response:
    """What is new behind the cursor, as one JSON document; waits for it when the client prefers to."""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)
    wait_s = read_wait_s(request, service)
    headers = {"Cache-Control": "no-store", **service.limits.headers("read", client)}
    with service.hub.pull("poll") as subscriber:
        for scan_id in scan_ids:
            service.hub.subscribe(subscriber, scan_id, cursor)
        batch = await subscriber.read()
        if wait_s and not _has_durable(batch) and not subscriber.is_done:
            headers["Preference-Applied"] = f"wait={wait_s:g}"
            batch = await _hold(request, subscriber, scan_ids, wait_s) or batch
        after = max([watch.after for watch in subscriber.watches.values()] + [event.n for event in batch])
        is_closed = subscriber.is_done
        scans = [scan for scan_id in scan_ids if (scan := service.log.find(scan_id)) is not None]
        has_more = any(subscriber.watches[scan.id].after < scan.n for scan in scans)
    if has_more:
        poll_after_s: float | None = service.limits.retry_after_s("read", client)
    else:
        hints = [hint for scan in scans if (hint := hint_next(service, client, scan, after)) is not None]
        poll_after_s = min(hints, default=None)
    if poll_after_s is not None:
        headers["Retry-After"] = str(math.ceil(poll_after_s))
    tail = {"cursor": str(Cursor(service.log.epoch, after)), "closed": is_closed, "poll_after_s": poll_after_s}
    body = b'{"events":[' + b",".join(event.json for event in batch) + b"]," + orjson.dumps(tail)[1:]
    return Response(body, headers=headers, media_type=JSON)


def require_known(service: Service, scan_ids: Sequence[str]) -> None:
    """Raises UnknownScan, or InvalidParams for none or too many."""
    if not 0 < len(scan_ids) <= service.settings.max_scans_per_stream:
        raise InvalidParams.of("scan", f"name 1 to {service.settings.max_scans_per_stream} scans, as in ?scan=A&scan=B")
    for scan_id in scan_ids:
        service.log.get(scan_id)
