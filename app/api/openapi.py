"""GET /openapi.json: what this service takes and gives, as OpenAPI 3.1, made from its models and error tree.

The table is in `app.api.endpoints`. Schemas come from `app.api.models`, `Submission` and the scanners' parameter
models; refusals (status, title, problem type) come from `app.core.errors`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from app import __version__
from app.api import diagnosis, external, legacy_endpoints, models, operations
from app.api.diagnosis_endpoints import ENDPOINTS as DIAGNOSIS_ENDPOINTS
from app.api.endpoints import IF_NONE_MATCH, REF, Answer, Endpoint, Parameter, Schema, list_endpoints
from app.api.formats import JSON
from app.api.legacy_endpoints import list_legacy_endpoints
from app.core.errors import Forbidden, InvalidRequest, KeyRequired, ScanwireError, TooLarge
from app.core.scan import State
from app.core.settings import Settings
from app.engine.admission import Submission
from app.engine.said import SUMMARY, TITLE, ExternalParams
from app.scanners.registry import EXTERNAL, Scanner, list_scanners

PROBLEM = "application/problem+json"

DESCRIPTION = """\
Submit a scan, and be pushed what it finds: over server-sent events, newline-delimited JSON, long polls, or the
WebSocket at `/v1/ws` (subprotocol `scanwire.v1`), which OpenAPI cannot describe. The events are the same everywhere,
and one cursor works on all of them. Every refusal is problem+json and says what to do next; a request that is no
HTTP at all is refused by the server below, in plain text. HEAD works wherever GET does. Members and values that are
not named here are refused in bodies; unknown query parameters are ignored."""

# Header fields

_HEADERS: dict[str, tuple[Schema, str]] = {
    "Location": ({"type": "string"}, "address of the scan"),
    "ETag": ({"type": "string", "pattern": '^(W/)?"[^"]*"$'}, "send it as If-None-Match"),
    "Retry-After": ({"type": "integer", "minimum": 0}, "seconds until asking again is worth it"),
    "RateLimit-Policy": (
        {"type": "string", "pattern": '^"[a-z-]+";q=[0-9]+;w=[0-9]+$'},
        "the limit: `q` requests in `w` seconds",
    ),
    "RateLimit": (
        {"type": "string", "pattern": '^"[a-z-]+";r=[0-9]+;t=[0-9]+$'},
        "what is left of it: `r` requests; full again in `t` seconds",
    ),
    "Preference-Applied": ({"type": "string", "pattern": "^wait=[0-9.]+$"}, "how long the server was ready to wait"),
    "Scanwire-State": (
        {"type": "string", "enum": [state.value for state in State]},
        "state of the scan; before its end, rows may still come",
    ),
    "Content-Disposition": (
        {"type": "string"},
        "a file name; of CSV and Parquet. It begins with `synthetic-` where prices are invented",
    ),
    "Deprecation": ({"type": "string", "pattern": "^@[0-9]+$"}, "since when, in seconds since 1970 (RFC 9745)"),
    "Link": ({"type": "string"}, "what takes the place of this address, as `successor-version`"),
    "WWW-Authenticate": ({"type": "string"}, "how to send a key or token"),
}
# Fields of refusals, by status; those that need not be there end in `?`.
_REFUSAL_HEADERS = {
    401: ("WWW-Authenticate",),
    429: ("Retry-After", "RateLimit-Policy?", "RateLimit?"),
    503: ("Retry-After?",),
}

# The document


def make_document(settings: Settings) -> Schema:
    """The whole document for a server with these settings."""
    endpoints = [*list_endpoints(settings), *list_legacy_endpoints(), *DIAGNOSIS_ENDPOINTS, _OWN]
    refs, schemas = _make_schemas(list_scanners())
    paths: dict[str, Schema] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method] = _make_operation(endpoint, settings, refs)
    document: Schema = {
        "openapi": "3.1.0",
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "info": {"title": "Scanwire", "version": __version__, "description": DESCRIPTION, "license": {"name": "MIT"}},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "producer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The `producer_token` that came with an external scan; no API key goes with it.",
                }
            },
        },
    }
    if settings.api_keys or settings.operator_keys:
        document["components"]["securitySchemes"] |= {
            "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        document["security"] = _WITH_KEY if settings.api_keys else [{}, *_WITH_KEY]
    return document


_WITH_KEY: list[dict[str, list[str]]] = [{"bearer": []}, {"header": []}]


def _make_schemas(scanners: Sequence[Scanner]) -> tuple[Mapping[Any, Schema], dict[str, Schema]]:
    """A reference for each model, and all schemas by name."""
    wanted: list[type[BaseModel]] = [
        *models.ANSWERS,
        *operations.ANSWERS,
        *diagnosis.ANSWERS,
        *external.MODELS,
        *legacy_endpoints.MODELS,
        Submission,
        ExternalParams,
        *dict.fromkeys(one.params for one in scanners),
    ]
    refs, made = models_json_schema([(model, "validation") for model in wanted], ref_template=REF)
    by_model = {model: ref for (model, _), ref in refs.items()}
    schemas: dict[str, Schema] = dict(sorted(made["$defs"].items()))
    plain = schemas["Submission"]
    schemas["Submission"] = {
        "description": plain["description"],
        "oneOf": [
            *(_make_variant(plain, one.name, one.title, one.summary, by_model[one.params]) for one in scanners),
            _make_variant(plain, EXTERNAL, TITLE, SUMMARY, by_model[ExternalParams]),
        ],
    }
    return by_model, schemas


def _make_variant(submission: Schema, name: str, title: str, summary: str, params: Schema) -> Schema:
    """The submission of a scan by one scanner."""
    own = {
        "scanner": {"const": name, "type": "string", "title": title},
        "params": {**params, "description": submission["properties"]["params"]["description"], "default": {}},
    }
    return {
        **{name: value for name, value in submission.items() if name != "description"},
        "title": title,
        "description": summary,
        "properties": submission["properties"] | own,
    }


def make_examples(scanners: Sequence[Scanner]) -> dict[str, Schema]:
    """One submission for each scanner that works on any price data."""
    values = {"start": "2010-01-01", "where": "close > 20 AND vol_ratio > 1"}
    return {
        scanner.name: {
            "summary": scanner.title,
            "value": {
                "scanner": scanner.name,
                "params": ({"preset": next(iter(scanner.presets))} if scanner.presets else {}) | values,
            },
        }
        for scanner in scanners
    }


_EXTERNAL_EXAMPLE: dict[str, Schema] = {
    EXTERNAL: {
        "summary": TITLE,
        "value": {"scanner": EXTERNAL, "params": {"title": "Nightly report", "total": 3, "unit": "pages"}},
    }
}


def _make_operation(endpoint: Endpoint, settings: Settings, refs: Mapping[Any, Schema]) -> Schema:
    operation: Schema = {
        "operationId": endpoint.id or endpoint.handler.__name__,
        "summary": endpoint.summary,
        "tags": [_choose_tag(endpoint)],
    }
    if endpoint.is_deprecated:
        operation["deprecated"] = True
    if endpoint.text:
        operation["description"] = endpoint.text
    if endpoint.parameters:
        operation["parameters"] = [_make_parameter(parameter) for parameter in endpoint.parameters]
    if endpoint.takes_submission:
        content = {"schema": refs[Submission], "examples": make_examples(list_scanners()) | _EXTERNAL_EXAMPLE}
        operation["requestBody"] = {"required": True, "content": {JSON: content}}
    if endpoint.takes:
        content = _make_content(endpoint.takes, refs)
        operation["requestBody"] = {"required": not endpoint.is_body_optional, "content": content}
    if endpoint.needs_token:
        operation["security"] = [{"producer": []}]
    if endpoint.is_probe and (settings.api_keys or settings.operator_keys):
        operation["security"] = []
    elif endpoint.needs_operator and settings.operator_keys:
        operation["security"] = _WITH_KEY
    responses = {status: _make_answer(answer, refs) for status, answer in endpoint.answers.items()}
    by_status: dict[int, list[type[ScanwireError]]] = {}
    for refusal in list_refusals(endpoint, settings):
        by_status.setdefault(refusal.status, []).append(refusal)
    responses |= {status: _make_refusal(status, kinds, refs) for status, kinds in by_status.items()}
    if endpoint.is_deprecated:
        marks = _make_headers(("Deprecation", "Link"))["headers"]
        for response in responses.values():
            response["headers"] = response.get("headers", {}) | marks
    operation["responses"] = {str(status): responses[status] for status in sorted(responses)}
    return operation


def _choose_tag(endpoint: Endpoint) -> str:
    if endpoint.is_deprecated:
        return "legacy"
    return "scans" if "scan" in endpoint.path or "events" in endpoint.path else "operations"


def list_refusals(endpoint: Endpoint, settings: Settings) -> dict[type[ScanwireError], None]:
    """What can refuse a request to this endpoint: its own reasons, and those of `app.api.security`."""
    refusals = [*endpoint.refusals, TooLarge, ScanwireError]
    if not endpoint.is_probe:
        refusals.append(InvalidRequest)
        if (settings.api_keys or settings.operator_keys) and not endpoint.needs_token:
            refusals.append(KeyRequired)
    if endpoint.is_stream or endpoint.method != "get":
        refusals.append(Forbidden)
    return dict.fromkeys(refusals)


def _make_parameter(parameter: Parameter) -> Schema:
    return {
        "name": parameter.name,
        "in": parameter.place,
        "required": parameter.required,
        "description": parameter.text,
        "schema": parameter.schema,
    }


def _make_content(content: Mapping[str, type[BaseModel] | Schema], refs: Mapping[Any, Schema]) -> Schema:
    return {
        media_type: body if isinstance(body, dict) else {"schema": refs[body]} for media_type, body in content.items()
    }


def _make_answer(answer: Answer, refs: Mapping[Any, Schema]) -> Schema:
    content = _make_content(answer.content, refs)
    made: Schema = {"description": answer.text}
    return made | ({"content": content} if content else {}) | _make_headers(answer.headers)


def _make_refusal(status: int, kinds: Sequence[type[ScanwireError]], refs: Mapping[Any, Schema]) -> Schema:
    own = {"type": {"enum": sorted({kind.type for kind in kinds})}, "status": {"const": status}}
    schema = {"allOf": [refs[models.Problem]], "properties": own}
    text = "; ".join(dict.fromkeys(kind.title for kind in kinds))
    return {"description": f"{text}.", "content": {PROBLEM: {"schema": schema}}} | _make_headers(
        _REFUSAL_HEADERS.get(status, ())
    )


def _make_headers(names: Sequence[str]) -> Schema:
    headers = {}
    for name in names:
        bare = name.removesuffix("?")
        schema, text = _HEADERS[bare]
        headers[bare] = {"description": text, "required": bare == name, "schema": schema}
    return {"headers": headers} if headers else {}


# The handler


class _Encoded(NamedTuple):
    body: bytes
    etag: str


@lru_cache(maxsize=4)
def _encode(settings: Settings) -> _Encoded:
    body = orjson.dumps(make_document(settings))
    return _Encoded(body, f'"{hashlib.sha256(body).hexdigest()[:16]}"')


async def make_openapi(request: Request) -> Response:
    """GET /openapi.json"""
    body, etag = _encode(request.app.state.settings)
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=JSON)


_OWN = Endpoint(
    method="get",
    path="/openapi.json",
    handler=make_openapi,
    summary="This document",
    parameters=[IF_NONE_MATCH],
    answers={
        200: Answer(text="OpenAPI 3.1.", content={JSON: {"schema": {"type": "object"}}}, headers=("ETag",)),
        304: Answer(text="Nothing has changed.", headers=("ETag",)),
    },
)
