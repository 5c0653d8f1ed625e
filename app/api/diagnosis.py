"""For those who run the service: what is wrong with it, what happened, and the emergency switch."""

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sse_starlette.sse import EventSourceResponse
from starlette.requests import Request
from starlette.responses import Response

from app.api.formats import JSON
from app.api.models import Count, TimeMs, Wire
from app.api.scans import read_json
from app.api.service import get_service
from app.core.errors import InvalidParams
from app.observe.causes import Kind
from app.observe.incidents import Change
from app.observe.lookout import frame_told
from app.observe.measures import Severity
from app.push.frames import open_sse

# What the answers look like; /openapi.json is made of it.


class MeasureStatus(Wire):
    measure: str
    value: Annotated[float | None, Field(description="null while there is too little to measure")]
    target: float
    unit: str
    ratio: float | None
    severity: Severity
    act_within_h: int | None
    is_urgent: Annotated[bool, Field(description="at P0 an emergency begins")]


class CauseStatus(Wire):
    name: str
    kind: Kind
    evidence: str
    since_ts: TimeMs
    cure: str
    clients: Annotated[dict[str, Count], Field(description="who it comes of: hashes that hold until the next start")]


class IncidentStatus(Wire):
    subject: str
    severity: Severity
    since_ts: TimeMs
    evidence: str


class EmergencyStatus(Wire):
    is_on: bool
    since_ts: TimeMs | None
    reason: str


class DiagnosisReport(Wire):
    ts: TimeMs
    window_s: float
    severity: Severity
    measures: list[MeasureStatus]
    causes: list[CauseStatus]
    incidents: list[IncidentStatus]
    emergency: EmergencyStatus


class IncidentTold(IncidentStatus):
    change: Change


class EmergencyTold(EmergencyStatus):
    by: Literal["diagnosis", "operator"]


class OperationsEvent(Wire):
    """Something that those who run the service may want to know."""

    id: str
    type: Literal["incident", "emergency"]
    ts: TimeMs
    data: IncidentTold | EmergencyTold


class EmergencySwitch(BaseModel):
    """On, or off. Either way it is lifted by itself once nothing urgent is wrong."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    is_on: bool
    reason: Annotated[str, Field(max_length=200)] = "declared by an operator"


ANSWERS: tuple[type[BaseModel], ...] = (DiagnosisReport, OperationsEvent, EmergencyStatus, EmergencySwitch)


def _answer(value: object) -> Response:
    return Response(orjson.dumps(value), headers={"Cache-Control": "no-store"}, media_type=JSON)


async def get_diagnosis(request: Request) -> Response:
    """GET /v1/diagnosis"""
    return _answer(get_service(request).lookout.report())


async def get_operations_events(request: Request) -> Response:
    """GET /v1/operations/events: from the first one kept on, or behind Last-Event-ID."""
    service = get_service(request)
    if request.method == "HEAD":
        return Response(media_type="text/event-stream")
    text = request.headers.get("last-event-id", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise InvalidParams.of("Last-Event-ID", "must be the id of an event of operations")
    settings = service.settings

    async def write() -> AsyncIterator[bytes]:
        yield open_sse(settings.retry_ms)
        async with contextlib.aclosing(service.lookout.follow(int(text), settings.heartbeat_s)) as events:
            async for told in events:
                yield frame_told(told)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return EventSourceResponse(write(), headers=headers, ping=0, send_timeout=settings.stall_s)


async def set_emergency(request: Request) -> Response:
    """POST /v1/operations/emergency"""
    lookout = get_service(request).lookout
    try:
        asked = EmergencySwitch.model_validate(await read_json(request))
    except ValidationError as error:
        raise InvalidParams.explain(error) from None
    if asked.is_on:
        lookout.declare_emergency(asked.reason)
    else:
        lookout.lift_emergency()
    return _answer(lookout.describe_emergency())
