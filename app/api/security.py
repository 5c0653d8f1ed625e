"""Who asks, and whether they may: the first thing that sees a request, before any route.

Written as pure ASGI (a `BaseHTTPMiddleware` would hide disconnects from the streams). `protect` puts the parts around
an application in the right order.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from hmac import compare_digest
from ipaddress import ip_network
from typing import NamedTuple

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.addresses import client_address, client_key, parse_address
from app.api.problems import refuse
from app.core.errors import Forbidden, InvalidRequest, KeyRequired, ScanwireError, TooLarge
from app.core.settings import Settings, hash_key

# A browser cannot set headers on a WebSocket, and query strings are logged: the key travels as a subprotocol.
KEY_SUBPROTOCOL = "scanwire.key."
OPERATIONS = ("/v1/operations", "/v1/diagnosis")

# On every answer.
DATA_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
# On what a browser may show as a page or run as a script: text of any kind.
PAGE_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    *DATA_HEADERS[:1],
    # Holds for `no-cors` requests alone (an <img> or <script> elsewhere), so it takes nothing from allowed origins.
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    ),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
# What a page of another, allowed origin may send and may read.
CORS_REQUEST_HEADERS = (
    "Authorization",
    "X-API-Key",
    "Idempotency-Key",
    "Last-Event-ID",
    "Prefer",
    "If-None-Match",
    "Producer-Seq",
)
CORS_RESPONSE_HEADERS = ("Location", "ETag", "Retry-After", "RateLimit", "RateLimit-Policy")

# Signs that a request came through a proxy.
_PROXY_FIELDS = (b"x-forwarded-for", b"x-real-ip", b"forwarded", b"via")
_WANTED = frozenset(
    (
        b"host",
        b"origin",
        b"accept",
        b"authorization",
        b"x-api-key",
        b"sec-fetch-site",
        b"sec-websocket-protocol",
        *_PROXY_FIELDS,
    )
)
_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::[0-9]{1,5})?")
_HOST_CHARS = 300


class ApiKey(NamedTuple):
    name: str
    digest: bytes
    is_operator: bool


class Security:
    """Refuses who may not ask, and names who may: `scope["state"]["client"]`.

    In this order, each refusal being a problem that says what to do next:

    - **Host** must be in `allowed_hosts` (400), which stops DNS rebinding. /healthz and /readyz answer under any
      name, since probes ask by address.
    - **Origin**: a WebSocket of a browser must come from the server's own pages or `allowed_origins` (403). So must
      whatever changes state or opens a stream: by Sec-Fetch-Site, else by Origin. Who sends neither is no browser.
    - **Key**: with `api_keys` set, one is necessary everywhere but on /, /scans/{id}, /static, /healthz and /readyz
      (401), where keys are not looked at. If any key is set, a wrong one is refused rather than ignored. It travels as
      `Authorization: Bearer KEY`, `X-API-Key: KEY` or, for WebSockets, as one more subprotocol `scanwire.key.KEY`.
    - **/v1/operations** and /v1/diagnosis need an operator key (403). When no key at all is set, they are open to a
      loopback peer that asks by a loopback name and does not come through a proxy.

    `own_token(method, path)` is True where the endpoint checks a bearer token of its own, such as a producer's: there
    no API key is asked for, and a bearer token that is no API key is passed on.

    Every HTTP response but a 304 gets DATA_HEADERS, or PAGE_HEADERS if it is text, except for those it sets itself.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, own_token: Callable[[str, str], bool] = lambda method, path: False
    ) -> None:
        self.app = app
        self._own_token = own_token
        self._trusted = tuple(ip_network(network) for network in settings.trusted_proxies)
        self._hosts = frozenset(_host_name(host) or _host_name(f"[{host}]") or host for host in settings.allowed_hosts)
        self._suffixes = tuple(host[1:].lower() for host in self._hosts if host.startswith("*."))
        self._origins = frozenset(origin.lower().rstrip("/") for origin in settings.allowed_origins)
        self._keys = tuple(
            ApiKey(name, digest.lower().encode(), is_operator)
            for entries, is_operator in ((settings.operator_keys, True), (settings.api_keys, False))
            for name, _, digest in (entry.rpartition(":") for entry in entries)
        )
        self._is_key_necessary = bool(settings.api_keys)
        self._has_operator_keys = bool(settings.operator_keys)
        self._is_host_allowed = lru_cache(maxsize=256)(self._compare_host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "http":
            send = add_security_headers(send)
        try:
            self.admit(scope)
        except ScanwireError as error:
            await refuse(error, scope, receive, send)
            return
        await self.app(scope, receive, send)

    def admit(self, scope: Scope) -> None:
        """Names the client in the scope, for an endpoint. Raises what refuses it."""
        scope["state"] = {**scope.get("state", {}), "client": self.check(scope)}
        if scope.get("subprotocols"):
            # An endpoint that echoes subprotocols must not echo the key.
            scope["subprotocols"] = [p for p in scope["subprotocols"] if not p.startswith(KEY_SUBPROTOCOL)]

    def check(self, scope: Scope) -> str:
        """The client that a request is charged to. Raises what refuses it."""
        fields, path = _pick_fields(scope), _route_path(scope)
        self._check_host(path, fields)
        self._check_origin(scope, path, fields)
        return client_key(client_address(scope, self._trusted), self._check_key(scope, path, fields))

    # Host

    def _check_host(self, path: str, fields: Mapping[bytes, str]) -> None:
        host = fields.get(b"host", "")
        if len(host) <= _HOST_CHARS and self._is_host_allowed(host):
            return
        if path in ("/healthz", "/readyz"):
            return
        raise InvalidRequest(
            f"This server does not answer under the name {host[:100]!r}. "
            "Use one of its own names, or have it added to SCANWIRE_ALLOWED_HOSTS."
        )

    def _compare_host(self, host: str) -> bool:
        if "*" in self._hosts:
            return True
        name = _host_name(host)
        return name is not None and (name in self._hosts or name.endswith(self._suffixes))

    # Origin

    def _check_origin(self, scope: Scope, path: str, fields: Mapping[bytes, str]) -> None:
        origin, site = fields.get(b"origin"), fields.get(b"sec-fetch-site")
        if origin is None and site is None:
            return
        if scope["type"] == "http":
            is_stream = path.endswith("/events") or "text/event-stream" in fields.get(b"accept", "").lower()
            if scope["method"] in _SAFE_METHODS and not (is_stream and scope["method"] == "GET"):
                return
            if site in ("same-origin", "none"):
                return
        elif origin is None:
            return
        else:
            # Browsers have sent Origin on every handshake from the first day on; Sec-Fetch-Site is young.
            site = None
        if site is None and _is_own_origin(origin, fields.get(b"host")):
            return
        if origin is not None and ("*" in self._origins or origin.lower() in self._origins):
            return
        raise Forbidden(
            f"Pages of {(origin or 'another site')[:100]!r} may not do this here. "
            "Have their origin added to SCANWIRE_ALLOWED_ORIGINS, or ask without a browser."
        )

    # Key

    def _check_key(self, scope: Scope, path: str, fields: Mapping[bytes, str]) -> str | None:
        """The name of the key, if one came."""
        key = self._find_offered(scope, path, fields) if self._keys else None
        if path.startswith(OPERATIONS):
            self._check_operator(scope, fields, key)
        return key.name if key else None

    def _find_offered(self, scope: Scope, path: str, fields: Mapping[bytes, str]) -> ApiKey | None:
        offered = _offered_key(scope, fields)
        key = self._find_key(offered) if offered else None
        own_token = scope["type"] == "http" and self._own_token(scope["method"], path)
        if key is None and not own_token and not _is_public(path):
            if offered:
                raise KeyRequired("This API key is not known here. Check it, or ask who runs the server for one.")
            if self._is_key_necessary or (self._has_operator_keys and path.startswith(OPERATIONS)):
                raise KeyRequired(
                    "Send an API key as `Authorization: Bearer KEY` or `X-API-Key: KEY`, "
                    f"or as the WebSocket subprotocol `{KEY_SUBPROTOCOL}KEY`."
                )
        return key

    def _check_operator(self, scope: Scope, fields: Mapping[bytes, str], key: ApiKey | None) -> None:
        if self._has_operator_keys:
            if key is None or not key.is_operator:
                raise Forbidden("This needs an operator key.")
        elif self._is_key_necessary:
            raise Forbidden("This needs an operator key, and none is set: add one to SCANWIRE_OPERATOR_KEYS.")
        elif not _is_loopback(scope, fields):
            raise Forbidden(
                "This is open on the server's own machine alone; set SCANWIRE_OPERATOR_KEYS to open it to others."
            )

    def _find_key(self, offered: str) -> ApiKey | None:
        digest = hash_key(offered).encode()
        found = None
        # All are compared, each in constant time, so that the time taken tells nothing about any of them.
        for key in self._keys:
            if compare_digest(key.digest, digest) and found is None:
                found = key
        return found


class BodyLimit:
    """Refuses a request body over its bound: at once by its Content-Length, else when it has grown too long.

    `max_bytes(method, path)` is the bound, in bytes.

    The second is raised as TooLarge from `receive`, inside the handler that reads the body, so PROBLEMS answers it.
    (Starlette's own RequestBodyLimitMiddleware answers in plain text, and early 1.x has none.)
    """

    def __init__(self, app: ASGIApp, max_bytes: Callable[[str, str], int]) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        max_bytes = self.max_bytes(scope["method"], _route_path(scope))
        for name, value in scope["headers"]:
            if name == b"content-length":
                # int() refuses thousands of digits, and no body is as long as 20 of them say.
                if value.isdigit() and (len(value) > 20 or int(value) > max_bytes):
                    await refuse(_too_large(max_bytes), scope, receive, send)
                    return
                break
        if scope["method"] in ("GET", "HEAD"):
            # Nothing reads a body there; a stream listens in `receive` for its peer to leave.
            await self.app(scope, receive, send)
            return
        received = 0

        async def receive_counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > max_bytes:
                raise _too_large(max_bytes)
            return message

        await self.app(scope, receive_counting, send)


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"A request body may have {max_bytes} bytes. Send less.", max_bytes=max_bytes)


