"""For those who run the service: health, readiness, metrics, and what it is busy with."""

import asyncio
import os
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from app import __version__
from app.api.formats import JSON
from app.api.models import Count, ScanId, Wire
from app.api.service import Service, get_client, get_service
from app.core.errors import ScanwireError
from app.core.scan import State
from app.engine.worker import warm_up

READY_WITHIN_S = 5.0

# What the answers look like; /openapi.json is made of it.


class Health(Wire):
    status: Literal["ok"]


class Checks(Wire):
    """`ok`, or what is wrong."""

    journal: str
    workers: str
    draining: str


class Ready(Wire):
    status: Literal["ready", "not ready"]
    checks: Checks


class Quantiles(Wire):
    p50: float | None
    p99: float | None
    max: float | None


class Performance(Wire):
    version: str
    cpu_cores: int | None
    workers: int
    running: Count
    max_running: int
    queued: Count
    max_queued: int
    rows_per_s: Annotated[float | None, Field(description="price rows, over the latest scans")]
    subscribers: Annotated[dict[str, int], Field(description="by transport")]
    loop_lag_ms: Quantiles
    push_lag_ms: Quantiles


class PricesStatus(Wire):
    data_version: str
    source: str
    is_synthetic: bool
    symbols: int
    rows: int


class LogStatus(Wire):
    scans: Count
    events_appended: Count
    memory_bytes: Count
    fault: str | None


class RunnerStatus(Wire):
    running: Count
    queued: Count
    slots: Count
    workers_busy: Count
    worker_crashes: Count


class HubStatus(Wire):
    subscribers: dict[str, int]
    pushed: Annotated[dict[str, int], Field(description="events since the start, by transport")]
    channels: Count
    flushes: Count


class SessionsStatus(Wire):
    sessions: Count
    streams: Count


class LimitsStatus(Wire):
    buckets: Count
    streams: Count
    refused: Annotated[dict[str, int], Field(description="since the start, by limit")]


class ActiveScan(Wire):
    id: ScanId
    scanner: str
    state: State
    client: str


class Operations(Wire):
    version: str
    epoch: str
    prices: PricesStatus
    log: LogStatus
    runner: RunnerStatus
    hub: HubStatus
    sessions: SessionsStatus
    limits: LimitsStatus
    reaped: Annotated[dict[str, int], Field(description="since the start, by kind")]
    active: list[ActiveScan]


ANSWERS: tuple[type[BaseModel], ...] = (Health, Ready, Performance, Operations)


def _answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, {"Cache-Control": "no-store", **(headers or {})}, JSON)


async def get_health(request: Request) -> Response:
    """GET /healthz: the process lives and its event loop turns."""
    return _answer({"status": "ok"})


async def get_ready(request: Request) -> Response:
    """GET /readyz: 200 while new scans can be taken, else 503; `checks` says why not."""
    service = get_service(request)
    checks = {
        "journal": service.log.fault or "ok",
        "workers": await _check_workers(service),
        "draining": "The server is stopping." if service.admission.is_draining else "ok",
    }
    is_ready = all(text == "ok" for text in checks.values())
    return _answer({"status": "ready" if is_ready else "not ready", "checks": checks}, 200 if is_ready else 503)


async def _check_workers(service: Service) -> str:
    if service.runner.statistics().workers_busy:
        return "ok"  # a chunk is being worked on; a dead worker would show in the scan
    try:
        async with asyncio.timeout(READY_WITHIN_S):
            await service.runner.pool.call(warm_up)
    except (TimeoutError, ScanwireError, OSError) as error:
        return f"No worker process answers ({type(error).__name__})."
    return "ok"


async def get_metrics(request: Request) -> Response:
    """GET /metrics: Prometheus' text format."""
    text = await get_service(request).metrics.render()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def get_performance(request: Request) -> Response:
    """GET /v1/performance: how fast the service is just now."""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)
    running, settings = service.runner.statistics(), service.settings
    answer = {
        "version": __version__,
        "cpu_cores": os.cpu_count(),
        "workers": settings.workers,
        "running": running.running,
        "max_running": settings.max_running,
        "queued": running.queued,
        "max_queued": settings.max_queued,
        "rows_per_s": service.runner.rows_per_s,
        "subscribers": service.hub.statistics().subscribers,
        **service.metrics.quantiles(),
    }
    return _answer(answer, headers=service.limits.headers("read", client))


async def get_operations(request: Request) -> Response:
    """GET /v1/operations: all counts and active scans, for operators."""
    service = get_service(request)
    active = [scan for scan in service.log.list_scans() if not scan.state.is_terminal]
    answer = {
        "version": __version__,
        "epoch": service.log.epoch,
        "prices": {
            "data_version": service.store.data_version,
            "source": service.store.source,
            "is_synthetic": service.store.is_synthetic,
            "symbols": len(service.store.symbols),
            "rows": service.store.rows,
        },
        "log": service.log.statistics()._asdict(),
        "runner": service.runner.statistics()._asdict(),
        "hub": service.hub.statistics()._asdict(),
        "sessions": service.sessions.statistics()._asdict(),
        "limits": service.limits.statistics()._asdict(),
        "reaped": service.reaper.reaped,
        "active": [
            {"id": scan.id, "scanner": scan.scanner, "state": scan.state, "client": scan.client} for scan in active
        ],
    }
    return _answer(answer)
