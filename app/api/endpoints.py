"""Every route and method of the application, in one table: what it takes, what it answers, what refuses it.

`app.api.openapi` makes the document of it; a test holds it against the routes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from app.api import external, models, operations, polling, prices, scans, sse
from app.api.formats import CSV, JSON, NDJSON, PARQUET, SSE
from app.core.errors import (
    AtCapacity,
    Conflict,
    Draining,
    Forbidden,
    InvalidCursor,
    InvalidParams,
    InvalidRequest,
    JournalUnavailable,
    NotAcceptable,
    PricesError,
    RateLimited,
    ScanwireError,
    SlowRequest,
    TokenRequired,
    Trimmed,
    UnknownScan,
    UnknownSymbol,
    UnsupportedMedia,
)
from app.core.settings import Settings
from app.engine.admission import MAX_KEY_CHARS

Schema = dict[str, Any]

REF = "#/components/schemas/{model}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    name: str
    place: Literal["path", "query", "header"]
    schema: Schema
    text: str
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What comes with one status that is no refusal. A name in `headers` that ends in `?` is not always there."""

    text: str
    # By media type: the model of a JSON body, or a Media Type Object.
    content: Mapping[str, type[BaseModel] | Schema] = field(default_factory=dict)
    headers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    method: Literal["get", "post", "delete"]
    path: str
    handler: Callable[..., Any]
    summary: str
    text: str = ""
    id: str = ""  # operationId; the handler's name when empty
    parameters: Sequence[Parameter] = ()
    takes_submission: bool = False
    takes: Mapping[str, type[BaseModel] | Schema] = field(default_factory=dict)  # another body, as in Answer.content
    is_body_optional: bool = False
    answers: Mapping[int, Answer]
    # Beside those that can come anywhere, see `app.api.openapi.list_refusals`.
    refusals: tuple[type[ScanwireError], ...] = ()
    is_probe: bool = False  # needs neither key nor a Host that is allowed
    is_stream: bool = False
    needs_operator: bool = False
    needs_token: bool = False  # that of a scan's producer
    is_deprecated: bool = False  # one of old, see `app.api.deprecation`


LIMITED = ("RateLimit-Policy", "RateLimit")

# Parameters

_SCAN_ID = {"type": "string", "pattern": models.SCAN_ID}
_DAY = {"type": "string", "format": "date"}
_CURSOR_OR_NONE = {"type": "string", "pattern": f"^$|{models.CURSOR}"}  # an empty one is none
ID = Parameter(name="id", place="path", schema=_SCAN_ID, text="Id of a scan.", required=True)
AFTER = Parameter(
    name="after", place="query", schema=_CURSOR_OR_NONE, text="Cursor: only what is newer. From the start without one."
)
LAST_EVENT_ID = Parameter(
    name="Last-Event-ID", place="header", schema=_CURSOR_OR_NONE, text="As `after`, and stronger; browsers send it."
)
PREFER = Parameter(
    name="Prefer",
    place="header",
    schema={"type": "string", "examples": ["wait=25"]},
    text="`wait=SECONDS` (RFC 7240): with a cursor and nothing new behind it, the answer is held back for so long.",
)
IF_NONE_MATCH = Parameter(
    name="If-None-Match", place="header", schema={"type": "string"}, text="An ETag; 304 if nothing has changed."
)

# Answers

# OpenAPI 3.1 has no way to say what the items of a stream are; 3.2 calls it `itemSchema`.
_EVENTS: Schema = {"x-item-schema": {"$ref": REF.format(model="Event")}}
_TEXT: Schema = {"schema": {"type": "string"}}
_ROWS: Schema = {"x-item-schema": {"anyOf": [{"$ref": REF.format(model=name)} for name in ("MatchRow", "ExternalRow")]}}
_POLL_HEADERS = ("ETag", "Retry-After?", "Preference-Applied?", *LIMITED)
_MATCHES = Answer(
    text="All rows found so far.",
    content={JSON: models.Matches, NDJSON: _ROWS, CSV: _TEXT, PARQUET: {}},
    headers=("Scanwire-State", "Content-Disposition?", *LIMITED),
)
_EVENTS_TEXT = (
    "Accept chooses: JSON is one page of what is new; event streams and NDJSON stay open until all scans have ended. "
    "Empty lines in NDJSON are heartbeats. An event stream is refused by a 200 with one `throttled` event, since an "
    "EventSource gives up for good on any other status."
)
_EVENT_ANSWERS = {
    200: Answer(
        text="Events, oldest first.",
        content={JSON: models.EventsPage, SSE: _EVENTS, NDJSON: _EVENTS},
        headers=("Retry-After?", "Preference-Applied?", "RateLimit-Policy?", "RateLimit?"),
    ),
    204: Answer(text="All scans have ended and all was given: a stream would be empty.", headers=LIMITED),
}
_EVENT_REFUSALS = (InvalidCursor, UnknownScan, NotAcceptable, RateLimited, AtCapacity)