def protect(
    app: ASGIApp,
    settings: Settings,
    own_token: Callable[[str, str], bool] = lambda method, path: False,
    shortcut: Callable[[Security], ASGIApp] = lambda security: security,
) -> ASGIApp:
    """`app` behind everything of this module, outermost first: CORS (if any origin is allowed), Security, BodyLimit.

    It goes around the whole Starlette application, so that even its last-resort 500 carries these headers. CORS is
    outermost because a preflight carries no key, and because a page must be able to read why it was refused.
    `shortcut` may answer some requests itself, once `Security.check` let them through.
    """

    def max_body_bytes(method: str, path: str) -> int:
        # Where a producer posts, it posts much.
        return settings.max_events_body_bytes if own_token(method, path) else settings.max_body_bytes

    app = shortcut(Security(BodyLimit(app, max_body_bytes), settings, own_token))
    if not settings.allowed_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=[origin.lower().rstrip("/") for origin in settings.allowed_origins],
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=CORS_REQUEST_HEADERS,
        expose_headers=CORS_RESPONSE_HEADERS,
    )


def add_security_headers(send: Send) -> Send:
    """A `send` that puts DATA_HEADERS or PAGE_HEADERS on the answer, as its type asks for."""

    # A 304 has no type, and a browser takes its fields for those of what it has kept: they stay.
    async def send_secured(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] != 304:
            headers = message.get("headers", ())
            present = dict(headers)
            added = PAGE_HEADERS if present.get(b"content-type", b"").startswith(b"text/") else DATA_HEADERS
            message["headers"] = [*headers, *[field for field in added if field[0] not in present]]
        await send(message)

    return send_secured


