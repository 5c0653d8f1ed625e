"""What is asked thousands of times a second, answered ahead of all layers: they would cost more than the answer."""

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial

from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from app.api.external import Post, acknowledge, has_own_token, is_unsure
from app.api.formats import JSON
from app.api.polling import SnapshotCache, encode_answer
from app.api.problems import problem_response
from app.api.security import DATA_HEADERS, Security
from app.api.service import Service
from app.core.errors import ScanwireError
from app.core.scan import Scan
from app.observe.tally import Timing
from app.push.plain import PlainAnswers, encode_fields
from app.push.wire import find_wire

_SCANS = "/v1/scans/"
_DATA = encode_fields(DATA_HEADERS)
_POSTED = encode_fields([(b"cache-control", b"no-store"), (b"content-type", JSON.encode())]) + _DATA
Answer = tuple[int, bytes, bytes]  # status, header fields as they are sent, body


class Shortcuts:
    """Answers the plain snapshot poll (GET /v1/scans/{id}, no query, preference or cursor) and the producer's post
    whose body came with its head, where the server offers the wire to write the answer to.

    `security` checks them all the same, and gets everything else, timed by Timing. What it checked on a connection
    holds for the requests there that have the same head.
    """

    def __init__(self, security: Security, app: Starlette) -> None:
        self._security = security
        self._state = app.state
        self._otherwise = Timing(security, self._find_note)
        self._snapshots: SnapshotCache = app.state.snapshots

    def _find_note(self) -> Callable[[float], None] | None:
        """None before the service has started, and where the server tells the application of no start."""
        service: Service | None = getattr(self._state, "service", None)
        return None if service is None else service.note_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire: PlainAnswers | None = find_wire(scope) if scope["type"] == "http" else None
        line = None if wire is None else _Line(wire, self._state.service, self._snapshots)
        asked = None if line is None else line.read(scope)
        if line is None or asked is None:
            await self._otherwise(scope, receive, send)
            return
        began = time.perf_counter()
        scan_id, fields, body = asked
        try:
            client = self._security.check(scope)
            post = None if body is None else Post.check(line.service, scan_id, fields)
        except ScanwireError as refusal:
            line.respond(began, _encode_refusal(refusal))
            return
        if post is None:
            line.wire.repeat_with(partial(line.repeat_poll, client, scan_id))
            line.poll(client, scan_id, fields, began)
        else:
            line.wire.repeat_with(partial(line.repeat_post, post))
            answered = line.post(post, body or b"", began)
            if answered is not None:
                await asyncio.wait((answered,))


class _Line:
    """A request, and those that repeat it on its connection."""

    __slots__ = ("_snapshots", "service", "wire")

    def __init__(self, wire: PlainAnswers, service: Service, snapshots: SnapshotCache) -> None:
        self.wire = wire
        self.service = service
        self._snapshots = snapshots

    def read(self, scope: Scope) -> tuple[str, Mapping[bytes, bytes], bytes | None] | None:
        """The scan, the fields, and the body of a post; None for what is not answered here."""
        method, path = scope["method"], scope["path"]
        if not path.startswith(_SCANS):
            return None
        fields = dict(scope["headers"])
        if b"origin" in fields:  # of a browser, which may want the fields that CORS adds
            return None
        if method == "GET" and self.service.log.find(path[len(_SCANS) :]) is not None:
            if scope["query_string"] or b"prefer" in fields or b"last-event-id" in fields:
                return None
            return path[len(_SCANS) :], fields, None
        if has_own_token(method, path):
            body = self.wire.take_body()
            if body is not None and len(body) <= self.service.settings.max_events_body_bytes:
                return path.split("/")[3], fields, body
        return None

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

    def respond(self, began: float, answer: Answer) -> None:
        status, fields, body = answer
        self.wire.respond(status, fields, body)
        self.service.note_answer(time.perf_counter() - began)


def _encode_refusal(refusal: ScanwireError) -> Answer:
    response = problem_response(refusal)
    return response.status_code, encode_fields(response.raw_headers) + _DATA, bytes(response.body)
