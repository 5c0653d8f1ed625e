"""What is asked thousands of times a second, answered ahead of all layers: they would cost more than the answer."""

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from app.api.external import Post, acknowledge, has_own_token, is_unsure
from app.api.formats import JSON, NDJSON, SSE
from app.api.polling import SnapshotCache, encode_answer
from app.api.problems import answer_incident, problem_response, refuse
from app.api.security import DATA_HEADERS, PAGE_HEADERS, Security
from app.api.service import Service
from app.api.sse import open_stream
from app.api.websocket import serve_websocket
from app.core.errors import ScanwireError
from app.core.event import Cursor
from app.core.scan import Scan
from app.observe.tally import Timing
from app.push.frames import LINES, STREAM, Framing
from app.push.plain import encode_fields
from app.push.wire import HttpConnection, find_wire

_SCANS = "/v1/scans/"
_WEBSOCKET = "/v1/ws"
_DATA = encode_fields(DATA_HEADERS)
_PAGE = encode_fields(PAGE_HEADERS)
_POSTED = encode_fields([(b"cache-control", b"no-store"), (b"content-type", JSON.encode())]) + _DATA
# What asks for a stream, and for nothing else.
_FRAMINGS = {SSE.encode(): STREAM, NDJSON.encode(): LINES}
_OF_A_BODY = (b"content-length", b"transfer-encoding")
Answer = tuple[int, bytes, bytes]  # status, header fields as they are sent, body


