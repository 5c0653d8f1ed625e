"""Builds the service and wires its parts; start, and the order of the stop."""

import asyncio
import contextlib
import gc
import logging
import mimetypes
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from app.api import diagnosis, external, legacy, legacy_progress, operations, polling, prices, scans, sse, websocket
from app.api.addresses import make_counting
from app.api.deprecation import ROUTES, Deprecated
from app.api.legacy_answers import LegacyRows
from app.api.openapi import make_openapi
from app.api.problems import PROBLEMS
from app.api.security import protect
from app.api.service import Service
from app.api.shortcuts import Shortcuts
from app.core.scan import Scan
from app.core.settings import JOURNAL_NAME, Settings
from app.drain import Drain
from app.engine.admission import Admission
from app.engine.external import Producers
from app.engine.limits import Limits
from app.engine.reaper import Reaper
from app.engine.runner import Runner
from app.engine.sessions import Sessions
from app.engine.worker import inspect_prices
from app.log.eventlog import EventLog
from app.log.lock import StateLock
from app.log.sqlite import SqliteJournal
from app.observe.lookout import Lookout
from app.observe.metrics import Metrics
from app.observe.tally import State, Tally, read_memory
from app.observe.watchdog import Watchdog
from app.push.guard import EXTENSION, Bounds
from app.push.hub import Hub
from app.push.ring import open_ring

logger = logging.getLogger(__name__)

STATIC = next(
    path for path in (Path(__file__).parent / "static", Path(__file__).parents[1] / "static") if path.is_dir()
)
# A full collection goes through every open connection: with thousands, each one is a pause that all of them feel. So
# is a younger one that has let too many new ones gather, as in a storm of connects.
GC_THRESHOLDS = (5000, 2, 5000)
SAMPLE_NAME = "sample.parquet"
# Before Python 3.12 it depends on the machine; as anything else a script does not get the policy of pages.
mimetypes.add_type("text/javascript", ".js")


def make_clock_ms(
    clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
) -> Callable[[], int]:
    """Milliseconds since 1970 that never jump: the wall clock is read once, and time passes by the monotonic one."""
    offset = wall() - clock()
    return lambda: int((offset + clock()) * 1000)