def _pick_fields(scope: Scope) -> dict[bytes, str]:
    """The header fields that matter here. One that came twice is joined, so it equals nothing that is allowed."""
    fields: dict[bytes, str] = {}
    for name, value in scope["headers"]:
        if name in _WANTED:
            text = value.decode("latin-1")
            fields[name] = f"{fields[name]}, {text}" if name in fields else text
    return fields


def _route_path(scope: Scope) -> str:
    """The path as the router sees it: without `root_path`, which a proxy's prefix is."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("/", ""):
        return path[len(root) :]
    return path


def _is_public(path: str) -> bool:
    """A page that asks for a key must itself load without one, and probes have none."""
    return path in ("/", "", "/healthz", "/readyz", "/static") or path.startswith(("/static/", "/scans/"))


def _host_name(host: str) -> str | None:
    """The name in a Host field, in lower case, without port and final dot; None for garbage."""
    match = _HOST.fullmatch(host.lower())
    if match is None:
        return None
    name = match[1]
    if name.startswith("["):
        address = parse_address(name)
        return None if address is None else f"[{address}]"
    return name.removesuffix(".")


def _is_own_origin(origin: str | None, host: str | None) -> bool:
    """Whether a page of this server sent it: host and port are those of the Host field, whatever the scheme."""
    if not origin or not host:
        return False
    scheme, separator, place = origin.lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    return bool(separator) and port is not None and place.removesuffix(port) == host.lower().removesuffix(port)


def _offered_key(scope: Scope, fields: Mapping[bytes, str]) -> str | None:
    """The API key that came with a request. Another scheme, such as a proxy's Basic, is none."""
    scheme, _, token = fields.get(b"authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    if b"x-api-key" in fields:
        return fields[b"x-api-key"].strip()
    if scope["type"] == "websocket":
        for protocol in fields.get(b"sec-websocket-protocol", "").split(","):
            if protocol.strip().startswith(KEY_SUBPROTOCOL):
                return protocol.strip().removeprefix(KEY_SUBPROTOCOL)
    return None


def _is_loopback(scope: Scope, fields: Mapping[bytes, str]) -> bool:
    """Whether the peer is on this machine and speaks for itself.

    A proxy on this machine speaks for anyone, and so does a browser whose page was rebound to this address: both show
    in the header fields, the second by another name in Host.
    """
    peer = scope.get("client")
    address = parse_address(peer[0]) if peer else None
    if address is None or not address.is_loopback:
        return False
    host = _host_name(fields.get(b"host", "")) or ""
    named = parse_address(host)
    if host != "localhost" and not (named and named.is_loopback):
        return False
    return fields.keys().isdisjoint(_PROXY_FIELDS)
