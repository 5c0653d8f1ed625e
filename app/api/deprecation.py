"""The addresses of old: what each answer from them says of their end, and what takes their place."""

import re
import time
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.observe.metrics import Metrics

PREFIX = "/api/"
SINCE = 1_793_491_200  # 1 November 2026, in seconds since 1970
OTHER = "other"  # in place of a route, for addresses that there are none at

# Each route, and the address that takes its place.
SUCCESSORS: Mapping[str, str] = {
    "/api/scan/execute": "/v1/scans",
    "/api/operation/execute": "/v1/scans",
    "/api/scan/status": "/v1/scans",
    "/api/scan/status/{id}": "/v1/scans/{id}",
    "/api/scan/results/{id}": "/v1/scans/{id}/matches",
    "/api/scan/list": "/v1/scans",
    "/api/scans/{id}": "/v1/scans/{id}",
    "/api/scan/progress/{id}": "/v1/ws?scan={id}",
    "/api/health": "/v1/performance",
    "/api/performance": "/v1/performance",
}
ROUTES = (*SUCCESSORS, OTHER)
# These hold an answer back on purpose; how long they take says nothing of how fast the server is.
_WAITING = frozenset({"/api/scan/execute"})


class Deprecated:
    """Puts `Deprecation` (RFC 9745) and `Link: …; rel="successor-version"` (RFC 5829) on every answer under /api,
    refusals and handshakes too, and counts the calls.

    It goes around everything else, so that no layer can answer without it. `get_metrics` is first called when the
    service runs.
    """

    def __init__(self, app: ASGIApp, get_metrics: Callable[[], Metrics]) -> None:
        self.app = app
        self._get_metrics = get_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not scope["path"].startswith(PREFIX):
            await self.app(scope, receive, send)
            return
        route, successor = find_successor(scope["path"])
        fields = [
            (b"deprecation", b"@%d" % SINCE),
            (b"link", f'<{successor}>; rel="successor-version"'.encode()),
        ]
        metrics, began = self._get_metrics(), time.monotonic()
        metrics.count_legacy_call(route)

        async def send_marked(message: Message) -> None:
            if message["type"] in _HEADS:
                if scope["type"] == "http" and route not in _WAITING:
                    metrics.note_legacy_answer(time.monotonic() - began)
                message["headers"] = [*message.get("headers", ()), *fields]
            await send(message)

        await self.app(scope, receive, send_marked)


_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEADS = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})


def find_successor(path: str) -> tuple[str, str]:
    """The route that a path belongs to, and what takes the place of this very address."""
    if path in SUCCESSORS:
        return path, SUCCESSORS[path]
    head, _, id_ = path.rpartition("/")
    route = f"{head}/{{id}}"
    if route not in SUCCESSORS:
        return OTHER, "/v1/scans"
    return route, SUCCESSORS[route].replace("{id}", id_ if _ID.fullmatch(id_) else "ID")
