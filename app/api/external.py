"""What producers of external scans post: POST /v1/scans/{id}/events."""

import asyncio
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NamedTuple

import orjson
from pydantic import BaseModel, Field, RootModel, TypeAdapter, ValidationError
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from app.api.formats import JSON, NDJSON
from app.api.models import Count, CursorText, Wire
from app.api.scans import read_body
from app.api.service import Service, get_service
from app.core.errors import InvalidParams, JournalUnavailable, UnsupportedMedia
from app.core.event import Cursor
from app.core.scan import Scan
from app.engine.said import Said

MAX_ERRORS = 10  # that one refusal names
MAX_NUMBER = 10**15 - 1  # as Producer-Seq
_PATH = re.compile(r"/v1/scans/[^/]+/events")
_NUMBER = re.compile(rb"[1-9][0-9]{0,14}")


class PostedEvent(RootModel[Annotated[Said, Field(discriminator="type")]]):
    """One event of a producer."""


class PostedEvents(RootModel[PostedEvent | list[PostedEvent]]):
    """One event, or several that are appended together. No event at all is a sign of life."""


class Appended(Wire):
    """Everything that was posted is in the journal."""

    cursor: Annotated[CursorText, Field(description="stands behind the last event that was appended")]
    seq: Annotated[Count, Field(description="of the last event that was appended")]


MODELS: tuple[type[BaseModel], ...] = (PostedEvents, Appended)
_ONE: TypeAdapter[Said] = TypeAdapter(Annotated[Said, Field(discriminator="type")])
_SEVERAL = RootModel[list[PostedEvent]]


def has_own_token(method: str, path: str) -> bool:
    """Whether a request must carry the token of a producer rather than an API key."""
    return method == "POST" and _PATH.fullmatch(path) is not None


async def post_events(request: Request) -> Response:
    """POST /v1/scans/{id}/events: a producer appends to its scan."""
    service = get_service(request)
    post = Post.check(service, request.path_params["id"], dict(request.scope["headers"]))
    appending = post.append(service, await read_body(request))
    try:
        async with asyncio.timeout(service.settings.commit_wait_s):
            scan = await appending
    except TimeoutError:
        raise is_unsure() from None
    return Response(acknowledge(service, scan), 202, {"Cache-Control": "no-store"}, JSON)


class Post(NamedTuple):
    """What a producer's request says ahead of its body."""

    scan_id: str
    number: int | None
    media_type: str

    @classmethod
    def check(cls, service: Service, scan_id: str, fields: Mapping[bytes, bytes]) -> "Post":
        """Raises what refuses it, before anything is read of the body."""
        service.producers.check_token(scan_id, _read_token(fields))
        number = _read_number(fields)
        media_type = fields.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
        if media_type not in (JSON, NDJSON):
            raise UnsupportedMedia(f"Content-Type is {media_type or 'missing'!r}; send {JSON} or {NDJSON}.")
        return cls(scan_id, number, media_type)

    def renumber(self, fields: Mapping[bytes, bytes]) -> "Post":
        """One that has the same fields but for these, which may have a Producer-Seq."""
        return self._replace(number=_read_number(fields)) if b"producer-seq" in fields else self

    def append(self, service: Service, body: bytes) -> "asyncio.Future[Scan]":
        """Appends what the body holds; gives what will be the scan when that is committed. Raises what refuses it."""
        return service.producers.append(self.scan_id, _read_events(body, self.media_type), self.number)


def acknowledge(service: Service, scan: Scan) -> bytes:
    """The answer when everything that was posted is in the journal."""
    return orjson.dumps({"cursor": str(Cursor(service.log.epoch, scan.n)), "seq": scan.seq})


def is_unsure() -> JournalUnavailable:
    """The answer when the journal took too long."""
    return JournalUnavailable(
        "The journal cannot be written just now, so it is not sure that this is kept. Post the same again: with the "
        "same Producer-Seq it will not be appended twice.",
        retry_after_s=10,
    )


def _read_token(fields: Mapping[bytes, bytes]) -> str | None:
    scheme, _, token = fields.get(b"authorization", b"").decode("latin-1").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _read_number(fields: Mapping[bytes, bytes]) -> int | None:
    text = fields.get(b"producer-seq")
    if text is None:
        return None
    if _NUMBER.fullmatch(text) is None:
        raise InvalidParams.of("Producer-Seq", "must be a whole number from 1 up; it counts the requests that have one")
    return int(text)


def _read_events(body: bytes, media_type: str) -> list[Said]:
    """The events of a body. Raises InvalidParams, naming each field."""
    try:
        if media_type == NDJSON:
            return [_ONE.validate_json(line) for line in body.split(b"\n") if line.strip()]
        if not body.lstrip().startswith(b"["):
            return [_ONE.validate_json(body)]
        return [one.root for one in _SEVERAL.model_validate_json(body).root]
    except ValidationError:
        return _read_carefully(body, media_type)


def _read_carefully(body: bytes, media_type: str) -> list[Said]:
    """As `_read_events`, and finds out what is wrong where."""
    if media_type == NDJSON:
        lines = [line for line in body.split(b"\n") if line.strip()]
        values: Any = [_parse(line, f"events.{place}") for place, line in enumerate(lines)]
    else:
        values = _parse(body, "events")
    try:
        several = _SEVERAL.model_validate(values if isinstance(values, list) else [values])
    except ValidationError as error:
        raise InvalidParams(
            [
                {"field": _name_field(one["loc"], one["type"]), "message": one["msg"].removeprefix("Value error, ")}
                for one in error.errors(include_url=False, include_context=False, include_input=False)[:MAX_ERRORS]
            ]
        ) from None
    return [one.root for one in several.root]


def _parse(text: bytes, field: str) -> Any:
    """JSON, and NaN and Infinity too: what comes of those is refused where they stand, by name."""
    try:
        return from_json(text)
    except ValueError as error:
        raise InvalidParams.of(field, f"is not JSON: {error}") from None


def _name_field(loc: Iterable[int | str], kind: str) -> str:
    """Where it stands, as in `events.3.rows.0`; pydantic puts the type of the event behind its place."""
    place, *rest = loc
    inner = ["type"] if kind.startswith("union_tag") else rest[1:]
    return ".".join(map(str, ("events", place, *inner)))[:64]
