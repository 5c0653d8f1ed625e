"""`scanwire serve`: runs the server in this process, on a socket of its own, and says why when it cannot start."""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import textwrap
from collections.abc import Awaitable, Callable
from functools import partial
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.service import Service
from app.application import create_app
from app.commands.environment import CommandFailed, read_settings
from app.commands.holder import LOCK_NAME, name_port_holder, refuse_if_held, take_over
from app.core.errors import ScanwireError
from app.core.scan import SYNTHETIC_MARK
from app.core.settings import Settings
from app.log.lock import StateLock
from app.market.store import Store
from app.observe.logs import configure_logging
from app.push.wire import HttpConnection, WebSocketConnection

BACKLOG = 2048
TICK_S = 1  # how often the Date of answers is renewed
LOOPBACK = ("127.0.0.1", "::1", "localhost")
logger = logging.getLogger(__name__)


def run_server(host: str, port: int, prices: str | None, state_dir: str | None, *, takes_over: bool = False) -> None:
    """Serves until SIGINT or SIGTERM; with `takes_over` in place of whoever does so now. Raises CommandFailed."""
    settings = read_settings(prices=prices, state_dir=state_dir)
    make_way: Callable[[StateLock], Awaitable[None]] | None = None
    if takes_over and StateLock(settings.state_dir / LOCK_NAME).is_held():
        listener = make_socket(host)

        async def make_way(lock: StateLock) -> None:
            await take_over(lock, partial(_try_bind, listener, host, port), port, settings.takeover_wait_s)
    else:
        refuse_if_held(settings.state_dir)
        listener = open_socket(host, port)
    configure_logging(settings.log_format)

    async def announce(launch: Launch) -> int:
        store = launch.service.store
        if settings.log_format == "json":
            fields = {"url": launch.url, "prices": store.source, "is_synthetic": store.is_synthetic}
            logger.info("serving", extra={"action": "serving", **fields})
            return 0
        say(f"Scanwire serves on {launch.url} (Ctrl-C stops it)")
        say(f"Prices: {describe_store(store)}")
        if host not in LOOPBACK and "*" not in settings.allowed_hosts:
            say(f"Requests are answered for these host names: {', '.join(settings.allowed_hosts)}")
            say("Name others with SCANWIRE_ALLOWED_HOSTS.")
        return 0

    Launch(settings, listener, make_way).run(announce)


