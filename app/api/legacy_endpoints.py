"""The routes of old under /api in the table of `app.api.endpoints`, and the models of what they answer."""

import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from app.api import legacy
from app.api.endpoints import LIMITED, Answer, Endpoint, Parameter
from app.api.formats import JSON
from app.api.models import Count, Wire
from app.core.errors import (
    AtCapacity,
    Draining,
    InvalidParams,
    InvalidRequest,
    JournalUnavailable,
    RateLimited,
    ScanFailed,
    SlowRequest,
    Trimmed,
)

Status = Annotated[
    Literal["initializing", "running", "completed", "error"],
    Field(description="`initializing` while it waits for its turn; cancelled and lost scans are errors"),
]
Percent = Annotated[int, Field(ge=0, le=100, description="of the work done; 100 when the scan has completed")]
Seconds = Annotated[float, Field(ge=0, description="that the scan has run")]


class LegacyRow(Wire):
    """One match."""

    ticker: str
    date: datetime.date
    gap_pct: Annotated[float | None, Field(description="open over yesterday's close, minus 1")]
    parabolic_score: Annotated[float, Field(ge=0, le=100)]
    lc_frontside_d2_extended: Annotated[int, Field(ge=0, le=1, description="1: the setup lc-d2 holds on this day")]
    volume: int
    close: float
    confidence_score: Annotated[float, Field(ge=0, le=1, description="parabolic_score / 100")]


LegacyResults = Annotated[
    list[LegacyRow], Field(description="best score first; all of them once the scan has completed, and none before")
]


class LegacyExecuted(Wire):
    success: Literal[True]
    scan_id: str
    message: str
    results: LegacyResults
    execution_time: Seconds
    total_found: Count


class LegacySummary(Wire):
    scan_id: str
    status: Status
    progress_percent: Percent
    message: str
    start_date: datetime.date
    end_date: datetime.date
    created_at: datetime.datetime
    total_found: Count
    execution_time: Seconds
    error: str | None


class LegacyStatus(LegacySummary):
    results: LegacyResults


class LegacyNoScans(Wire):
    """This client has no scan."""

    scan_id: None
    status: Literal["no_scans"]
    progress_percent: Literal[0]


class DateRange(Wire):
    start_date: datetime.date
    end_date: datetime.date


class LegacyFound(Wire):
    scan_id: str
    status: Literal["completed"]
    results: LegacyResults
    total_found: Count
    execution_time: Seconds
    date_range: DateRange


class LegacyDetail(Wire):
    detail: str


class LegacyScans(Wire):
    scans: Annotated[list[LegacySummary], Field(description="newest first")]


class LegacyExecution(Wire):
    success: Annotated[bool, Field(description="false: not found, or ended in an error")]
    execution_id: str
    scan_id: str
    status: Status | Literal["not_found"]
    progress_percent: Percent
    message: str
    results: LegacyResults
    total_found: Count
    timestamp: datetime.datetime


class LegacyHealth(Wire):
    status: Literal["healthy"]
    timestamp: datetime.datetime
    active_scans: Count
    version: str
    mode: Annotated[Literal["real", "synthetic"], Field(description="whether the prices are real or invented")]


class LegacyPerformance(Wire):
    cpu_cores: int | None
    max_concurrent_scans: int
    active_scans: Count
    rate_limit: str
    scan_cleanup_interval: Annotated[float, Field(description="in seconds")]
    memory_usage: Annotated[float, Field(description="resident memory of the server in MB")]
    response_time_avg: Annotated[float, Field(description="over the latest answers under /api, in seconds")]
    available_scanners: list[str]


MODELS: tuple[type[BaseModel], ...] = (
    legacy.LegacyRequest,
    LegacyExecuted,
    LegacyStatus,
    LegacyNoScans,
    LegacyFound,
    LegacyDetail,
    LegacyScans,
    LegacyExecution,
    LegacyHealth,
    LegacyPerformance,
)

_ID = Parameter(name="id", place="path", schema={"type": "string"}, text="Id of a scan.", required=True)
_SUBMITTING = (
    InvalidRequest,
    SlowRequest,
    InvalidParams,
    RateLimited,
    AtCapacity,
    Draining,
    JournalUnavailable,
)
_NOT_FOUND = Answer(text="There is no such scan.", content={JSON: LegacyDetail}, headers=LIMITED)


