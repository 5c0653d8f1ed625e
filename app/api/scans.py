"""Scans over HTTP: submit, list, cancel, and what was found."""

import asyncio
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import orjson
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from app.api.formats import CSV, JSON, NDJSON, PARQUET, choose_format
from app.api.polling import hint_next
from app.api.service import Service, get_client, get_service
from app.core.errors import InvalidParams, InvalidRequest, SlowRequest, Trimmed, UnsupportedMedia
from app.core.event import EventType
from app.core.scan import SYNTHETIC, Scan, is_synthetic
from app.core.snapshot import make_snapshot
from app.engine.admission import Submission
from app.engine.export import export_rows
from app.engine.said import SUMMARY, TITLE, ExternalParams
from app.market.features import FEATURE_NAMES
from app.scanners.registry import EXTERNAL, list_scanners

PAGE_DEFAULT, PAGE_MAX = 50, 200
_MATCH_FORMATS = {"json": JSON, "ndjson": NDJSON, "csv": CSV, "parquet": PARQUET}


def make_answer(service: Service, client: str, scan: Scan, *, joined: bool = False) -> dict[str, Any]:
    """The snapshot of a scan for one client, with its poll hint."""
    progress = service.log.get_progress(scan.id)
    poll_after_s = hint_next(service, client, scan)
    return make_snapshot(scan, progress, service.log.epoch, joined=joined, poll_after_s=poll_after_s)


async def read_body(request: Request) -> bytes:
    """The body. Raises TooLarge, SlowRequest."""
    wait_s = get_service(request).settings.body_wait_s
    try:
        async with asyncio.timeout(wait_s):
            return await request.body()
    except TimeoutError:
        raise SlowRequest(f"The body was not there after {wait_s:g} s. Send it in one go.") from None


async def read_json(request: Request) -> Any:
    """The body, which must be JSON. Raises InvalidRequest, UnsupportedMedia, TooLarge, SlowRequest."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != JSON:
        raise UnsupportedMedia(f"Content-Type is {media_type or 'missing'!r}; send {JSON}.")
    body = await read_body(request)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not JSON: {error}.") from None


async def submit_scan(request: Request) -> Response:
    """POST /v1/scans"""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)  # what is refused or joined costs time as well
    body = await read_json(request)
    if not isinstance(body, dict):
        raise InvalidRequest('The body is not a JSON object such as {"scanner":"gap-up"}.')
    asked = Submission.read(body)
    scan, joined, token = await service.admission.submit(client, asked, request.headers.get("idempotency-key"))
    if not joined:
        service.limits.refund("read", client)
    answer = make_answer(service, client, scan, joined=joined)
    if token is not None:
        answer["producer_token"] = token
    headers = {"Location": answer["links"]["self"], "Cache-Control": "no-store"}
    headers |= service.limits.headers("submit", client)
    status = 200 if scan.state.is_terminal else 202
    return Response(orjson.dumps(answer), status, headers, JSON)


async def list_scans(request: Request) -> Response:
    """GET /v1/scans: the client's own, newest first; `?limit=` a page, `?before=` the id where it starts."""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)
    text, before = request.query_params.get("limit", str(PAGE_DEFAULT)), request.query_params.get("before")
    if not (text.isascii() and text.isdigit() and len(text) < 5 and 0 < int(text) <= PAGE_MAX):
        raise InvalidParams.of("limit", f"must be a whole number from 1 to {PAGE_MAX}")
    own = [scan for scan in service.log.list_scans() if scan.client == client]
    if before is not None:
        places = [place for place, scan in enumerate(own) if scan.id == before]
        if not places:
            raise InvalidParams.of("before", "must be the id of one of your scans")
        own = own[places[0] + 1 :]
    limit = int(text)
    page = own[:limit]
    answer = {
        "scans": [make_answer(service, client, scan) for scan in page],
        "next": f"/v1/scans?limit={limit}&before={page[-1].id}" if len(own) > limit else None,
    }
    headers = {"Cache-Control": "no-store", **service.limits.headers("read", client)}
    return Response(orjson.dumps(answer), headers=headers, media_type=JSON)


