"""The HTTP routes of old under /api, for clients that cannot be changed: a translation, and nothing of its own.

Whatever such a client asks for becomes one scan of the scanner `legacy`, in the same queue and log as any other; its
id is the id that the client polls. What is shown comes from that scan. `app.api.legacy_progress` has the WebSocket.

Days that are not given: the last day is the last one that there are prices for, and the first is 30 days before the
last. Clients of old leave them out when they want "what is new", and today may be years behind the prices' end.
"""

import asyncio
import os
import resource
from contextlib import ExitStack
from datetime import timedelta
from decimal import Decimal
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from app import __version__
from app.api.formats import JSON
from app.api.legacy_answers import (
    COMPLETED,
    ERROR,
    LegacyRows,
    describe_scan,
    explain_error,
    find_scan,
    measure_time,
    name_status,
    tell_rows,
    write_time,
)
from app.api.polling import hint_next, wait_until_gone
from app.api.scans import PAGE_MAX, read_body
from app.api.service import Service, get_client, get_service
from app.core.errors import (
    AtCapacity,
    Draining,
    InvalidParams,
    InvalidRequest,
    JournalUnavailable,
    RateLimited,
    ScanFailed,
)
from app.core.event import Cursor
from app.core.scan import Scan
from app.engine.admission import Submission
from app.engine.limits import PolicyName
from app.push.puller import Puller
from app.scanners import legacy
from app.scanners.params import Day, Number

DEFAULT_DAYS = 30
EXECUTE: PolicyName = "legacy-execute"
_BY_TYPE: dict[str, tuple[legacy.Setup, ...]] = {"lc": legacy.LARGE_CAP, "a_plus": ("a-plus",)}
# `filters.scan_type`; any other value leaves the large-cap setups.
_BY_SCAN_TYPE: dict[str, tuple[legacy.Setup, ...]] = {
    "gap_up": ("gap-up",),
    "breakout": ("momentum-breakout",),
    "volume": ("volume-surge",),
    "general": ("gap-up", "momentum-breakout", "volume-surge"),
}
# The request was fine, and the server had no place: what it was charged is given back.
_NO_PLACE = (RateLimited, AtCapacity, Draining, JournalUnavailable)


class LegacyFilters(BaseModel):
    """They choose among the rows, never among the days that a rule looks back on. Others are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    scan_type: Annotated[str | None, Field(description="gap_up, breakout, volume or general; else as scanner_type")] = (
        None
    )
    min_volume: Annotated[Number | None, Field(ge=0, le=1e15, description="shares")] = None
    min_gap_atr: Annotated[Number | None, Field(ge=0, le=1e6, description="distance of the open, in ATR")] = None


class LegacyRequest(BaseModel):
    """What POST /api/scan/execute takes. All of it may be left out, and what is not named here is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    start_date: Annotated[Day | None, Field(description="first day of matches")] = None
    end_date: Annotated[Day | None, Field(description="last day of matches, included")] = None
    filters: LegacyFilters | None = None
    scanner_type: Annotated[Literal["lc", "a_plus"] | None, Field(description="lc when left out")] = None
    use_real_scan: Annotated[Any, Field(description="ignored: rows are always real")] = None
    chunk_size_days: Annotated[Any, Field(description="ignored: the server splits its work itself")] = None
    max_concurrent_chunks: Annotated[Any, Field(description="ignored, likewise")] = None


def read_request(service: Service, body: bytes) -> Submission:
    """The scan that a request means. Raises InvalidRequest and InvalidParams."""
    values = _read_json(body)
    if not isinstance(values, dict):
        raise InvalidRequest('The body is not a JSON object such as {"start_date":"2018-01-02"}.')
    try:
        return _translate(service, LegacyRequest.model_validate(values))
    except ValidationError as error:
        raise InvalidParams.explain(error) from None


def _read_json(body: bytes) -> Any:
    try:
        values = orjson.loads(body) if body.strip() else {}
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not JSON: {error}.") from None
    if isinstance(values, dict) and values.get("uploaded_code"):
        raise InvalidRequest(
            "uploaded_code is refused: this server never runs code that arrives over the network. Leave it out for the "
            "built-in scanners, or have your scanner installed on the server."
        )
    return values