def _answer_submitted(text: str) -> Answer:
    return Answer(text=text, content={JSON: models.Submitted}, headers=("Location", *LIMITED))


def _answer_snapshot(text: str, *headers: str) -> Answer:
    return Answer(text=text, content={JSON: models.Snapshot}, headers=headers)


def _up_to(most: int) -> Schema:
    return {"type": "integer", "minimum": 1, "maximum": most}


def list_endpoints(settings: Settings) -> list[Endpoint]:
    """One for each route and method of the application, but the WebSocket and the static files."""
    return [
        Endpoint(
            method="post",
            path="/v1/scans",
            handler=scans.submit_scan,
            summary="Submit a scan",
            text="An equal scan that is queued, running or lately finished is joined, at no cost; but an external one, "
            "which equals no other.",
            parameters=[
                Parameter(
                    name="Idempotency-Key",
                    place="header",
                    schema={"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARS},
                    text="The same key with the same body gives the same scan.",
                )
            ],
            takes_submission=True,
            answers={
                200: _answer_submitted("A scan that has ended answers this."),
                202: _answer_submitted("The scan is queued or running."),
            },
            refusals=(
                InvalidRequest,
                SlowRequest,
                Conflict,
                UnsupportedMedia,
                InvalidParams,
                RateLimited,
                AtCapacity,
                Draining,
                JournalUnavailable,
            ),
        ),
        Endpoint(
            method="get",
            path="/v1/scans",
            handler=scans.list_scans,
            summary="List your scans",
            parameters=[
                Parameter(
                    name="limit",
                    place="query",
                    schema={"type": "integer", "minimum": 1, "maximum": scans.PAGE_MAX, "default": scans.PAGE_DEFAULT},
                    text="Scans on a page.",
                ),
                Parameter(
                    name="before", place="query", schema=_SCAN_ID, text="One of your scans: the page starts behind it."
                ),
            ],
            answers={200: Answer(text="A page.", content={JSON: models.ScanList}, headers=LIMITED)},
            refusals=(InvalidParams, RateLimited),
        ),
        Endpoint(
            method="get",
            path="/v1/scans/{id}",
            handler=polling.get_snapshot,
            summary="Poll a scan",
            parameters=[ID, AFTER, LAST_EVENT_ID, PREFER, IF_NONE_MATCH],
            answers={
                200: _answer_snapshot("The scan as it stands.", *_POLL_HEADERS),
                304: Answer(text="Nothing has changed.", headers=_POLL_HEADERS),
            },
            refusals=(InvalidCursor, UnknownScan, RateLimited, AtCapacity),
        ),
        Endpoint(
            method="delete",
            path="/v1/scans/{id}",
            handler=scans.cancel_scan,
            summary="Cancel a scan",
            text="What was found is kept. Only the client that submitted a scan may cancel it.",
            parameters=[ID],
            answers={
                200: _answer_snapshot("It has ended.", *LIMITED),
                202: _answer_snapshot("It is about to end.", *LIMITED),
            },
            refusals=(UnknownScan, RateLimited, JournalUnavailable),
        ),
        Endpoint(
            method="get",
            path="/v1/scans/{id}/events",
            handler=sse.get_scan_events,
            summary="Follow a scan",
            text=_EVENTS_TEXT,
            parameters=[ID, AFTER, LAST_EVENT_ID, PREFER],
            answers=_EVENT_ANSWERS,
            refusals=_EVENT_REFUSALS,
            is_stream=True,
        ),
        Endpoint(
            method="post",
            path="/v1/scans/{id}/events",
            handler=external.post_events,
            summary="Post what the producer of an external scan did",
            text="The events of one request are appended together or, when one of them is refused, not at all. "
            f"A scan whose producer posts nothing for {settings.producer_timeout_s:g} s is lost; an empty array will "
            "do as a sign of life.",
            parameters=[
                ID,
                Parameter(
                    name="Producer-Seq",
                    place="header",
                    schema=_up_to(external.MAX_NUMBER),
                    text="Counts the requests that have it. With the same number a request can be sent again safely: "
                    "it is acknowledged, and not appended twice.",
                ),
            ],
            takes={
                JSON: external.PostedEvents,
                NDJSON: {"x-item-schema": {"$ref": REF.format(model="PostedEvent")}},
            },
            answers={202: Answer(text="All of it is in the journal.", content={JSON: external.Appended})},
            refusals=(
                TokenRequired,
                UnknownScan,
                Conflict,
                SlowRequest,
                UnsupportedMedia,
                InvalidParams,
                JournalUnavailable,
            ),
            needs_token=True,
        ),
        Endpoint(
            method="get",
            path="/v1/events",
            handler=sse.get_events,
            summary="Follow several scans",
            text=_EVENTS_TEXT,
            parameters=[
                Parameter(
                    name="scan",
                    place="query",
                    schema={
                        "type": "array",
                        "items": _SCAN_ID,
                        "minItems": 1,
                        "maxItems": settings.max_scans_per_stream,
                    },
                    text="Id of a scan; give it once for each of them.",
                    required=True,
                ),
                AFTER,
                LAST_EVENT_ID,
                PREFER,
            ],
            answers=_EVENT_ANSWERS,
            refusals=(*_EVENT_REFUSALS, InvalidParams),
            is_stream=True,
        ),
        Endpoint(
            method="get",
            path="/v1/scans/{id}/matches",
            handler=scans.get_matches,
            summary="What a scan found",
            text="Accept chooses the format.",
            parameters=[ID],
            answers={200: _MATCHES},
            refusals=(UnknownScan, NotAcceptable, Trimmed, RateLimited),
        ),
        Endpoint(
            method="get",
            path="/v1/scans/{id}/matches.{suffix}",
            handler=scans.get_matches,
            id="get_matches_file",
            summary="What a scan found, in one format",
            parameters=[
                ID,
                Parameter(
                    name="suffix",
                    place="path",
                    schema={"type": "string", "enum": list(scans._MATCH_FORMATS)},
                    text="The format.",
                    required=True,
                ),
            ],
            answers={200: _MATCHES},
            refusals=(UnknownScan, InvalidParams, Trimmed, RateLimited),
        ),
        Endpoint(
            method="get",
            path="/v1/scanners",
            handler=scans.list_all_scanners,
            summary="What can be scanned for",
            answers={200: Answer(text="Every scanner.", content={JSON: models.ScannerList}, headers=LIMITED)},
            refusals=(RateLimited,),
        ),
        Endpoint(
            method="get",
            path="/v1/prices/{symbol}",
            handler=prices.get_prices,
            summary="Believable prices of one symbol, around a day or from one to another",
            parameters=[
                Parameter(name="symbol", place="path", schema={"type": "string"}, text="AAPL.", required=True),
                Parameter(name="around", place="query", schema=_DAY, text="The day in the middle; `days` rows come."),
                Parameter(name="days", place="query", schema=_up_to(settings.max_price_rows), text="Rows around it."),
                Parameter(name="start", place="query", schema=_DAY, text="The first day."),
                Parameter(name="end", place="query", schema=_DAY, text="The last day; `next` says what did not fit."),
                IF_NONE_MATCH,
            ],
            answers={
                200: Answer(text="Oldest first.", content={JSON: models.Prices}, headers=("ETag", *LIMITED)),
                304: Answer(text="Nothing has changed.", headers=("ETag", *LIMITED)),
            },
            refusals=(UnknownSymbol, InvalidParams, RateLimited, AtCapacity, PricesError),
        ),
        Endpoint(
            method="get",
            path="/v1/performance",
            handler=operations.get_performance,
            summary="How fast the service is just now",
            answers={200: Answer(text="Measured lately.", content={JSON: operations.Performance}, headers=LIMITED)},
            refusals=(RateLimited,),
        ),
        Endpoint(
            method="get",
            path="/v1/operations",
            handler=operations.get_operations,
            summary="All counts, and what is active",
            text="Needs an operator key; where no keys are configured at all, it is open to the server's own machine.",
            answers={200: Answer(text="As of now.", content={JSON: operations.Operations})},
            refusals=(Forbidden,),
            needs_operator=True,
        ),
        Endpoint(
            method="get",
            path="/healthz",
            handler=operations.get_health,
            summary="Does the process live?",
            answers={200: Answer(text="It does.", content={JSON: operations.Health})},
            is_probe=True,
        ),
        Endpoint(
            method="get",
            path="/readyz",
            handler=operations.get_ready,
            summary="Can new scans be taken?",
            answers={
                200: Answer(text="They can.", content={JSON: operations.Ready}),
                503: Answer(text="They cannot; `checks` says why.", content={JSON: operations.Ready}),
            },
            is_probe=True,
        ),
        Endpoint(
            method="get",
            path="/metrics",
            handler=operations.get_metrics,
            summary="Prometheus' text format",
            answers={200: Answer(text="Metrics.", content={"text/plain": _TEXT})},
        ),
    ]