async def cancel_scan(request: Request) -> Response:
    """DELETE /v1/scans/{id}"""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)
    scan = await service.admission.cancel(client, request.path_params["id"])
    answer = make_answer(service, client, scan)
    headers = {"Cache-Control": "no-store", **service.limits.headers("read", client)}
    return Response(orjson.dumps(answer), 200 if scan.state.is_terminal else 202, headers, JSON)


@cache
def _describe_params(params: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema, made once: for all scanners it is work for 25 ms, and the loop has others to serve."""
    return params.model_json_schema()


async def list_all_scanners(request: Request) -> Response:
    """GET /v1/scanners: each with the JSON Schema of its parameters, and the names that `where` knows."""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)
    scanners = [
        {
            "name": scanner.name,
            "title": scanner.title,
            "summary": scanner.summary,
            "unit": scanner.unit,
            "params": _describe_params(scanner.params),
            "presets": scanner.presets,
            "columns": scanner.columns,
            "is_external": False,
        }
        for scanner in list_scanners()
    ]
    external = {
        "name": EXTERNAL,
        "title": TITLE,
        "summary": SUMMARY,
        "unit": ExternalParams().unit,
        "params": _describe_params(ExternalParams),
        "presets": {},
        "columns": {},
        "is_external": True,
    }
    answer = {"scanners": [*scanners, external], "features": FEATURE_NAMES}
    headers = service.limits.headers("read", client)
    return Response(orjson.dumps(answer), headers=headers, media_type=JSON)


async def get_matches(request: Request) -> Response:
    """GET /v1/scans/{id}/matches, with a suffix for the format or by Accept"""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)
    scan = service.log.get(request.path_params["id"])
    suffix = request.path_params.get("suffix")
    if suffix is None:
        format_ = choose_format(request.headers.get("accept"), tuple(_MATCH_FORMATS.values()))
    elif (format_ := _MATCH_FORMATS.get(suffix, "")) == "":
        raise InvalidParams.of("suffix", f"{suffix[:20]!r} is not one of {', '.join(_MATCH_FORMATS)}")
    if scan.is_trimmed and scan.matches:
        raise Trimmed("The rows of this scan are past their retention; its end is kept. Submit the scan again.")
    headers = {
        "Cache-Control": "no-store",
        # What is not there yet must not look like "nothing was found".
        "Scanwire-State": scan.state,
        **service.limits.headers("read", client),
    }
    if format_ in (CSV, PARQUET):
        pages = [event.json async for event in read_matches(service, scan)]
        columns = () if scan.scanner == EXTERNAL else ("symbol", "date")
        body = await service.runner.pool.call(export_rows, pages, format_ == CSV, columns)
        extension = "csv" if format_ == CSV else "parquet"
        mark = SYNTHETIC if is_synthetic(scan.data_version) else ""
        headers["Content-Disposition"] = f'attachment; filename="{mark}{scan.scanner}-{scan.id[2:10]}.{extension}"'
        return Response(body, headers=headers, media_type=format_)
    write = _write_json if format_ == JSON else _write_ndjson
    return StreamingResponse(write(service, scan), headers=headers, media_type=format_)


async def read_matches(service: Service, scan: Scan) -> AsyncIterator[Any]:
    """The events with matches, up to the state that `scan` is in."""
    after = 0
    while after < scan.n and (events := await service.log.read(scan.id, after)):
        if service.log.get(scan.id).is_trimmed:
            raise Trimmed("The rows went past their retention while they were read. Submit the scan again.")
        for event in events:
            after = event.n
            if after <= scan.n and event.type is EventType.MATCHES:
                yield event


async def _write_json(service: Service, scan: Scan) -> AsyncIterator[bytes]:
    head = {
        "id": scan.id,
        "scanner": scan.scanner,
        "state": scan.state,
        "data_version": scan.data_version,
        "matches": scan.matches,
    }
    yield orjson.dumps(head)[:-1] + b',"rows":['
    comma = b""
    async for event in read_matches(service, scan):
        rows = orjson.dumps(event.load_data()["rows"])[1:-1]
        if rows:
            yield comma + rows
            comma = b","
    yield b"]}"


async def _write_ndjson(service: Service, scan: Scan) -> AsyncIterator[bytes]:
    async for event in read_matches(service, scan):
        yield b"".join(orjson.dumps(row) + b"\n" for row in event.load_data()["rows"])