def _translate(service: Service, asked: LegacyRequest) -> Submission:
    filters = asked.filters or LegacyFilters()
    setups = _BY_TYPE[asked.scanner_type or "lc"]
    if asked.scanner_type != "a_plus":
        setups = _BY_SCAN_TYPE.get(filters.scan_type or "", setups)
    end = asked.end_date or max(service.store.last, asked.start_date or service.store.last)
    start = asked.start_date or end - timedelta(days=DEFAULT_DAYS)
    if start > end:
        raise InvalidParams.of("start_date", f"{start} is after end_date, {end}")
    bounds = {"volume": filters.min_volume, "gap_atr": filters.min_gap_atr}
    # As SQL wants it, without an exponent.
    rules = [f"{name} >= {Decimal(repr(least)):f}" for name, least in bounds.items() if least is not None]
    params = {
        "setups": list(setups),
        "start": start.isoformat(),
        "end": end.isoformat(),
        "where": " AND ".join(rules) or None,
    }
    return Submission(scanner=legacy.NAME, params=params)


async def execute_scan(request: Request) -> Response:
    """POST /api/scan/execute: waits for the end up to `legacy_wait_s`, since many take the first answer for the last"""
    service, client = get_service(request), get_client(request)
    service.limits.charge(EXECUTE, client)
    asked = read_request(service, await read_body(request))
    with ExitStack() as stack:
        try:
            # A request that waits takes the place of a stream, and they are bounded.
            stack.enter_context(service.limits.open_stream(client))
            scan = (await service.admission.submit(client, asked, is_charged=True)).scan
        except _NO_PLACE:
            service.limits.refund(EXECUTE, client)
            raise
        return await _answer_executed(request, await _wait_for_end(request, scan), EXECUTE)


async def execute_operation(request: Request) -> Response:
    """POST /api/operation/execute: any JSON starts a scan with the defaults; answered at once"""
    service, client = get_service(request), get_client(request)
    # Each time, though they all mean the same scan: what posts here tests whether there is a limit.
    service.limits.charge("submit", client)
    _read_json(await read_body(request))
    try:
        scan = (await service.admission.submit(client, _translate(service, LegacyRequest()), is_charged=True)).scan
    except _NO_PLACE:
        service.limits.refund("submit", client)
        raise
    return await _answer_executed(request, scan, "submit")


async def _wait_for_end(request: Request, scan: Scan) -> Scan:
    """The scan when it has ended, the time is over, the client has left, or the server stops."""
    service, client = get_service(request), get_client(request)
    wait_s = service.settings.legacy_wait_s
    with (
        service.sessions.stream(client, [scan.id], is_poll=True),
        service.hub.pull("long-poll") as subscriber,
    ):
        service.hub.subscribe(subscriber, scan.id, Cursor(service.log.epoch, scan.n))
        ending = asyncio.create_task(_read_to_the_end(subscriber))
        leaving = asyncio.create_task(wait_until_gone(request))
        try:
            await asyncio.wait((ending, leaving), timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ending.cancel()
            leaving.cancel()
            await asyncio.gather(ending, leaving, return_exceptions=True)
    return service.log.find(scan.id) or scan


async def _read_to_the_end(subscriber: Puller) -> None:
    async for _ in subscriber.batches():
        pass


async def _answer_executed(request: Request, scan: Scan, policy: PolicyName) -> Response:
    service, client = get_service(request), get_client(request)
    headers = service.limits.headers(policy, client)
    _require_rows(scan)
    about = describe_scan(service, scan)
    elapsed_s: float = 0
    if about["status"] == COMPLETED:
        elapsed_s = measure_time(service, scan)
    else:
        about["message"] = f"These are no results yet: GET /api/scan/status/{scan.id} has them. {about['message']}"
        headers |= _hint(service, client, scan)
    answer = {"success": True, "scan_id": scan.id, "message": about["message"], "execution_time": elapsed_s}
    return _answer(answer | await tell_rows(service, _get_rows(request), scan), 200, headers)


def _require_rows(scan: Scan) -> None:
    """Raises ScanFailed for a scan that will never have rows to show: it must not look as if it had found nothing."""
    if (reason := explain_error(scan)) is not None:
        raise ScanFailed(reason)


async def get_status(request: Request) -> Response:
    """GET /api/scan/status/{id}"""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)
    scan = find_scan(service, request.path_params["id"])
    if scan is None:
        return _not_found(service, client)
    return await _answer_status(request, scan)


async def get_newest_status(request: Request) -> Response:
    """GET /api/scan/status: of the client's newest scan"""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)
    scans = _list_own(service, client, 1)
    if not scans:
        nothing = {"scan_id": None, "status": "no_scans", "progress_percent": 0}
        return _answer(nothing, 200, service.limits.headers("read", client))
    return await _answer_status(request, scans[0])


async def _answer_status(request: Request, scan: Scan) -> Response:
    service, client = get_service(request), get_client(request)
    headers = service.limits.headers("read", client) | _hint(service, client, scan)
    return _answer(_summarise(service, scan) | await tell_rows(service, _get_rows(request), scan), 200, headers)