def _answer(text: str, model: type[BaseModel] | dict[str, Any], *headers: str) -> Answer:
    return Answer(text=text, content={JSON: model}, headers=(*headers, *LIMITED))


def list_legacy_endpoints() -> list[Endpoint]:
    """One for each route under /api, but the WebSocket."""
    return [
        Endpoint(
            method="post",
            path="/api/scan/execute",
            handler=legacy.execute_scan,
            summary="Run a scan",
            text="Waits for its end for some seconds, and answers with all rows when it comes within them. Otherwise "
            "`results` is empty and says nothing: poll its status.",
            takes={JSON: legacy.LegacyRequest},
            is_body_optional=True,
            answers={200: _answer("The scan.", LegacyExecuted, "Retry-After?")},
            refusals=(*_SUBMITTING, ScanFailed, Trimmed),
            is_deprecated=True,
        ),
        Endpoint(
            method="post",
            path="/api/operation/execute",
            handler=legacy.execute_operation,
            summary="Run a scan with the defaults",
            takes={JSON: {"schema": {}}},
            is_body_optional=True,
            answers={200: _answer("The scan.", LegacyExecuted, "Retry-After?")},
            refusals=(*_SUBMITTING, ScanFailed, Trimmed),
            is_deprecated=True,
        ),
        Endpoint(
            method="get",
            path="/api/scan/status",
            handler=legacy.get_newest_status,
            summary="Poll your newest scan",
            answers={
                200: _answer(
                    "The scan as it stands.",
                    {"schema": {"anyOf": [{"$ref": f"#/components/schemas/{m.__name__}"} for m in _NEWEST]}},
                    "Retry-After?",
                )
            },
            refusals=(RateLimited, Trimmed),
            is_deprecated=True,
        ),
        Endpoint(
            method="get",
            path="/api/scan/status/{id}",
            handler=legacy.get_status,
            id="get_legacy_status",
            summary="Poll a scan, the old way",
            parameters=[_ID],
            answers={200: _answer("The scan as it stands.", LegacyStatus, "Retry-After?"), 404: _NOT_FOUND},
            refusals=(RateLimited, Trimmed),
            is_deprecated=True,
        ),
        Endpoint(
            method="get",
            path="/api/scan/results/{id}",
            handler=legacy.get_results,
            summary="What a scan found, the old way",
            parameters=[_ID],
            answers={
                200: _answer("All rows.", LegacyFound),
                202: _answer("They are not all there yet.", LegacyDetail, "Retry-After?"),
                404: _NOT_FOUND,
            },
            refusals=(RateLimited, ScanFailed, Trimmed),
            is_deprecated=True,
        ),
        Endpoint(
            method="get",
            path="/api/scan/list",
            handler=legacy.list_scans,
            id="list_legacy_scans",
            summary="List your scans, the old way",
            answers={200: _answer("Your newest scans.", LegacyScans)},
            refusals=(RateLimited,),
            is_deprecated=True,
        ),
        Endpoint(
            method="get",
            path="/api/scans/{id}",
            handler=legacy.get_execution,
            summary="Poll a scan, in another old way",
            parameters=[_ID],
            answers={200: _answer("The scan, or that it was not found.", LegacyExecution, "Retry-After?")},
            refusals=(RateLimited, Trimmed),
            is_deprecated=True,
        ),
        Endpoint(
            method="get",
            path="/api/health",
            handler=legacy.get_health,
            id="get_legacy_health",
            summary="Does the process live? Asked the old way",
            answers={200: Answer(text="It does.", content={JSON: LegacyHealth})},
            is_deprecated=True,
        ),
        Endpoint(
            method="get",
            path="/api/performance",
            handler=legacy.get_performance,
            id="get_legacy_performance",
            summary="How fast the service is, the old way",
            answers={200: _answer("As of now.", LegacyPerformance)},
            refusals=(RateLimited,),
            is_deprecated=True,
        ),
    ]


_NEWEST = (LegacyStatus, LegacyNoScans)