def describe_store(store: Store) -> str:
    """What prices these are and where they come from; invented ones are marked."""
    mark = f"{SYNTHETIC_MARK}: " if store.is_synthetic else ""
    count = len(store.symbols)
    span = f"{store.rows:,} rows, {store.first} to {store.last}"
    source = textwrap.fill(store.source, 79, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return f"{mark}{count:,} symbol{'s' * (count != 1)}, {span}\n{source}"


def say(text: str) -> None:
    """To whoever started the server, at once even through a pipe."""
    print(text, flush=True)


def make_socket(host: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return listener


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. Raises CommandFailed, which says what to do when the port is taken, and by whom."""
    listener = make_socket(host)
    if not _try_bind(listener, host, port):
        listener.close()
        detail = f"Port {port} of {host} is taken. Choose another with --port, such as --port {port + 1}."
        raise CommandFailed(" ".join(filter(None, (detail, name_port_holder(port)))))
    return listener


def _try_bind(listener: socket.socket, host: str, port: int) -> bool:
    """Whether the socket listens now; False when the port is taken. Raises CommandFailed."""
    try:
        if listener.getsockname()[1] != port:  # an earlier try may have come this far
            listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            return False
        if isinstance(error, PermissionError):
            detail = f"Port {port} may not be opened by this user. Choose one above 1023 with --port."
        else:
            code = getattr(error, "errno", None) or 0
            reason = os.strerror(code) if code > 0 else getattr(error, "strerror", None) or str(error)
            detail = f"Nothing can be served on {host} port {port}: {reason}."
        listener.close()
        raise CommandFailed(detail) from None
    return True


class Launch:
    """One run of the server on a socket that listens, or will when `make_way` returns."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        make_way: Callable[[StateLock], Awaitable[None]] | None = None,
    ) -> None:
        self._listener = listener
        self._gate = _Gate(create_app(settings, take_over=make_way))
        # A start that fails is told by CommandFailed, and better; a handshake that was refused is no error.
        silent = ("startup failed", "without completing handshake")
        logging.getLogger("uvicorn.error").addFilter(lambda record: not any(text in record.msg for text in silent))
        self._config = uvicorn.Config(
            self._gate,
            http=HttpConnection,
            ws=WebSocketConnection,
            ws_per_message_deflate=False,
            ws_max_size=settings.max_message_bytes,
            ws_ping_interval=None,  # the hub's heartbeats are pings
            # Forwarded addresses are judged by app.api.security, which must see the true peer.
            proxy_headers=False,
            server_header=False,
            access_log=False,
            lifespan="on",
            log_config=None,
            log_level="warning",
            timeout_graceful_shutdown=int(settings.drain_s) + 1,
        )

    def run(self, work: Callable[["Launch"], Awaitable[int]]) -> int:
        """Serves until SIGINT or SIGTERM, or until `work` raises; gives the exit code of `work`.

        `work` runs beside the server in the same event loop, and is cancelled when the server stops. Raises
        CommandFailed.
        """
        # The server takes the signals while it runs and hands them on when it is done; an orderly stop is no error.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        with asyncio.Runner(loop_factory=self._config.get_loop_factory()) as runner:
            return runner.run(self._serve(work))

    async def _serve(self, work: Callable[["Launch"], Awaitable[int]]) -> int:
        server = _Server(self._config)
        serving = asyncio.create_task(_run_quietly(server, self._listener))
        started = asyncio.create_task(self._gate.started.wait())
        await asyncio.wait({serving, started}, return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        working = asyncio.ensure_future(work(self)) if self._gate.service is not None else None
        if working is not None:
            await asyncio.wait({serving, working}, return_when=asyncio.FIRST_COMPLETED)
            if working.done() and working.exception() is not None:
                server.stop()
            if not working.done():
                working.cancel()
        await serving
        if working is None:
            if self._gate.failure is None:
                return 0  # stopped before it had started
            raise CommandFailed(_explain(self._gate.failure)) from None
        results = await asyncio.gather(working, return_exceptions=True)
        result = results[0]
        if isinstance(result, asyncio.CancelledError):
            return 0
        if isinstance(result, BaseException):
            raise result
        return result

    @property
    def url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def service(self) -> Service:
        """The parts of the running service; there is one while `work` runs."""
        assert self._gate.service is not None
        return self._gate.service


class _Server(uvicorn.Server):
    """Is told to stop, and does not ask ten times a second whether it should: each time costs an idle process as much
    as a poll."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._stopping.set)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.stop()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # uvicorn renews the Date with every tenth tick; here each one is such
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), TICK_S)


async def _run_quietly(server: uvicorn.Server, listener: socket.socket) -> None:
    # A server whose start failed ends the process; here the process has something to say first.
    with contextlib.suppress(SystemExit):
        await server.serve([listener])


class _Gate:
    """Stands before the application and keeps what its start came to."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.started = asyncio.Event()
        self.service: Service | None = None
        self.failure: BaseException | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def tell(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.service = scope["app"].state.service
                self.started.set()
            elif message["type"] == "lifespan.startup.failed":
                message = {"type": message["type"], "message": ""}  # else a stack trace is shown
            await send(message)

        try:
            await self._app(scope, receive, tell)
        except Exception as error:
            if self.service is not None:
                raise
            self.failure = error


def _explain(failure: BaseException) -> str:
    """Why the start failed, for people; what nobody expected is logged with its traceback."""
    cause = failure
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, ScanwireError):
        return cause.detail
    if isinstance(cause, CommandFailed):
        return str(cause)
    logger.error("the start failed", exc_info=failure, extra={"action": "start_failed"})
    return f"Scanwire could not start ({type(cause).__name__}: {cause}). The log above says more."
