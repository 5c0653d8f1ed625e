"""The rules of who may ask: over real ASGI calls, with no server and no test client in between."""

import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from app.api.addresses import client_address, client_key
from app.api.problems import PROBLEMS, close_reason, problem_response
from app.api.security import DATA_HEADERS, Security, protect
from app.core.errors import RateLimited, ScanwireError, TooLarge, WrongState
from app.core.settings import Settings, hash_key

KEY, OPERATOR_KEY = "k-of-anna", "k-of-the-operator"
KEYS = {"api_keys": f"anna:{hash_key(KEY)}", "operator_keys": f"ops:{hash_key(OPERATOR_KEY)}"}
PROXIES = "10.0.0.0/8, 2001:db8:ff::/48"


def make_settings(**values: Any) -> Settings:
    return Settings.model_validate(values)


async def tell_client(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers with what Security found out."""
    if scope["type"] == "http":
        await JSONResponse(scope["state"])(scope, receive, send)
    else:
        await receive()
        await send({"type": "websocket.accept", "state": scope["state"], "subprotocols": scope["subprotocols"]})


def connect(app: ASGIApp, peer: tuple[str, int] | None = ("127.0.0.1", 1)) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=peer)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:8000")


async def ask(
    path: str, *, method: str = "GET", peer: str = "203.0.113.9", settings: Any = None, **headers: str
) -> Any:
    app = Security(tell_client, make_settings(**(settings or {})))
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    async with connect(app, (peer, 1)) as client:
        return await client.request(method, path, headers=fields)


async def handshake(headers: dict[str, str], settings: Any = None, extensions: Sequence[str] = ()) -> list[Message]:
    """What a server would send on a WebSocket handshake with these header fields."""
    fields = {"host": "localhost:8000", **headers}
    protocols = [p.strip() for p in fields.get("sec-websocket-protocol", "").split(",") if p.strip()]
    headers_in = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
    offered: Scope = {name: {} for name in extensions}
    scope = make_scope("websocket", "/v1/ws", headers_in, subprotocols=protocols, extensions=offered)
    return await call(Security(tell_client, make_settings(**(settings or {}))), scope)


def make_scope(kind: str, path: str, headers: list[tuple[bytes, bytes]], **more: Any) -> Scope:
    scope: Scope = {"type": kind, "path": path, "headers": headers, "client": ("203.0.113.9", 1), "query_string": b""}
    if kind == "http":
        scope["method"] = "GET"
    else:
        scope["subprotocols"] = []
    scope.update(more)
    return scope


async def call(app: ASGIApp, scope: Scope) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        if scope["type"] == "websocket":
            return {"type": "websocket.connect"}
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def check_problem(response: Any, status: int, *words: str) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    for word in words:
        assert word in problem["detail"]
    return problem


# Who the client is


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("1.2.3.4", "ip:1.2.3.4"),
        ("2001:db8:1:2:3:4:5:6", "ip:2001:db8:1:2::/64"),
        ("2001:DB8:1:2::1", "ip:2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "ip:2001:db8:1:3::/64"),
        ("::1", "ip:::/64"),
        ("::ffff:1.2.3.4", "ip:1.2.3.4"),
        ("::ffff:102:304", "ip:1.2.3.4"),
        ("fe80::1%eth0", "ip:fe80::/64"),
        ("local", "local"),
        ("not an address", "local"),
    ],
)
def test_a_client_is_its_address_and_ipv6_counts_by_64(address: str, key: str) -> None:
    assert client_key(address) == key


def test_an_api_key_is_the_client_wherever_it_comes_from() -> None:
    assert client_key("1.2.3.4", "anna") == client_key("2001:db8::1", "anna") == "key:anna"


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("203.0.113.9", ["1.2.3.4"], "203.0.113.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4, 10.9.9.9"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6", "1.2.3.4", "10.9.9.9"], "1.2.3.4"),
        ("10.0.0.1", ["10.2.2.2, 10.3.3.3"], "10.2.2.2"),
        ("10.0.0.1", ["1.2.3.4, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4, , 10.3.3.3"], "10.3.3.3"),
        ("10.0.0.1", ["1.2.3.4:5678"], "1.2.3.4"),
        ("10.0.0.1", ["1.2.3.4:port"], "10.0.0.1"),
        ("10.0.0.1", ["[2001:db8::7]:443"], "2001:db8::7"),
        ("10.0.0.1", ["2001:db8::7"], "2001:db8::7"),
        ("::ffff:10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("2001:db8:ff::1", ["::ffff:1.2.3.4"], "1.2.3.4"),
        ("2001:db8:fe::1", ["1.2.3.4"], "2001:db8:fe::1"),
        ("10.0.0.1", ["9" * 5000], "10.0.0.1"),
    ],
)
def test_x_forwarded_for_is_believed_as_far_as_trusted_proxies_wrote_it(
    peer: str, forwarded: list[str], address: str
) -> None:
    networks = Security(tell_client, make_settings(trusted_proxies=PROXIES))._trusted
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    assert client_address({"client": (peer, 1), "headers": headers}, networks) == address


@pytest.mark.parametrize("peer", [None, ("", 0), ("/run/scanwire.sock", 0)])
def test_a_unix_socket_is_local_whatever_it_forwards(peer: Any) -> None:
    networks = Security(tell_client, make_settings(trusted_proxies="0.0.0.0/0"))._trusted
    assert client_address({"client": peer, "headers": [(b"x-forwarded-for", b"1.2.3.4")]}, networks) == "local"


async def test_the_client_is_put_beside_the_lifespan_state() -> None:
    lifespan = {"service": "kept"}
    scope = make_scope("http", "/", [(b"host", b"localhost")], state=lifespan)
    sent = await call(Security(tell_client, make_settings()), scope)
    expected = {"service": "kept", "client": "ip:203.0.113.9"}
    assert json.loads(sent[1]["body"]) == expected
    assert lifespan == {"service": "kept"}


# Host


@pytest.mark.parametrize(
    ("allowed", "host", "is_served"),
    [
        ("localhost", "localhost:8000", True),
        ("localhost", "LocalHost.", True),
        ("localhost", "evil.example", False),
        ("localhost", "localhost.evil.example", False),
        ("localhost", "localhost:8000:1", False),
        ("localhost", "localhost, evil.example", False),
        ("localhost", "", False),
        ("[::1]", "[::1]:8000", True),
        ("::1", "[0:0:0:0:0:0:0:1]", True),
        ("[::1]", "[::2]", False),
        ("scan.example.org:443", "scan.example.org", True),
        ("*.example.org", "a.b.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "badexample.org", False),
        ("*", "whatever.example", True),
        ("*", "", True),
    ],
)
async def test_a_host_is_served_if_it_is_allowed(allowed: str, host: str, is_served: bool) -> None:
    response = await ask("/v1/scans", settings={"allowed_hosts": allowed}, host=host)
    if is_served:
        assert response.status_code == 200
    else:
        check_problem(response, 400, repr(host), "SCANWIRE_ALLOWED_HOSTS")


async def test_two_host_fields_are_refused() -> None:
    scope = make_scope("http", "/", [(b"host", b"localhost"), (b"host", b"localhost")])
    sent = await call(Security(tell_client, make_settings()), scope)
    assert sent[0]["status"] == 400


async def test_probes_are_answered_under_any_name() -> None:
    assert (await ask("/healthz", host="10.1.2.3:8000")).status_code == 200
    assert (await ask("/readyz", host="10.1.2.3:8000")).status_code == 200


# Keys


@pytest.mark.parametrize(
    "headers", [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY} "}, {"x_api_key": KEY}]
)
async def test_a_known_key_is_the_client(headers: dict[str, str]) -> None:
    response = await ask("/v1/scans", settings=KEYS, **headers)
    assert response.json() == {"client": "key:anna"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Basic YTpi"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong"},
        {"x_api_key": "wrong"},
        {"x_api_key": hash_key(KEY)},
        {"authorization": "Bearer wrong", "x_api_key": KEY},
    ],
)
async def test_without_a_known_key_nothing_opens_once_keys_are_set(headers: dict[str, str]) -> None:
    response = await ask("/v1/scans", settings=KEYS, **headers)
    check_problem(response, 401, "API key")
    assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("path", ["/", "/scans/s_1", "/static/app.js", "/healthz", "/readyz"])
async def test_the_page_and_the_probes_need_no_key(path: str) -> None:
    assert (await ask(path, settings=KEYS)).status_code == 200
    assert (await ask(path, settings=KEYS, x_api_key="wrong")).status_code == 200


@pytest.mark.parametrize(
    "path", ["/static-not", "/scans-not", "/v1/scans/s_1", "/healthz/x", "/metrics", "/openapi.json", "//"]
)
async def test_everything_else_needs_a_key(path: str) -> None:
    check_problem(await ask("http://localhost" + path, settings=KEYS), 401)


async def test_without_keys_set_a_key_means_nothing() -> None:
    response = await ask("/v1/scans", authorization="Bearer anna")
    assert response.json()["client"] == "ip:203.0.113.9"


async def test_operator_keys_alone_leave_the_scans_open() -> None:
    settings = {"operator_keys": KEYS["operator_keys"]}
    assert (await ask("/v1/scans", settings=settings)).json() == {"client": "ip:203.0.113.9"}
    check_problem(await ask("/v1/scans", settings=settings, x_api_key="wrong"), 401)
    check_problem(await ask("/v1/operations", settings=settings), 401)


async def test_operations_need_an_operator_key() -> None:
    for path in ("/v1/operations", "/v1/operations/reap"):
        check_problem(await ask(path, settings=KEYS, x_api_key=KEY), 403, "operator key")
        response = await ask(path, settings=KEYS, x_api_key=OPERATOR_KEY)
        assert response.json() == {"client": "key:ops"}
        # Being on the same machine is no substitute once there are keys.
        check_problem(await ask(path, settings=KEYS, peer="127.0.0.1", x_api_key=KEY), 403)


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
async def test_without_operator_keys_operations_are_open_on_the_own_machine_alone(peer: str) -> None:
    assert (await ask("/v1/operations", peer=peer)).status_code == 200
    check_problem(await ask("/v1/operations"), 403, "SCANWIRE_OPERATOR_KEYS")


async def test_an_ordinary_key_is_no_operators_even_on_the_own_machine() -> None:
    settings = {"api_keys": KEYS["api_keys"]}
    refused = await ask("/v1/operations", peer="127.0.0.1", settings=settings, x_api_key=KEY)
    check_problem(refused, 403, "operator key", "SCANWIRE_OPERATOR_KEYS")
    check_problem(await ask("/v1/operations", peer="127.0.0.1", settings=settings), 401)


@pytest.mark.parametrize("field", ["x_forwarded_for", "x_real_ip", "forwarded", "via"])
async def test_a_proxy_on_the_own_machine_is_no_operator(field: str) -> None:
    for settings in ({}, {"trusted_proxies": "127.0.0.0/8"}):
        response = await ask("/v1/operations", peer="127.0.0.1", settings=settings, **{field: "127.0.0.1"})
        check_problem(response, 403)


@pytest.mark.parametrize(
    ("host", "status"), [("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("rebound.example", 403)]
)
async def test_the_own_machine_asks_by_a_loopback_name(host: str, status: int) -> None:
    response = await ask("/v1/operations", peer="127.0.0.1", settings={"allowed_hosts": "*"}, host=host)
    assert response.status_code == status


async def test_a_prefix_of_a_proxy_does_not_hide_operations() -> None:
    scope = make_scope("http", "/scan/v1/operations", [(b"host", b"localhost")], root_path="/scan")
    assert (await call(Security(tell_client, make_settings()), scope))[0]["status"] == 403


async def test_where_an_endpoint_checks_its_own_token_none_of_ours_is_asked_for() -> None:
    app = Security(tell_client, make_settings(**KEYS), lambda m, path: m == "POST" and path.endswith("/events"))
    async with connect(app, ("203.0.113.9", 1)) as client:
        token = {"Authorization": "Bearer a-producer-token"}
        assert (await client.post("/v1/scans/s_1/events", headers=token)).json()["client"] == "ip:203.0.113.9"
        check_problem(await client.get("/v1/scans/s_1/events", headers=token), 401)
        check_problem(await client.post("/v1/scans", headers=token), 401)


# Origin


@pytest.mark.parametrize(
    ("method", "path", "accept"),
    [
        ("POST", "/v1/scans", "*/*"),
        ("DELETE", "/v1/scans/s_1", "*/*"),
        ("GET", "/v1/scans/s_1/events", "*/*"),
        ("GET", "/v1/watch", "Text/Event-Stream"),
    ],
)
async def test_pages_of_other_sites_change_nothing_and_open_no_stream(method: str, path: str, accept: str) -> None:
    async def status(settings: Any = None, **headers: str) -> int:
        response = await ask(path, method=method, settings=settings, accept=accept, **headers)
        return int(response.status_code)

    assert await status() == 200
    assert await status(sec_fetch_site="same-origin", origin="http://localhost:8000") == 200
    assert await status(sec_fetch_site="none") == 200
    assert await status(sec_fetch_site="cross-site", origin="https://evil.example") == 403
    assert await status(sec_fetch_site="cross-site") == 403
    assert await status(sec_fetch_site="same-site", origin="http://localhost:3000") == 403
    assert await status(sec_fetch_site="garbage") == 403
    # Browsers without Sec-Fetch-Site send Origin on what matters.
    assert await status(origin="https://evil.example") == 403
    assert await status(origin="null") == 403
    assert await status(origin="http://localhost:8000") == 200
    allowed = {"allowed_origins": "https://Friend.example/"}
    assert await status(allowed, sec_fetch_site="cross-site", origin="https://friend.example") == 200
    assert await status(allowed, sec_fetch_site="cross-site", origin="https://friend.example.evil") == 403
    assert await status({"allowed_origins": "*"}, sec_fetch_site="cross-site", origin="https://any.example") == 200


async def test_a_link_from_another_site_may_read_a_page() -> None:
    assert (await ask("/", sec_fetch_site="cross-site")).status_code == 200
    assert (await ask("/v1/scans/s_1", sec_fetch_site="cross-site")).status_code == 200


async def test_a_refused_page_is_told_the_setting() -> None:
    response = await ask("/v1/scans", method="POST", sec_fetch_site="cross-site", origin="https://evil.example")
    check_problem(response, 403, "https://evil.example", "SCANWIRE_ALLOWED_ORIGINS")


# WebSocket


@pytest.mark.parametrize(
    ("origin", "host", "is_accepted"),
    [
        (None, "localhost:8000", True),
        ("http://localhost:8000", "localhost:8000", True),
        ("https://localhost:8000", "LOCALHOST:8000", True),
        ("https://localhost", "localhost", True),
        ("https://localhost", "localhost:443", True),
        ("https://localhost:443", "localhost", True),
        ("http://localhost", "localhost:443", False),
        ("http://localhost:3000", "localhost:8000", False),
        ("https://evil.example", "localhost:8000", False),
        ("https://localhost:8000.evil.example", "localhost:8000", False),
        ("null", "localhost:8000", False),
        ("", "localhost:8000", False),
        ("file://", "localhost:8000", False),
        ("https://friend.example", "localhost:8000", True),
    ],
)
async def test_a_websocket_comes_from_an_own_page_an_allowed_one_or_no_browser(
    origin: str | None, host: str, is_accepted: bool
) -> None:
    headers = {"host": host} | ({} if origin is None else {"origin": origin})
    first = (await handshake(headers, {"allowed_origins": "https://friend.example"}))[0]
    if is_accepted:
        assert first["type"] == "websocket.accept"
    else:
        assert (first["type"], first["code"]) == ("websocket.close", 1008)


async def test_a_refused_handshake_gets_a_problem_where_the_server_can_send_one() -> None:
    start, body = await handshake({"origin": "https://evil.example"}, extensions=["websocket.http.response"])
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 403)
    assert (b"content-type", b"application/problem+json") in start["headers"]
    assert json.loads(body["body"])["status"] == 403


async def test_a_websocket_brings_its_key_as_a_subprotocol_that_goes_no_further() -> None:
    (accepted,) = await handshake({"sec-websocket-protocol": f"scanwire.v1, scanwire.key.{KEY}"}, KEYS)
    assert accepted["state"]["client"] == "key:anna"
    assert accepted["subprotocols"] == ["scanwire.v1"]
    (unneeded,) = await handshake({"sec-websocket-protocol": f"scanwire.v1, scanwire.key.{KEY}"})
    assert unneeded["subprotocols"] == ["scanwire.v1"]
    (refused,) = await handshake({"sec-websocket-protocol": "scanwire.v1, scanwire.key.wrong"}, KEYS)
    assert refused["type"] == "websocket.close"
    (refused,) = await handshake({"sec-websocket-protocol": "scanwire.v1"}, KEYS)
    assert "scanwire.key.KEY" in refused["reason"] or "API key" in refused["reason"]
    assert len(refused["reason"].encode()) <= 123


async def test_an_http_request_brings_no_key_as_a_subprotocol() -> None:
    check_problem(await ask("/v1/scans", settings=KEYS, sec_websocket_protocol=f"scanwire.key.{KEY}"), 401)


def test_a_close_reason_is_never_cut_inside_a_character() -> None:
    assert close_reason(ScanwireError("é" * 100)) == "é" * 61


# Garbage

GARBAGE = st.binary(max_size=80) | st.sampled_from([b"", b"[", b"[::", b"://", b"Bearer", b",", b"\xff:80", b"%"])


def check_garbage(garbage: list[bytes], kind: str, settings: Any) -> None:
    seen: list[str] = []

    async def note_client(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"]["client"])
        assert set(scope["state"]) == {"client"}

    names = (b"x-forwarded-for", b"origin", b"authorization", b"sec-fetch-site", b"x-api-key", b"host")
    headers = list(zip(names, garbage, strict=True))
    scope = make_scope(kind, "/v1/scans", [*headers, (b"sec-websocket-protocol", garbage[0])])
    if kind == "http":
        scope["method"] = "POST"
    coroutine = call(Security(note_client, make_settings(allowed_hosts="*", **settings)), scope)
    # Nothing in it waits, so one step runs it to its end.
    with pytest.raises(StopIteration):
        coroutine.send(None)
    assert seen in ([], ["ip:203.0.113.9"])


@given(st.lists(GARBAGE, min_size=6, max_size=6), st.sampled_from(["http", "websocket"]), st.booleans())
def test_no_garbage_raises_or_lets_an_untrusted_peer_choose_its_client(
    garbage: list[bytes], kind: str, has_keys: bool
) -> None:
    check_garbage(garbage, kind, {"trusted_proxies": PROXIES} | (KEYS if has_keys else {}))


@given(st.lists(GARBAGE | st.ip_addresses().map(lambda ip: str(ip).encode()), max_size=5))
def test_a_trusted_proxy_that_forwards_garbage_still_yields_an_address(entries: list[bytes]) -> None:
    networks = Security(tell_client, make_settings(trusted_proxies=PROXIES))._trusted
    scope = {"client": ("10.0.0.1", 1), "headers": [(b"x-forwarded-for", b", ".join(entries))]}
    assert client_key(client_address(scope, networks)).startswith("ip:")


@given(st.binary(max_size=400))
def test_no_garbage_is_an_allowed_host(garbage: bytes) -> None:
    app = Security(tell_client, make_settings(allowed_hosts="scan.example.org"))
    if garbage.lower().removesuffix(b".").split(b":")[0] != b"scan.example.org":
        assert not app._is_host_allowed(garbage.decode("latin-1"))


# What every response carries


async def test_every_http_response_carries_the_security_headers() -> None:
    for response in (await ask("/"), await ask("/", host="evil.example"), await ask("/v1/operations")):
        for name, value in DATA_HEADERS:
            assert response.headers[name.decode()] == value.decode()


async def test_a_response_may_set_its_own_policy() -> None:
    own = Response(headers={"Content-Security-Policy": "default-src 'self'"})
    async with connect(Security(own, make_settings())) as client:
        response = await client.get("/")
    assert response.headers.get_list("content-security-policy") == ["default-src 'self'"]


async def test_an_allowed_origin_may_read_answers_and_refusals() -> None:
    app = protect(tell_client, make_settings(allowed_origins="https://friend.example", **KEYS))
    headers = {"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site"}
    async with connect(app) as client:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "idempotency-key"}
        preflight = await client.options("/v1/scans", headers=headers | asked)
        assert preflight.status_code == 200
        assert "POST" in preflight.headers["access-control-allow-methods"]
        for response in (preflight, await client.get("/v1/scans", headers=headers)):
            assert response.headers["access-control-allow-origin"] == "https://friend.example"
        assert response.status_code == 401
        assert "Retry-After" in response.headers["access-control-expose-headers"]
        stranger = await client.get("/v1/scans", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers


# Bodies and problems


async def read_body(request: Request) -> Response:
    return Response(await request.body())


async def fail(request: Request) -> Response:
    raise {
        "bug": RuntimeError("secret /etc/passwd"),
        "state": WrongState("queued -> running -> queued"),
        "limited": RateLimited("Wait.", retry_after_s=0.25, headers={"RateLimit": "x"}, limit="read"),
        "left": ClientDisconnect(),
        "teapot": HTTPException(418),
        "words": HTTPException(403, "Not on Sundays."),
        "empty": HTTPException(304),
    }[request.path_params["how"]]


async def fail_after_accept(websocket: WebSocket) -> None:
    await websocket.accept()
    raise TooLarge("The message is too large.")


def make_service(max_body_bytes: int = 1000) -> ASGIApp:
    routes = [
        Route("/body", read_body, methods=["POST"]),
        Route("/fail/{how}", fail),
        WebSocketRoute("/v1/ws", fail_after_accept),
    ]
    return protect(Starlette(routes=routes, exception_handlers=PROBLEMS), make_settings(max_body_bytes=max_body_bytes))


async def chunks(number: int, ends: list[bool]) -> AsyncIterator[bytes]:
    for _ in range(number):
        yield b"x" * 100
    ends.append(True)


async def test_a_body_over_the_bound_is_refused_by_its_declared_length_and_by_what_came() -> None:
    async with connect(make_service()) as client:
        assert len((await client.post("/body", content=b"x" * 1000)).content) == 1000
        check_problem(await client.post("/body", content=b"x" * 1001), 413, "1000 bytes")
        assert len((await client.post("/body", content=chunks(10, []))).content) == 1000
        ends: list[bool] = []
        check_problem(await client.post("/body", content=chunks(30, ends)), 413, "1000 bytes")
        assert ends == []
        check_problem(await client.post("/body", headers={"Content-Length": "9" * 5000}), 413)
        check_problem(await client.get("/fail/limited", headers={"Content-Length": "1001"}), 413)


async def test_no_route_and_a_wrong_method_are_problems_that_say_what_there_is() -> None:
    async with connect(make_service()) as client:
        check_problem(await client.get("/nowhere"), 404, "/nowhere", "/openapi.json")
        response = await client.get("/body")
        check_problem(response, 405, "POST")
        assert response.headers["allow"] == "POST"


async def test_a_refusal_keeps_its_exact_wait_in_the_body_and_whole_seconds_in_the_header() -> None:
    async with connect(make_service()) as client:
        response = await client.get("/fail/limited")
    problem = check_problem(response, 429)
    assert problem["retry_after_s"] == 0.25
    assert problem["limit"] == "read"
    assert response.headers["retry-after"] == "1"
    assert response.headers["ratelimit"] == "x"
    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(("wait_s", "header"), [(0.0, "1"), (1.0, "1"), (29.001, "30"), (None, None)])
def test_retry_after_is_rounded_up_and_at_least_one(wait_s: float | None, header: str | None) -> None:
    assert problem_response(RateLimited("Wait.", retry_after_s=wait_s)).headers.get("retry-after") == header


@pytest.mark.parametrize("how", ["bug", "state"])
async def test_a_bug_shows_an_incident_that_the_log_explains(how: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "scanwire.api"):
        async with connect(make_service()) as client:
            response = await client.get(f"/fail/{how}")
    problem = check_problem(response, 500)
    assert "passwd" not in response.text
    assert "queued" not in response.text
    (record,) = caplog.records
    assert record.__dict__["incident"] == problem["incident"]
    assert problem["incident"] in problem["detail"]
    assert record.exc_info
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_other_http_exceptions_keep_their_status_and_words() -> None:
    async with connect(make_service()) as client:
        assert check_problem(await client.get("/fail/teapot"), 418)["type"] == "about:blank"
        check_problem(await client.get("/fail/words"), 403, "Not on Sundays.")
        assert (await client.get("/fail/empty")).status_code == 304


async def test_a_client_that_left_is_no_incident(caplog: pytest.LogCaptureFixture) -> None:
    async with connect(make_service()) as client:
        await client.get("/fail/left")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_an_error_on_an_open_websocket_closes_it_with_its_code() -> None:
    sent = await call(make_service(), make_scope("websocket", "/v1/ws", [(b"host", b"localhost")]))
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.close"]
    assert sent[1]["code"] == 1009
