"""What is asked thousands of times a second, answered ahead of all layers: they would cost more than the answer."""

import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from app.api.external import append_posted, has_own_token
from app.api.formats import JSON
from app.api.polling import SnapshotCache, encode_answer
from app.api.problems import refuse
from app.api.security import DATA_HEADERS, Security, add_security_headers
from app.api.service import Service
from app.core.errors import ScanwireError
from app.core.scan import Scan
from app.observe.tally import Timing
from app.push.wire import HttpConnection, find_wire

_SCANS = "/v1/scans/"
Answer = tuple[int, list[tuple[bytes, bytes]], bytes]  # status, header fields, body
_POSTED = [(b"cache-control", b"no-store"), (b"content-type", JSON.encode())]


class Shortcuts:
    """Answers the plain snapshot poll (GET /v1/scans/{id}, no query, preference or cursor) and the producer's post
    whose body came with its head, where the server offers the wire to write the answer to.

    `security` checks them all the same, and gets everything else, timed by Timing.
    """

    def __init__(self, security: Security, app: Starlette) -> None:
        self._security = security
        self._state = app.state
        self._otherwise = Timing(security, lambda: app.state.note_answer)
        self._snapshots: SnapshotCache = app.state.snapshots

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire = find_wire(scope) if scope["type"] == "http" else None
        answer = None if wire is None else self._find(scope, wire)
        if wire is None or answer is None:
            await self._otherwise(scope, receive, send)
            return
        began = time.perf_counter()
        try:
            status, fields, body = await answer(self._security.check(scope))
        except ScanwireError as refusal:
            await refuse(refusal, scope, receive, add_security_headers(send))
            return
        wire.respond(status, (*fields, *DATA_HEADERS), body)
        self._state.note_answer(time.perf_counter() - began)

    def _find(self, scope: Scope, wire: HttpConnection) -> Callable[[str], Awaitable[Answer]] | None:
        method, path = scope["method"], scope["path"]
        if not path.startswith(_SCANS):
            return None
        service: Service = self._state.service
        fields = dict(scope["headers"])
        if b"origin" in fields:  # of a browser, which may want the fields that CORS adds
            return None
        if method == "GET" and (scan := service.log.find(path[len(_SCANS) :])) is not None:
            if scope["query_string"] or b"prefer" in fields or b"last-event-id" in fields:
                return None
            return partial(self._poll, service, scan, fields.get(b"if-none-match", b""))
        if has_own_token(method, path):
            body = wire.take_body()
            if body is not None and len(body) <= service.settings.max_events_body_bytes:
                return partial(self._post, service, path.split("/")[3], fields, body)
        return None

    async def _poll(self, service: Service, scan: Scan, if_none_match: bytes, client: str) -> Answer:
        service.limits.charge("read", client)
        return encode_answer(service, self._snapshots, client, scan, if_none_match)

    async def _post(
        self, service: Service, scan_id: str, fields: Mapping[bytes, bytes], body: bytes, client: str
    ) -> Answer:
        async def read() -> bytes:
            return body

        answer = await append_posted(service, scan_id, fields, read)
        return 202, [*_POSTED, (b"content-length", b"%d" % len(answer))], answer