def _summarise(service: Service, scan: Scan) -> dict[str, Any]:
    return describe_scan(service, scan) | {
        **_get_range(service, scan),
        "created_at": write_time(scan.created_ts),
        "total_found": scan.matches if name_status(scan) == COMPLETED else 0,
        "execution_time": measure_time(service, scan),
        "error": explain_error(scan),
    }


def _get_range(service: Service, scan: Scan) -> dict[str, str]:
    """The days that matches may be on; a scan that came in by /v1 may have been asked for all there are."""
    start, end = scan.params["start"], scan.params["end"]
    return {
        "start_date": start or service.store.first.isoformat(),
        "end_date": end or service.store.last.isoformat(),
    }


async def get_results(request: Request) -> Response:
    """GET /api/scan/results/{id}: rows when they are all there, and never an empty list before"""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)
    scan = find_scan(service, request.path_params["id"])
    if scan is None:
        return _not_found(service, client)
    headers = service.limits.headers("read", client)
    _require_rows(scan)
    if (status := name_status(scan)) != COMPLETED:
        return _answer({"detail": "Scan still in progress"}, 202, headers | _hint(service, client, scan))
    answer = {
        "scan_id": scan.id,
        "status": status,
        "execution_time": measure_time(service, scan),
        "date_range": _get_range(service, scan),
    }
    return _answer(answer | await tell_rows(service, _get_rows(request), scan), 200, headers)


async def list_scans(request: Request) -> Response:
    """GET /api/scan/list: the client's own, newest first, without their rows"""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)
    scans = [_summarise(service, scan) for scan in _list_own(service, client, PAGE_MAX)]
    return _answer({"scans": scans}, 200, service.limits.headers("read", client))


async def get_execution(request: Request) -> Response:
    """GET /api/scans/{id}: 200 in any case"""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)
    scan_id = request.path_params["id"]
    headers = service.limits.headers("read", client)
    answer: dict[str, Any] = {"execution_id": scan_id, "timestamp": write_time(service.log.now_ms())}
    scan = find_scan(service, scan_id)
    if scan is None:
        answer |= {"success": False, "scan_id": scan_id, "status": "not_found", "progress_percent": 0}
        return _answer(answer | {"message": "Scan not found", "results": [], "total_found": 0}, 200, headers)
    headers |= _hint(service, client, scan)
    answer |= describe_scan(service, scan) | {"success": name_status(scan) != ERROR}
    return _answer(answer | await tell_rows(service, _get_rows(request), scan), 200, headers)


async def get_health(request: Request) -> Response:
    """GET /api/health: charged to nothing, as /healthz"""
    service = get_service(request)
    answer = {
        "status": "healthy",
        "timestamp": write_time(service.log.now_ms()),
        "active_scans": service.runner.active,
        "version": __version__,
        "mode": "synthetic" if service.store.is_synthetic else "real",
    }
    return _answer(answer, 200, {})


async def get_performance(request: Request) -> Response:
    """GET /api/performance"""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)
    settings = service.settings
    answer = {
        "cpu_cores": os.cpu_count(),
        "max_concurrent_scans": settings.max_running,
        "active_scans": service.runner.active,
        "rate_limit": f"{settings.submit_per_min:g}/minute",
        "scan_cleanup_interval": settings.reap_every_s,
        "memory_usage": _measure_memory_mb(),
        "response_time_avg": round(service.metrics.legacy_answer_s, 6),
        "available_scanners": list(_BY_TYPE),
    }
    return _answer(answer, 200, service.limits.headers("read", client))


def _measure_memory_mb() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return round(pages * resource.getpagesize() / 2**20, 1)
    except OSError:  # no Linux: the most it ever was
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


def _list_own(service: Service, client: str, limit: int) -> list[Scan]:
    """Newest first: scans that the client submitted, and those of others that answered it, while it is there."""
    own: list[Scan] = []
    for scan in service.log.list_scans():
        is_own = scan.client == client or service.sessions.is_present(client, scan.id)
        if is_own and find_scan(service, scan.id) is not None:
            own.append(scan)
            if len(own) == limit:
                break
    return own


def _hint(service: Service, client: str, scan: Scan) -> dict[str, str]:
    """When asking again is worth it; notes that the client is there."""
    hint_s = hint_next(service, client, scan)
    return {} if hint_s is None else {"Retry-After": str(ceil(hint_s))}


def _get_rows(request: Request) -> LegacyRows:
    rows: LegacyRows = request.app.state.legacy_rows
    return rows


def _not_found(service: Service, client: str) -> Response:
    return _answer({"detail": "Scan not found"}, 404, service.limits.headers("read", client))


def _answer(value: Any, status: int, headers: dict[str, str]) -> Response:
    return Response(orjson.dumps(value), status, {"Cache-Control": "no-store", **headers}, JSON)
