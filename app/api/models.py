"""The wire format as pydantic models: what every answer and every event looks like.

Nothing is encoded through these (events are turned into JSON once, by hand, for speed). They are what /openapi.json
is made of, and the tests hold every real answer against them, so neither can drift from the other. A docstring here
is a description there.
"""

import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel
from pydantic.json_schema import SkipJsonSchema

from app.core.event import CURSOR_PATTERN
from app.core.scan import State
from app.engine.worker import COMMON_COLUMNS

SCAN_ID = r"^s_[A-Za-z0-9_-]{22}$"
CURSOR = f"^{CURSOR_PATTERN.pattern}$"

ScanId = Annotated[str, Field(pattern=SCAN_ID, description="id of a scan; who knows it may read it")]
DataVersion = Annotated[str, Field(description="of the prices that were read; `synthetic-` before it: invented")]
CursorText = Annotated[str, Field(pattern=CURSOR, description="position in the order of durable events: <epoch>-<n>")]
TimeMs = Annotated[int, Field(description="milliseconds since 1970", ge=0)]
Count = Annotated[int, Field(ge=0)]
RangeS = Annotated[tuple[float, float], Field(description="low and high, in seconds")]
TerminalState = Literal["completed", "failed", "cancelled", "lost"]


def _drop_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


class Wire(BaseModel):
    """Every member named, and none that is not."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# Refusals


class FieldError(Wire):
    """One value that is wrong, and what would be right."""

    field: str
    message: str


class Problem(Wire):
    """A refusal or failure (RFC 9457) that says what to do next. Members without a value are left out."""

    type: Annotated[str, Field(description="a URI that names the kind of problem")]
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: Annotated[str, Field(description="what happened and what to do next, in a sentence or two")]
    retry_after_s: Annotated[float, Field(ge=0)] | SkipJsonSchema[None] = Field(
        None, description="the same request may work after so many seconds", json_schema_extra=_drop_default
    )
    errors: list[FieldError] | SkipJsonSchema[None] = Field(None, json_schema_extra=_drop_default)
    limit: str | SkipJsonSchema[None] = Field(
        None, description="name of the limit that was hit", json_schema_extra=_drop_default
    )
    violated_policies: list[str] | SkipJsonSchema[None] = Field(
        None, alias="violated-policies", description="as in RateLimit-Policy", json_schema_extra=_drop_default
    )
    max_bytes: int | SkipJsonSchema[None] = Field(None, json_schema_extra=_drop_default)
    expected: int | SkipJsonSchema[None] = Field(
        None, description="the Producer-Seq that would fit", json_schema_extra=_drop_default
    )
    state: State | SkipJsonSchema[None] = Field(
        None, description="how the scan has ended", json_schema_extra=_drop_default
    )
    incident: str | SkipJsonSchema[None] = Field(
        None, description="quote it to who runs the server", json_schema_extra=_drop_default
    )


# What events carry


class Queued(Wire):
    position: Annotated[int, Field(ge=1, description="1 is next")]
    eta_s: RangeS


class Started(Wire):
    scanner: str
    params: Annotated[dict[str, Any], Field(description="normalised: every default is filled in")]
    total: Annotated[Count | None, Field(description="units of work; null: not known yet")]
    unit: str
    data_version: DataVersion
    attempt: Annotated[int, Field(ge=1, description="more than 1 after a restart of the server")]


class Progress(Wire):
    """Work done so far."""

    done: Count
    total: Annotated[Count | None, Field(description="null: not known yet")]
    unit: str
    rate: Annotated[float | None, Field(description="units per second")]
    eta_s: RangeS | None
    matches: Annotated[int, Field(ge=0, description="found so far")]
    phase: str


def _describe_columns(schema: dict[str, Any]) -> None:
    for name, text in COMMON_COLUMNS.items():
        schema["properties"][name]["description"] = text


class MatchRow(BaseModel):
    """One match: the columns that all scanners have, and the scanner's own (see GET /v1/scanners)."""

    model_config = ConfigDict(extra="allow", frozen=True, json_schema_extra=_describe_columns)
    __pydantic_extra__: dict[str, float | str | bool | None]

    symbol: str
    date: datetime.date
    setup: str
    close: float
    volume: int
    gap_pct: float | None
    gap_atr: float | None
    adv20_usd: float | None
    parabolic_score: float | None


class ExternalRow(RootModel[dict[str, float | str | bool | None]]):
    """One match of an external scan: the columns that its producer gave it."""


Rows = list[MatchRow] | list[ExternalRow]


class FoundMatches(Wire):
    chunk: Annotated[int, Field(ge=0, description="the unit of work that they come from")]
    rows: Rows


class Cancelling(Wire):
    by: Annotated[str, Field(description="`client`, or the part of the server that did it and why")]


class Skipped(Wire):
    """Rows of one symbol that were left out, and why."""

    symbol: str
    reason: str


class End(Wire):
    """How a scan ended. There is exactly one for each scan."""

    state: TerminalState
    matches: Count
    last_seq: Annotated[int, Field(ge=1, description="seq of this event")]
    digest: Annotated[
        str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 over the rows as JSON with sorted keys, one a line")
    ]
    elapsed_s: Annotated[float, Field(ge=0, description="since its first start, over restarts of the server too")]
    skipped: list[Skipped]
    skipped_symbols: Annotated[int, Field(ge=0, description="how many there are, those not listed too")]
    error: Annotated[Problem | None, Field(description="why it failed or was lost")]
    truncated: Annotated[bool, Field(description="there were more matches than are kept")]


class Links(Wire):
    self: str
    events: str
    matches: str
    ws: str
    cancel: str


