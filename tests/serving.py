"""A real server on a loopback port, inside the test's own event loop."""

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette

from app.api.service import Service
from app.application import create_app
from app.core.settings import Settings
from app.push.wire import HttpConnection, WebSocketConnection

# No test is about these unless it says so.
GENEROUS = {
    "submit_per_min": 100_000,
    "submit_heavy_per_hour": 100_000,
    "read_per_s": 100_000,
    "read_burst": 100_000,
    "connect_per_s": 100_000,
    "connect_burst": 100_000,
    "message_per_s": 100_000,
    "message_burst": 100_000,
    "legacy_execute_per_min": 100_000,
    "max_active_per_client": 1000,
    "max_queued": 1000,
    "max_streams_per_client": 1000,
    "drain_s": 1,
    "workers": 1,  # each takes half a second to load; who needs more says so
}

# Whether frames are written straight to the transport, or through any ASGI server's `send`; see `both_paths`.
IS_WIRED = [True]


@dataclass(frozen=True, slots=True)
class Serving:
    url: str
    service: Service
    http: httpx.AsyncClient

    async def submit(self, scanner: str = "gap-up", /, *, headers: dict[str, str] | None = None, **params: Any) -> Any:
        """The snapshot of a scan that runs for itself."""
        answer = await self.http.post(
            "/v1/scans", json={"scanner": scanner, "params": params, "reuse": "never"}, headers=headers
        )
        assert answer.status_code in (200, 202), answer.text
        return answer.json()

    async def finish(self, scan_id: str) -> Any:
        """The snapshot of a scan once it has ended."""
        async with asyncio.timeout(30):
            async with self.http.stream(
                "GET", f"/v1/scans/{scan_id}/events", headers={"Accept": "application/x-ndjson"}
            ) as stream:
                async for _ in stream.aiter_lines():
                    pass
        return (await self.http.get(f"/v1/scans/{scan_id}")).json()


@dataclass(frozen=True, slots=True)
class Tls:
    certificate: Path
    key: Path

    def make_context(self) -> ssl.SSLContext:
        """What a client needs to trust this server."""
        return ssl.create_default_context(cafile=self.certificate)


def find_state(app: Any) -> Any:
    """The state of the Starlette application that is wrapped in there."""
    while not isinstance(app, Starlette):
        app = getattr(app, "app", None) or app._security
    return app.state


@contextlib.asynccontextmanager
async def run_uvicorn(app: Any, listener: socket.socket, **options: Any) -> AsyncIterator[uvicorn.Server]:
    """uvicorn serves this application, in the test's own loop, until the block is left."""
    server = uvicorn.Server(uvicorn.Config(app, **options))
    # Tests send no signals to themselves; the handlers of the test runner stay.
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    serving = asyncio.create_task(server.serve([listener]))
    try:
        async with asyncio.timeout(30):
            while not server.started:
                if serving.done():
                    serving.result()
                    raise RuntimeError("the server did not start")
                await asyncio.sleep(0.01)
        yield server
    finally:
        server.should_exit = True
        await serving


@contextlib.asynccontextmanager
async def serve(
    state_dir: Path,
    prices: Path,
    *,
    port: int = 0,
    send_buffer: int | None = None,
    tls: Tls | None = None,
    clock: Callable[[], float] = time.monotonic,
    wrap: Callable[[Any], Any] = lambda app: app,
    keep_alive_s: int = 5,
    **settings: Any,
) -> AsyncIterator[Serving]:
    """Serves until the block is left, then stops in an orderly way. Limits and sessions go by `clock`.

    `wrap` puts something around the application. With `send_buffer` the kernel holds no more than about so many bytes
    for each peer, so that one which stops reading is noticed soon.
    """
    app = wrap(create_app(Settings(state_dir=state_dir, prices=prices, **(GENEROUS | settings)), clock=clock))
    state = find_state(app)
    # With its protocol named, asyncio sends small answers at once.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        url = f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
        options: dict[str, Any] = {"http": HttpConnection, "ws": WebSocketConnection} if IS_WIRED[0] else {}
        if tls is not None:
            options |= {"ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
        options |= {"lifespan": "on", "log_level": "warning", "ws_per_message_deflate": False, "ws_ping_interval": None}
        options |= {"timeout_graceful_shutdown": 5, "timeout_keep_alive": keep_alive_s}
        async with run_uvicorn(app, listener, **options):
            limits = httpx.Limits(max_connections=500)
            verify = True if tls is None else tls.make_context()
            try:
                async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30, verify=verify) as http:
                    yield Serving(url, state.service, http)
            finally:
                state.service.hub.parting.say_at_once(0)
