"""Ways in which a server can be broken: each is put around the real application and spoils one thing."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.service import Service
from app.core.event import Cursor
from app.push.guard import EXTENSION
from tests.serving import find_state

Fault = Callable[[ASGIApp, Scope, Receive, Send], Any]


class Switch:
    """The application, with the fault that is set just now. Nothing goes straight to the transport meanwhile."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.fault: Fault | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.fault is None or scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        extensions = {name: value for name, value in scope.get("extensions", {}).items() if name != EXTENSION}
        await self.fault(self.app, {**scope, "extensions": extensions}, receive, send)


@dataclass(slots=True)
class Answer:
    status: int
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""


def edit(change: Callable[[Scope, Answer], None]) -> Fault:
    """Changes the answers that are no streams."""

    async def serve(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        answer = Answer(0)
        is_stream = False

        async def send_edited(message: Message) -> None:
            nonlocal is_stream
            if message["type"] == "http.response.start":
                answer.status, answer.headers = message["status"], dict(message["headers"])
                media_type = answer.headers.get(b"content-type", b"").partition(b";")[0]
                is_stream = media_type in (b"text/event-stream", b"application/x-ndjson")
                if is_stream:
                    await send(message)
                return
            if is_stream or scope["type"] != "http":
                await send(message)
                return
            answer.body += message.get("body", b"")
            if not message.get("more_body"):
                change(scope, answer)
                answer.headers[b"content-length"] = b"%d" % len(answer.body)
                await send(
                    {"type": "http.response.start", "status": answer.status, "headers": [*answer.headers.items()]}
                )
                await send({"type": "http.response.body", "body": answer.body})

        await app(scope, receive, send_edited)

    return serve


def _is_snapshot(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] == "GET" and path.startswith("/v1/scans/") and path.count("/") == 3


def _change_json(answer: Answer, **members: Any) -> None:
    answer.body = orjson.dumps({**orjson.loads(answer.body), **members})


@edit
def drop_retry_after(scope: Scope, answer: Answer) -> None:
    if answer.status == 429:
        del answer.headers[b"retry-after"]


@edit
def promise_too_short_waits(scope: Scope, answer: Answer) -> None:
    problem = orjson.loads(answer.body) if answer.status == 429 else {}
    if problem.get("limit") == "submit":
        _change_json(answer, retry_after_s=problem["retry_after_s"] * 0.9)


async def ignore_limits(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    find_state(app).service.limits._buckets.clear()
    await app(scope, receive, send)


@edit
def give_the_same_hint_always(scope: Scope, answer: Answer) -> None:
    if _is_snapshot(scope) and answer.status == 200:
        _change_json(answer, poll_after_s=1.0)


@edit
def take_anything(scope: Scope, answer: Answer) -> None:
    if scope["method"] == "POST" and answer.status in (400, 422):
        answer.status, answer.body = 200, b"{}"


@edit
def refuse_without_a_word(scope: Scope, answer: Answer) -> None:
    if answer.status in (400, 404, 405, 413, 415, 422):
        answer.headers[b"content-type"], answer.body = b"text/plain", b"no"


async def cancel_nothing(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    is_cancel = scope.get("method") == "DELETE" and scope["path"].startswith("/v1/scans/")
    await app({**scope, "method": "GET"} if is_cancel else scope, receive, send)


class FailNowAndThen:
    """Every third snapshot of a scan of the market."""

    def __init__(self) -> None:
        self.asked = 0
        self.serve = edit(self._spoil)

    def _spoil(self, scope: Scope, answer: Answer) -> None:
        if _is_snapshot(scope) and answer.status == 200 and orjson.loads(answer.body)["scanner"] != "external":
            self.asked += 1
            if self.asked % 3 == 0:
                answer.status = 500


async def answer_slowly(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http" and _is_snapshot(scope):
        await asyncio.sleep(0.3)  # the fault itself
    await app(scope, receive, send)


async def buffer_sse(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """As some proxies do: the body comes when it is whole."""
    held: list[bytes] = []
    is_sse = False

    async def send_at_the_end(message: Message) -> None:
        nonlocal is_sse
        if message["type"] == "http.response.start":
            is_sse = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        elif is_sse:
            held.append(message.get("body", b""))
            if message.get("more_body"):
                return
            message = {**message, "body": b"".join(held)}
        await send(message)

    await app(scope, receive, send_at_the_end)


def lose_an_event_behind_the_cursor(name: str) -> Fault:
    """Reads on one event too late, on one transport: `sse`, `ndjson`, `page` or `websocket`."""
    accepts = {"sse": b"text/event-stream", "ndjson": b"application/x-ndjson", "page": b"application/json"}

    def skip(service: Service, text: str) -> str:
        cursor = Cursor.parse(text)
        is_last = cursor.n >= max(scan.n for scan in service.log.list_scans())
        return text if is_last else str(Cursor(cursor.epoch, cursor.n + 1))

    async def serve(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        service: Service = find_state(app).service
        headers = dict(scope["headers"])
        if scope["type"] == "http" and headers.get(b"accept") == accepts.get(name) and "/events" in scope["path"]:
            if b"last-event-id" in headers:
                headers[b"last-event-id"] = skip(service, headers[b"last-event-id"].decode()).encode()
            query = scope["query_string"].decode()
            if query.startswith("after="):
                query = "after=" + skip(service, query.removeprefix("after="))
            scope = {**scope, "headers": [*headers.items()], "query_string": query.encode()}

        async def receive_changed() -> Message:
            message = await receive()
            if message["type"] == "websocket.receive" and name == "websocket":
                command = orjson.loads(message["text"])
                if command.get("after"):
                    command["after"] = skip(service, command["after"])
                message = {**message, "text": orjson.dumps(command).decode()}
            return message

        await app(scope, receive_changed, send)

    return serve


async def never_see_who_leaves(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    async def receive_no_goodbye() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect":
            await asyncio.Event().wait()
        return message

    is_stream = dict(scope["headers"]).get(b"accept") == b"application/x-ndjson"
    with contextlib.suppress(asyncio.CancelledError):
        await app(scope, receive_no_goodbye if is_stream else receive, send)


async def run_everything_anew(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    if (scope.get("method"), scope["path"]) != ("POST", "/v1/scans"):
        await app(scope, receive, send)
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    with contextlib.suppress(orjson.JSONDecodeError, TypeError):
        body = orjson.dumps({**orjson.loads(body), "reuse": "never"})
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]

    async def receive_changed() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    await app({**scope, "headers": headers}, receive_changed, send)


@edit
def lose_legacy_rows(scope: Scope, answer: Answer) -> None:
    """The results are those of "not ready"."""
    if scope["path"].startswith("/api/scan/results/") and answer.status == 200:
        _change_json(answer, results=[], total_found=0)


@edit
def never_complete_legacy(scope: Scope, answer: Answer) -> None:
    if scope["path"].startswith("/api/scan/status/") and answer.status == 200:
        _change_json(answer, status="running", progress_percent=100, results=[])


@edit
def refuse_legacy_without_successor(scope: Scope, answer: Answer) -> None:
    if scope["path"].startswith("/api/") and answer.status >= 400:
        answer.headers.pop(b"link", None)


async def ignore_legacy_limits(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/api/operation/execute":
        find_state(app).service.limits._buckets.clear()
    await app(scope, receive, send)


async def answer_legacy_slowly(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"].startswith("/api/scan/status/"):
        await asyncio.sleep(0.3)  # the fault itself
    await app(scope, receive, send)


async def say_completed_before_final(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    async def send_early(message: Message) -> None:
        if message["type"] == "websocket.send" and scope["path"].startswith("/api/"):
            said = orjson.loads(message["text"])
            if said["type"] == "final":
                early = {"type": "progress", "status": "completed", "progress_percent": 100}
                await send({"type": "websocket.send", "text": orjson.dumps(early).decode()})
        await send(message)

    await app(scope, receive, send_early)


@edit
def serve_no_legacy(scope: Scope, answer: Answer) -> None:
    if scope["path"].startswith("/api/"):
        answer.status, answer.body = 404, b"{}"


def answer_with(status: int, path: str, **members: Any) -> Fault:
    """One address says something else."""

    def change(scope: Scope, answer: Answer) -> None:
        if scope["path"] == path:
            answer.status = status
            if members:
                _change_json(answer, **members)

    return edit(change)


def list_failed(results: Iterable[Any]) -> dict[str, str]:
    """The evidence of the checks that failed."""
    return {result.check: result.evidence for result in results if result.outcome == "fail"}