class Snapshot(Wire):
    """A scan at one moment. Reading events from `cursor` on gives exactly what it does not hold yet."""

    id: ScanId
    scanner: str
    params: Annotated[dict[str, Any], Field(description="normalised: every default is filled in")]
    state: State
    position: Annotated[int | None, Field(description="in the queue; 1 is next")]
    eta_s: Annotated[RangeS | None, Field(description="until the start, while queued")]
    progress: Progress | None
    matches: Annotated[int, Field(ge=0, description="found so far")]
    cursor: CursorText
    created_ts: TimeMs
    started_ts: TimeMs | None
    finished_ts: TimeMs | None
    data_version: DataVersion
    attempt: Count
    joined: Annotated[bool, Field(description="an earlier scan that answers the same question")]
    poll_after_s: Annotated[float | None, Field(ge=0, description="poll again after this; null: nothing more comes")]
    links: Links
    end: End | None


class Submitted(Snapshot):
    producer_token: str | SkipJsonSchema[None] = Field(
        None,
        description="of an external scan, shown this once: lets its producer post events. A scan that is joined by "
        "its Idempotency-Key comes without",
        json_schema_extra=_drop_default,
    )


class Reset(Wire):
    """The cursor could not be used. This is where the scan stands; everything that is kept follows."""

    reason: Literal["trimmed", "epoch", "unknown"]
    snapshot: Annotated[Snapshot | None, Field(description="null when nothing is kept of the scan")]


class Throttled(Wire):
    """In place of a status that would make an EventSource give up for good."""

    retry_after_s: float | None
    problem: Problem


class Bye(Wire):
    """The server goes away: come back after this time, with the last cursor."""

    reconnect_ms: Count


# Events


class _Durable(Wire):
    id: CursorText
    scan: ScanId
    seq: Annotated[int, Field(ge=1, description="1, 2, 3 … over the durable events of one scan")]
    ts: TimeMs


class QueuedEvent(_Durable):
    type: Literal["queued"]
    data: Queued


class StartedEvent(_Durable):
    type: Literal["started"]
    data: Started


class MatchesEvent(_Durable):
    type: Literal["matches"]
    data: FoundMatches


class CancellingEvent(_Durable):
    type: Literal["cancelling"]
    data: Cancelling


class EndEvent(_Durable):
    type: Literal["end"]
    data: End


class ProgressEvent(Wire):
    """Only the latest is given, and it has no cursor."""

    scan: ScanId
    seq: Annotated[int, Field(ge=1, description="that of the last durable event")]
    ts: TimeMs
    type: Literal["progress"]
    data: Progress


class ResetEvent(Wire):
    scan: ScanId
    seq: Literal[0]
    ts: TimeMs
    type: Literal["reset"]
    data: Reset


class _OfConnection(Wire):
    scan: None
    seq: Literal[0]
    ts: TimeMs


class ThrottledEvent(_OfConnection):
    type: Literal["throttled"]
    data: Throttled


class ByeEvent(_OfConnection):
    type: Literal["bye"]
    data: Bye


class Event(
    RootModel[
        Annotated[
            QueuedEvent
            | StartedEvent
            | MatchesEvent
            | CancellingEvent
            | EndEvent
            | ProgressEvent
            | ResetEvent
            | ThrottledEvent
            | ByeEvent,
            Field(discriminator="type"),
        ]
    ]
):
    """The same JSON over SSE (one in each `data:`), NDJSON (one a line), WebSocket (one a message) and polls."""


# Answers


class EventsPage(Wire):
    events: list[Event]
    cursor: Annotated[CursorText, Field(description="send it as `after` the next time")]
    closed: Annotated[bool, Field(description="all of these scans have ended, and everything was given")]
    poll_after_s: Annotated[float | None, Field(ge=0, description="0: there is more already; null: nothing more comes")]


class ScanList(Wire):
    scans: Annotated[list[Snapshot], Field(description="newest first")]
    next: Annotated[str | None, Field(description="address of the next page")]


class Matches(Wire):
    id: ScanId
    scanner: str
    state: Annotated[State, Field(description="the rows are all there once the scan has ended")]
    data_version: DataVersion
    matches: Count
    rows: Rows


class PriceColumns(Wire):
    """Of equal length, oldest day first."""

    date: list[datetime.date]
    open: list[float]
    high: list[float]
    low: list[float]
    close: list[float]
    volume: list[int]


class Prices(Wire):
    symbol: str
    data_version: DataVersion
    is_synthetic: Annotated[bool, Field(description="invented: to be marked wherever they are shown")]
    columns: PriceColumns
    left_out: Annotated[list[str], Field(description="why rows of these days cannot be believed")]
    next: Annotated[datetime.date | None, Field(description="the first day that did not fit: the next `start`")]


class ScannerInfo(Wire):
    name: str
    title: str
    summary: str
    unit: str
    params: Annotated[dict[str, Any], Field(description="JSON Schema of its parameters")]
    presets: Annotated[dict[str, dict[str, Any]], Field(description="named sets of values for `preset`")]
    columns: Annotated[dict[str, str], Field(description="its own columns in a match, and what they mean")]
    is_external: Annotated[bool, Field(description="the server does not work on it: a producer posts its events")]


class ScannerList(Wire):
    scanners: list[ScannerInfo]
    features: Annotated[dict[str, str], Field(description="what `where` knows beside the price columns")]


ANSWERS: tuple[type[BaseModel], ...] = (
    Problem,
    Event,
    Snapshot,
    Submitted,
    ExternalRow,
    EventsPage,
    ScanList,
    Matches,
    Prices,
    ScannerList,
)
