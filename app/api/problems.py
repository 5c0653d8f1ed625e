"""How a refusal leaves the server: problem+json (RFC 9457) over HTTP, a close code over WebSocket.

`PROBLEMS` goes to Starlette as `exception_handlers`, so that whatever a handler raises ends here.
"""

import logging
import math
import secrets
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketState

from app.core.errors import (
    AtCapacity,
    Conflict,
    Forbidden,
    InvalidRequest,
    KeyRequired,
    NotAcceptable,
    NotFound,
    RateLimited,
    ScanwireError,
    TooLarge,
    Trimmed,
    UnsupportedMedia,
    WrongMethod,
    WrongState,
)

logger = logging.getLogger("scanwire.api")

# RFC 6455 leaves 123 bytes for the reason of a close.
CLOSE_REASON_BYTES = 123

_BY_STATUS: dict[int, type[ScanwireError]] = {
    error.status: error
    for error in (
        InvalidRequest,
        Forbidden,
        NotFound,
        WrongMethod,
        NotAcceptable,
        Conflict,
        Trimmed,
        TooLarge,
        UnsupportedMedia,
        RateLimited,
        AtCapacity,
    )
}


def problem_response(error: ScanwireError) -> Response:
    """The error as problem+json with its status, its header fields and, where waiting helps, Retry-After.

    `Retry-After` is in whole seconds, rounded up and at least 1; the body's `retry_after_s` is exact.
    """
    return _render(error.to_problem(), error.status, error.headers, error.retry_after_s)


async def refuse(error: ScanwireError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request, or a WebSocket handshake that was not accepted yet, with the error and ends it.

    A handshake gets the same HTTP answer where the server can give one (`websocket.http.response`), else the error's
    close code, which most servers turn into a bare 403.
    """
    if scope["type"] == "http":
        await problem_response(error)(scope, receive, send)
        return
    message = await receive()
    if message["type"] != "websocket.connect":
        return
    if "websocket.http.response" in scope.get("extensions", {}):
        await problem_response(error)(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": error.close_code, "reason": close_reason(error)})


def close_reason(error: ScanwireError) -> str:
    """The error's detail, cut so that it fits into a WebSocket close frame."""
    return error.detail.encode()[:CLOSE_REASON_BYTES].decode(errors="ignore")


async def answer_error(connection: HTTPConnection, error: Exception) -> Response | None:
    """Any ScanwireError that a handler raised."""
    assert isinstance(error, ScanwireError)
    if isinstance(error, WrongState):
        return await answer_incident(connection, error)
    return await _answer(connection, error)


async def answer_http_exception(connection: HTTPConnection, error: Exception) -> Response | None:
    """Starlette's own refusals: no route, wrong method, static files."""
    assert isinstance(error, HTTPException)
    if error.status_code in (204, 304):
        return Response(status_code=error.status_code, headers=error.headers)
    headers = dict(error.headers or {})
    phrase = _phrase(error.status_code)
    # An author's own words are kept; a bare status phrase says nothing about what to do next.
    detail = "" if error.detail == phrase else error.detail
    if error.status_code == 401:
        return await _answer(connection, KeyRequired(detail or "Send an API key as `Authorization: Bearer KEY`."))
    if kind := _BY_STATUS.get(error.status_code):
        advice = _advice(connection, kind, headers) or phrase
        return await _answer(connection, kind(detail or advice, headers=headers))
    problem = {"type": "about:blank", "title": phrase, "status": error.status_code, "detail": detail or phrase}
    return _render(problem, error.status_code, headers, None)


async def answer_incident(connection: HTTPConnection, error: Exception) -> Response | None:
    """The last resort: shows neither stack nor path, but an id that is also in the log, with the traceback."""
    incident = secrets.token_hex(4)
    logger.error(
        "incident %s: %s %s failed",
        incident,
        connection.scope.get("method", "WebSocket"),
        connection.scope["path"],
        exc_info=error,
        extra={"action": "incident", "incident": incident},
    )
    detail = f"The server failed on this request. Try again later, and quote incident {incident} to who runs it."
    return await _answer(connection, ScanwireError(detail, incident=incident))


async def answer_nobody(connection: HTTPConnection, error: Exception) -> Response | None:
    """The client left while its body was read: there is nobody to answer and nothing to report."""
    return Response(status_code=400)


# Starlette's type for handlers knows none that takes both kinds of connection.
PROBLEMS: Mapping[Any, Any] = {
    ScanwireError: answer_error,
    HTTPException: answer_http_exception,
    ClientDisconnect: answer_nobody,
    Exception: answer_incident,
}


async def _answer(connection: HTTPConnection, error: ScanwireError) -> Response | None:
    if not isinstance(connection, WebSocket):
        return problem_response(error)
    if connection.application_state is WebSocketState.CONNECTING:
        if "websocket.http.response" in connection.scope.get("extensions", {}):
            return problem_response(error)
        await connection.close(error.close_code, close_reason(error))
    elif connection.application_state is WebSocketState.CONNECTED:
        await connection.close(error.close_code if error.status != 500 else 1011, close_reason(error))
    return None


def _advice(connection: HTTPConnection, kind: type[ScanwireError], headers: Mapping[str, str]) -> str:
    path = connection.scope["path"][:100]
    if kind is NotFound:
        return f"There is nothing at {path!r}. /openapi.json lists every address."
    if kind is WrongMethod:
        allowed = next((value for name, value in headers.items() if name.lower() == "allow"), "")
        return f"{path!r} does not take {connection.scope['method'][:20]!r}; it takes {allowed or 'other methods'}."
    if kind is TooLarge:
        return "The body is over the bound SCANWIRE_MAX_BODY_BYTES. Send less."
    return ""


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Refused"


def _render(
    problem: Mapping[str, Any], status: int, headers: Mapping[str, str], retry_after_s: float | None
) -> Response:
    fields = {"Cache-Control": "no-store", **headers}
    if retry_after_s is not None:
        fields["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    body = orjson.dumps(problem, default=str, option=orjson.OPT_NON_STR_KEYS)
    return Response(body, status, fields, "application/problem+json")