class Shortcuts:
    """Answers the plain snapshot poll (GET /v1/scans/{id}, no query, preference or cursor), the stream of one scan
    (GET /v1/scans/{id}/events, no query), the WebSocket, and the producer's post whose body came with its head, where
    the server offers the wire to write the answer to.

    `security` checks them all the same, and gets everything else, timed by Timing. What it checked on a connection
    holds for the requests there that have the same head.
    """

    def __init__(self, security: Security, app: Starlette) -> None:
        self._security = security
        self._app, self._state = app, app.state
        self._otherwise = Timing(security, self._find_note)
        self._snapshots: SnapshotCache = app.state.snapshots

    def _find_note(self) -> Callable[[float], None] | None:
        """None before the service has started, and where the server tells the application of no start."""
        service: Service | None = getattr(self._state, "service", None)
        return None if service is None else service.note_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and scope["path"] == _WEBSOCKET and find_wire(scope) is not None:
            await self._connect(scope, receive, send)
            return
        wire: HttpConnection | None = find_wire(scope) if scope["type"] == "http" else None
        line = None if wire is None else _Line(wire, self._state.service, self._snapshots)
        asked = None if line is None else line.read(scope)
        if line is None or asked is None:
            await self._otherwise(scope, receive, send)
            return
        began = time.perf_counter()
        scan_id, fields, body, framing = asked
        try:
            client = self._security.check(scope)
            if framing is not None:
                line.open(client, scan_id, fields, framing, began)
                return
            post = None if body is None else Post.check(line.service, scan_id, fields)
        except ScanwireError as refusal:
            line.respond(began, _encode_refusal(refusal))
            return
        except Exception as error:
            incident = await answer_incident(HTTPConnection(scope), error)
            assert incident is not None  # which is for WebSockets alone
            line.respond(began, _encode(incident))
            return
        if post is None:
            line.wire.repeat_with(partial(line.repeat_poll, client, scan_id))
            line.poll(client, scan_id, fields, began)
        else:
            line.wire.repeat_with(partial(line.repeat_post, post))
            answered = line.post(post, body or b"", began)
            if answered is not None:
                await asyncio.wait((answered,))

    async def _connect(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self._app
        try:
            self._security.admit(scope)
            await serve_websocket(WebSocket(scope, receive, send))
        except ScanwireError as refusal:
            await refuse(refusal, scope, receive, send)


class _Asked(NamedTuple):
    """What is answered here."""

    scan_id: str
    fields: Mapping[bytes, bytes]
    body: bytes | None = None  # of a post
    framing: Framing | None = None  # of a stream


class _Line:
    """A request, and those that repeat it on its connection."""

    __slots__ = ("_snapshots", "service", "wire")

    def __init__(self, wire: HttpConnection, service: Service, snapshots: SnapshotCache) -> None:
        self.wire = wire
        self.service = service
        self._snapshots = snapshots

    def read(self, scope: Scope) -> _Asked | None:
        """None for what is not answered here."""
        method, path = scope["method"], scope["path"]
        if not path.startswith(_SCANS):
            return None
        fields = dict(scope["headers"])
        if b"origin" in fields:  # of a browser, which may want the fields that CORS adds
            return None
        if has_own_token(method, path):
            body = self.wire.take_body()
            if body is not None and len(body) <= self.service.settings.max_events_body_bytes:
                return _Asked(path.split("/")[3], fields, body)
        elif method == "GET" and not scope["query_string"] and b"prefer" not in fields:
            scan_id, slash, rest = path[len(_SCANS) :].partition("/")
            framing = _FRAMINGS.get(fields.get(b"accept", b"")) if rest == "events" else None
            if self.service.log.find(scan_id) is None:
                return None
            if not slash and b"last-event-id" not in fields:
                return _Asked(scan_id, fields)
            if framing is not None and len(fields) == len(scope["headers"]) and fields.keys().isdisjoint(_OF_A_BODY):
                return _Asked(scan_id, fields, framing=framing)
        return None

    def open(self, client: str, scan_id: str, fields: Mapping[bytes, bytes], framing: Framing, began: float) -> None:
        """A stream begins. Raises what refuses it."""
        last = fields.get(b"last-event-id", b"").decode("latin-1")
        cursor = Cursor.parse(last, "Last-Event-ID") if last else None
        answer = open_stream(self.service, client, (scan_id,), cursor, framing)
        if isinstance(answer, Response):
            self.respond(began, _encode(answer))
        else:
            answer.push_ahead(self.wire, (_PAGE if framing is STREAM else _DATA) + self._vary)
            self.service.note_answer(time.perf_counter() - began)

    def repeat_poll(self, client: str, scan_id: str, fields: Mapping[bytes, bytes], body: bytes) -> bool:
        began = time.perf_counter()
        is_plain = not body and self.service.log.find(scan_id) is not None
        if is_plain:
            self.poll(client, scan_id, fields, began)
        return is_plain

    def repeat_post(self, post: Post, fields: Mapping[bytes, bytes], body: bytes) -> bool:
        began = time.perf_counter()
        if len(body) > self.service.settings.max_events_body_bytes:
            return False
        answered = self.post(post, body, began, fields)
        if answered is not None:
            self.wire.hold_until(answered)
        return True

    def poll(self, client: str, scan_id: str, fields: Mapping[bytes, bytes], began: float) -> None:
        service = self.service
        try:
            service.limits.charge("read", client)
            scan, if_none_match = service.log.get(scan_id), fields.get(b"if-none-match", b"")
            status, headers, text = encode_answer(service, self._snapshots, client, scan, if_none_match)
            answer = status, encode_fields(headers) + _DATA, text
        except ScanwireError as refusal:
            answer = _encode_refusal(refusal)
        self.respond(began, answer)

    def post(
        self, post: Post, body: bytes, began: float, fields: Mapping[bytes, bytes] | None = None
    ) -> "asyncio.Future[Scan] | None":
        """Gives what is done when it is answered; None when it is answered already. `fields` are those of a post that
        is like the one that was checked."""
        service = self.service
        try:
            appending = (post if fields is None else post.renumber(fields)).append(service, body)
        except ScanwireError as refusal:
            self.respond(began, _encode_refusal(refusal))
            return None
        timer = asyncio.get_running_loop().call_later(service.settings.commit_wait_s, appending.cancel)

        def answer(appending: "asyncio.Future[Scan]") -> None:
            timer.cancel()
            try:
                text = acknowledge(service, appending.result())
            except asyncio.CancelledError:
                self.respond(began, _encode_refusal(is_unsure()))
            except ScanwireError as refusal:
                self.respond(began, _encode_refusal(refusal))
            else:
                self.respond(began, (202, _POSTED + b"content-length: %d\r\n" % len(text), text))

        appending.add_done_callback(answer)
        return appending

    @property
    def _vary(self) -> bytes:
        """What CORS puts on every answer: a cache must not give this one to a page of an allowed origin."""
        return b"vary: Origin\r\n" if self.service.settings.allowed_origins else b""

    def respond(self, began: float, answer: Answer) -> None:
        status, fields, body = answer
        self.wire.respond(status, fields + self._vary, body)
        self.service.note_answer(time.perf_counter() - began)


def _encode_refusal(refusal: ScanwireError) -> Answer:
    return _encode(problem_response(refusal))


def _encode(response: Response) -> Answer:
    fields = _PAGE if (response.media_type or "").startswith("text/") else _DATA
    return response.status_code, encode_fields(response.raw_headers) + fields, bytes(response.body)