def create_app(
    settings: Settings | None = None,
    *,
    take_over: Callable[[StateLock], Awaitable[None]] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> ASGIApp:
    """The ASGI application. Settings come from the environment when none are given.

    With `take_over` everything is made ready that another process on the same state directory need not end for; then
    it is called, and returns with the lock. `clock` gives monotonic seconds: limits, sessions, retention and
    timestamps go by it.
    """
    settings = settings or Settings()
    routes = [
        WebSocketRoute("/v1/ws", websocket.serve_websocket),  # first, since all that stand before one are tried
        _route("/v1/scans", GET=scans.list_scans, POST=scans.submit_scan),
        _route("/v1/scans/{id}", GET=polling.get_snapshot, DELETE=scans.cancel_scan),
        _route("/v1/scans/{id}/events", GET=sse.get_scan_events, POST=external.post_events),
        Route("/v1/scans/{id}/matches", scans.get_matches, methods=["GET"]),
        Route("/v1/scans/{id}/matches.{suffix}", scans.get_matches, methods=["GET"]),
        Route("/v1/events", sse.get_events, methods=["GET"]),
        Route("/v1/scanners", scans.list_all_scanners, methods=["GET"]),
        Route("/v1/prices/{symbol:path}", prices.get_prices, methods=["GET"]),  # there are symbols with a slash
        Route("/v1/performance", operations.get_performance, methods=["GET"]),
        Route("/v1/operations", operations.get_operations, methods=["GET"]),
        Route("/v1/diagnosis", diagnosis.get_diagnosis, methods=["GET"]),
        Route("/v1/operations/events", diagnosis.get_operations_events, methods=["GET"]),
        Route("/v1/operations/emergency", diagnosis.set_emergency, methods=["POST"]),
        Route("/healthz", operations.get_health, methods=["GET"]),
        Route("/readyz", operations.get_ready, methods=["GET"]),
        Route("/metrics", operations.get_metrics, methods=["GET"]),
        Route("/openapi.json", make_openapi, methods=["GET"]),
        Route("/api/scan/execute", legacy.execute_scan, methods=["POST"]),
        Route("/api/operation/execute", legacy.execute_operation, methods=["POST"]),
        Route("/api/scan/status", legacy.get_newest_status, methods=["GET"]),
        Route("/api/scan/status/{id}", legacy.get_status, methods=["GET"]),
        Route("/api/scan/results/{id}", legacy.get_results, methods=["GET"]),
        Route("/api/scan/list", legacy.list_scans, methods=["GET"]),
        Route("/api/scans/{id}", legacy.get_execution, methods=["GET"]),
        Route("/api/health", legacy.get_health, methods=["GET"]),
        Route("/api/performance", legacy.get_performance, methods=["GET"]),
        WebSocketRoute("/api/scan/progress/{id}", legacy_progress.serve_progress),
        Mount("/static", GZipMiddleware(_FILES)),
        Route("/", get_page, methods=["GET"]),
        Route("/scans/{id}", get_page, methods=["GET"]),
    ]
    app = Starlette(routes=routes, exception_handlers=PROBLEMS, lifespan=_run_service)
    app.state.settings = settings
    app.state.take_over = take_over
    app.state.clock = clock
    app.state.snapshots = polling.SnapshotCache()
    app.state.legacy_rows = LegacyRows(settings.legacy_memory_bytes)
    protected = protect(app, settings, external.has_own_token, lambda security: Shortcuts(security, app))
    return Deprecated(protected, lambda: app.state.service.metrics)


def _route(path: str, **endpoints: Callable[[Request], Awaitable[ASGIApp]]) -> Route:
    """One route for all methods of an address, so that `Allow` names every one of them."""

    async def dispatch(request: Request) -> ASGIApp:
        return await endpoints["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, dispatch, methods=list(endpoints))


class _Static(StaticFiles):
    """Files that a browser asks for again each time, and gets again once they have changed: a new release at once."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


_FILES = _Static(directory=STATIC)


async def get_page(request: Request) -> Response:
    """GET / and /scans/{id}: the page, which looks at its own address."""
    return await _FILES.get_response("index.html", request.scope)


@contextlib.asynccontextmanager
async def _run_service(app: Starlette) -> AsyncIterator[dict[str, Any]]:
    """Everything that lives as long as the service. Stopped in the opposite order: work first, the journal last."""
    settings: Settings = app.state.settings
    clock: Callable[[], float] = app.state.clock
    now_ms = make_clock_ms(clock)
    metrics = Metrics(ROUTES)
    watchdog = Watchdog(settings.block_report_ms / 1000)
    journal = SqliteJournal(settings.state_dir / JOURNAL_NAME, settings.durability)
    log = EventLog(
        journal,
        now_ms=now_ms,
        memory_bytes=settings.log_memory_bytes,
        progress_per_s=settings.progress_per_s,
    )
    if app.state.take_over is None:
        await log.open()
    ring = open_ring() if settings.io_uring else None
    try:
        async with Runner(settings, log, clock=clock) as runner:
            await runner.pool.warm_up()
            store = await runner.pool.call(inspect_prices, await _find_prices(settings, runner))
            if app.state.take_over is not None:
                await app.state.take_over(journal.lock)
                await log.open()
            hub = Hub(log, ring=ring, batch_ms=settings.batch_ms, batch_max_ms=settings.batch_max_ms)
            hub.note_lag = metrics.note_push_lag
            limits = Limits(settings, clock)
            sessions = Sessions(idle_s=settings.session_idle_s, max_sessions=settings.max_sessions, clock=clock)
            producers = Producers(settings, log, clock=clock)
            admission = Admission(settings, log, runner, producers, limits, sessions, store, clock=clock)
            reaper = Reaper(settings, log, runner, producers, admission, sessions, limits)
            tally = make_tally(settings, runner, hub, limits, watchdog)
            lookout = Lookout(settings, tally, limits, sessions, admission, now_ms=now_ms)
            metrics.watch_incidents(lookout)
            metrics.tell_push_lag, metrics.tell_loop_lag = tally.note_push_lag, tally.note_loop_lag
            sessions.note_poll, sessions.note_stream = tally.note_poll, tally.note_connect
            runner.note_chunk = tally.note_chunk

            def note_finished(scan_id: str) -> None:
                sessions.forget(scan_id)
                note_scan(tally, log.find(scan_id))

            runner.finished = producers.finished = note_finished
            metrics.watch(log, hub, runner, sessions, limits, reaper, watchdog)
            app.state.service = Service(
                settings=settings,
                store=store,
                log=log,
                hub=hub,
                limits=limits,
                sessions=sessions,
                runner=runner,
                producers=producers,
                admission=admission,
                reaper=reaper,
                metrics=metrics,
                lookout=lookout,
                note_answer=tally.note_answer,
            )
            await admission.take_up()
            # What was loaded to start lives as long as the service: the collector need not look at it again.
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            endless: list[Coroutine[Any, Any, None]] = [
                reaper.run(),
                lookout.run(),
                hub.beat(settings.heartbeat_s),
                metrics.measure_loop_lag(watchdog),
            ]
            if settings.webhook_url is not None:
                from app.observe.webhook import Webhook  # here: to load an HTTP client takes a tenth of a start

                webhook = Webhook(settings)
                lookout.tell = webhook.submit
                endless.append(webhook.run())
            timers = [asyncio.create_task(work) for work in endless]
            try:
                with watchdog.watch(), Drain(settings, journal.lock, admission, runner, hub).at_signals():
                    logger.info("ready", extra={"action": "ready", "io_uring": "no" if ring is None else "yes"})
                    yield {
                        EXTENSION: Bounds(
                            settings, make_counting(tuple(map(ip_network, settings.trusted_proxies))), Counter()
                        )
                    }
                    admission.is_draining = True
                    hub.parting.say_at_once(int(settings.drain_s * 1000))  # where the stop did not begin with a signal
            finally:
                for timer in timers:
                    timer.cancel()
                await asyncio.gather(*timers, return_exceptions=True)
    finally:
        await log.close()
        if ring is not None:
            ring.close()
        logger.info("stopped", extra={"action": "stopped"})


def make_tally(settings: Settings, runner: Runner, hub: Hub, limits: Limits, watchdog: Watchdog) -> Tally:
    """Takes notes of these parts."""

    def read_state() -> State:
        running, watched, limited = runner.statistics(), hub.statistics(), limits.statistics()
        return State(
            memory_bytes=read_memory(),
            workers_bytes=sum(map(read_memory, runner.pool.pids)),
            cpu_s=time.process_time(),
            running=running.running,
            slots=running.slots,
            queued=running.queued,
            streams=sum(watched.subscribers.values()),
            behind=hub.count_behind(),
            most_streams=limits.find_most_streams(),
            pushed=sum(watched.pushed.values()),
            refused=limited.refused,
            blocks=watchdog.blocks,
        )

    tally = Tally(settings.diagnosis_window_s, settings.memory_window_s, read_state)
    tally.take_charged = limits.take_charged
    return tally


def note_scan(tally: Tally, scan: Scan | None) -> None:
    """How long a scan waited and took. The work of an external one is done elsewhere."""
    if scan is not None and scan.producer is None and scan.started_ts is not None and scan.finished_ts is not None:
        tally.note_scan((scan.started_ts - scan.created_ts) / 1000, (scan.finished_ts - scan.started_ts) / 1000)


async def _find_prices(settings: Settings, runner: Runner) -> Path:
    """The price file that was named, or the sample, which is made when it is not there yet."""
    if settings.prices is not None:
        return settings.prices
    sample = settings.state_dir / SAMPLE_NAME
    if not sample.exists():
        from app.market.sample import make_sample  # here: NumPy takes a while to load, and is not needed for more

        await runner.pool.call(make_sample, sample)
    return sample
