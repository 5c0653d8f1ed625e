"""The OpenAPI document is valid and complete, and what it says is what the server does."""

import copy
import json
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, settings
from pydantic import BaseModel
from schemathesis.checks import CHECKS, load_all_checks
from starlette.applications import Starlette
from starlette.routing import Route

from app.api import diagnosis, models, operations
from app.api.openapi import make_document, make_examples
from app.application import create_app
from app.core.event import EventType
from app.core.settings import Settings, hash_key
from app.eventstream import SseDecoder
from app.scanners.registry import list_scanners
from tests.serving import Serving, serve

DOCUMENT = make_document(Settings())
UNKNOWN = "s_" + "A" * 22
KEYS: dict[str, Any] = {"api_keys": (f"ann:{hash_key('secret')}",), "operator_keys": (f"root:{hash_key('top')}",)}
NDJSON, SSE = {"Accept": "application/x-ndjson"}, {"Accept": "text/event-stream"}


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every object inside a JSON value."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(child)


def make_validator(schema: dict[str, Any], document: dict[str, Any] = DOCUMENT) -> jsonschema_rs.Validator:
    return jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]}, validate_formats=True)


def check_answer(answer: httpx.Response, path: str, document: dict[str, Any] = DOCUMENT) -> httpx.Response:
    """The answer, which is as the document says for its operation: status, header fields, media type and body."""
    operation = document["paths"][path][answer.request.method.lower()]
    assert str(answer.status_code) in operation["responses"], answer.text
    said = operation["responses"][str(answer.status_code)]
    for name, header in said.get("headers", {}).items():
        if name in answer.headers:
            value: Any = answer.headers[name]
            value = int(value) if header["schema"]["type"] == "integer" else value
            make_validator(header["schema"]).validate(value)
        else:
            assert not header["required"], name
    if "content" not in said:
        assert not answer.content
        return answer
    media_type = answer.headers["Content-Type"].partition(";")[0]
    said = said["content"][media_type]
    if "x-item-schema" in said:
        for item in read_items(answer):
            make_validator(said["x-item-schema"], document).validate(item)
    elif media_type.endswith("json"):
        make_validator(said["schema"], document).validate(answer.json())
    return answer


def read_items(answer: httpx.Response) -> list[Any]:
    """What is in an event stream or in lines of JSON."""
    lines = answer.text.splitlines()
    if answer.headers["Content-Type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data:") for line in lines if line.startswith("data:")]
    return [json.loads(line) for line in lines if line]


# The document


def test_the_document_is_valid_openapi_3_1() -> None:
    schemathesis.openapi.from_dict(copy.deepcopy(DOCUMENT)).validate()
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)


def test_every_reference_leads_somewhere() -> None:
    for part in walk(DOCUMENT):
        if "$ref" in part:
            make_validator({"$ref": part["$ref"]})  # raises when there is nothing
            assert part["$ref"].rpartition("/")[2] in DOCUMENT["components"]["schemas"]


def test_every_route_is_documented_and_nothing_else(tmp_path: Path) -> None:
    app: Any = create_app(Settings(state_dir=tmp_path))
    while not isinstance(app, Starlette):
        app = getattr(app, "app", None) or app._security
    served = {
        (route.path.replace(":path", ""), method.lower())
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    documented = {(path, method) for path, item in DOCUMENT["paths"].items() for method in item}
    assert served - {("/", "get"), ("/scans/{id}", "get")} == documented  # a page for people


def test_every_operation_has_an_id_of_its_own() -> None:
    ids = [operation["operationId"] for item in DOCUMENT["paths"].values() for operation in item.values()]
    assert len(ids) == len(set(ids))


def test_keys_are_in_the_document_when_they_are_configured() -> None:
    assert "security" not in DOCUMENT
    assert set(DOCUMENT["components"]["securitySchemes"]) == {"producer"}
    with_keys = make_document(Settings(**KEYS))
    schemathesis.openapi.from_dict(copy.deepcopy(with_keys)).validate()
    assert with_keys["security"] == [{"bearer": []}, {"header": []}]
    for path, item in with_keys["paths"].items():
        for operation in item.values():
            is_probe = path in ("/healthz", "/readyz")
            assert ("401" in operation["responses"]) == (not is_probe)
            assert (operation.get("security") == []) == is_probe
    only_operators = make_document(Settings(operator_keys=KEYS["operator_keys"]))
    assert {} in only_operators["security"]
    assert {} not in only_operators["paths"]["/v1/operations"]["get"]["security"]


def test_every_type_of_event_has_its_model() -> None:
    mapping = DOCUMENT["components"]["schemas"]["Event"]["discriminator"]["mapping"]
    assert set(mapping) == {type_.value for type_ in EventType}


# Real answers


@pytest.fixture(scope="module")
def prices(synthetic_prices: Path) -> Path:
    return synthetic_prices


@pytest.fixture
async def serving(tmp_path: Path, prices: Path) -> AsyncIterator[Serving]:
    async with serve(tmp_path, prices) as running:
        yield running


async def test_the_served_document_is_this_one_and_is_not_sent_twice(serving: Serving) -> None:
    answer = check_answer(await serving.http.get("/openapi.json"), "/openapi.json")
    assert answer.json() == make_document(serving.service.settings)
    again = await serving.http.get("/openapi.json", headers={"If-None-Match": answer.headers["ETag"]})
    assert check_answer(again, "/openapi.json").status_code == 304


async def test_every_example_of_a_submission_works(serving: Serving) -> None:
    submission = make_validator({"$ref": "#/components/schemas/Submission"})
    for name, example in make_examples(list_scanners()).items():
        submission.validate(example["value"])
        answer = check_answer(await serving.http.post("/v1/scans", json=example["value"]), "/v1/scans")
        ended = await serving.finish(answer.json()["id"])
        assert ended["state"] == "completed"
        # What was made of the parameters can be submitted again.
        submission.validate({"scanner": name, "params": ended["params"]})


async def test_every_good_answer_is_as_documented(serving: Serving) -> None:
    http, scan = serving.http, "/v1/scans/{id}"
    one, two = [(await serving.submit(preset="relaxed"))["id"] for _ in range(2)]
    for scan_id in (one, two):
        await serving.finish(scan_id)
    at = f"/v1/scans/{one}"

    joined = await http.post("/v1/scans", json={"scanner": "gap-up", "params": {"preset": "relaxed"}})
    assert check_answer(joined, "/v1/scans").json()["joined"]
    page = check_answer(await http.get("/v1/scans?limit=1"), "/v1/scans").json()
    assert check_answer(await http.get(page["next"]), "/v1/scans").json()["next"] is None
    answer = check_answer(await http.get(at), scan)
    same = await http.get(at, headers={"If-None-Match": answer.headers["ETag"]})
    assert check_answer(same, scan).status_code == 304
    assert check_answer(await http.delete(at), scan).status_code == 200

    for path, address in ((f"{scan}/events", f"{at}/events"), ("/v1/events", f"/v1/events?scan={one}&scan={two}")):
        events = check_answer(await http.get(address), path).json()
        assert events["closed"]
        for headers in (SSE, NDJSON):
            assert read_items(check_answer(await http.get(address, headers=headers), path)) == events["events"]
        done = await http.get(address, headers={**SSE, "Last-Event-ID": events["cursor"]})
        assert check_answer(done, path).status_code == 204
    for suffix in ("json", "ndjson", "csv", "parquet"):
        check_answer(await http.get(f"{at}/matches.{suffix}"), f"{scan}/matches.{{suffix}}")
    matches = check_answer(await http.get(f"{at}/matches"), f"{scan}/matches").json()
    rows = read_items(check_answer(await http.get(f"{at}/matches", headers=NDJSON), f"{scan}/matches"))
    assert matches["rows"] == rows
    assert rows

    for path, model in (
        ("/v1/scanners", models.ScannerList),
        ("/v1/prices/{symbol}", models.Prices),
        ("/v1/performance", operations.Performance),
        ("/v1/operations", operations.Operations),
        ("/v1/diagnosis", diagnosis.DiagnosisReport),
        ("/healthz", operations.Health),
        ("/readyz", operations.Ready),
    ):
        address = path.format(symbol=serving.service.store.symbols[0].symbol)
        model.model_validate_json(check_answer(await http.get(address), path).content, strict=True)
    check_answer(await http.get("/metrics"), "/metrics")

    switch = "/v1/operations/emergency"
    for is_on in (True, False):
        switched = check_answer(await http.post(switch, json={"is_on": is_on}), switch)
        diagnosis.EmergencyStatus.model_validate_json(switched.content, strict=True)
    async with http.stream("GET", "/v1/operations/events") as stream:
        decoder = SseDecoder()
        frames: list[bytes] = []
        async for piece in stream.aiter_bytes():
            frames += decoder.feed_frames(piece)
            if len(frames) == 2:
                break
    for frame in frames:
        diagnosis.OperationsEvent.model_validate_json(frame, strict=True)


async def test_every_refusal_is_as_documented(tmp_path: Path, prices: Path) -> None:
    bounds: dict[str, Any] = {"submit_per_min": 1, "read_burst": 20, "read_per_s": 0.01, "max_body_bytes": 1000}
    async with serve(tmp_path, prices, connect_burst=1, connect_per_s=0.01, **bounds) as serving:
        http, scan = serving.http, "/v1/scans/{id}"
        body = {"scanner": "gap-up"}
        refused = [
            (415, "/v1/scans", await http.post("/v1/scans", content="{}")),
            (400, "/v1/scans", await http.post("/v1/scans", content="{", headers={"Content-Type": "application/json"})),
            (413, "/v1/scans", await http.post("/v1/scans", json={"scanner": "x" * 2000})),
            (422, "/v1/scans", await http.post("/v1/scans", json={"scanner": "nothing"})),
            (403, "/v1/scans", await http.post("/v1/scans", json=body, headers={"Origin": "https://evil.example"})),
            (400, "/v1/scans", await http.get("/v1/scans", headers={"Host": "evil.example"})),
            (422, "/v1/scans", await http.get("/v1/scans?limit=0")),
            (404, scan, await http.get(f"/v1/scans/{UNKNOWN}")),
            (404, scan, await http.delete(f"/v1/scans/{UNKNOWN}")),
            (422, "/v1/events", await http.get("/v1/events")),
            (404, "/v1/prices/{symbol}", await http.get("/v1/prices/NOTHING")),
        ]
        scan_id = (await serving.submit())["id"]
        at = f"/v1/scans/{scan_id}"
        refused += [
            (429, "/v1/scans", await http.post("/v1/scans", json={**body, "reuse": "never"})),
            (400, scan, await http.get(f"{at}?after=nonsense")),
            (400, scan, await http.get(at, headers={"Last-Event-ID": "nonsense"})),
            (400, scan, await http.get(f"{at}?after=nonsense", headers={"Last-Event-ID": "k3f9-1"})),
            (400, f"{scan}/events", await http.get(f"{at}/events", headers={"Last-Event-ID": "nonsense"})),
            (406, f"{scan}/events", await http.get(f"{at}/events", headers={"Accept": "image/png"})),
            (406, f"{scan}/matches", await http.get(f"{at}/matches", headers={"Accept": "image/png"})),
            (422, f"{scan}/matches.{{suffix}}", await http.get(f"{at}/matches.xls")),
        ]
        with serving.service.limits.open_stream("ip:127.0.0.1"):
            refused.append((429, "/v1/events", await refuse_last(http, f"/v1/events?scan={scan_id}", NDJSON)))
        refused.append((429, scan, await refuse_last(http, at, {})))
        for _ in range(2):
            serving.service.limits.refund("read", "ip:127.0.0.1")
        serving.service.admission.is_draining = True
        refused += [
            (503, "/v1/scans", await http.post("/v1/scans", json={**body, "reuse": "never"})),
            (503, "/readyz", await http.get("/readyz")),
        ]
    for status, path, answer in refused:
        assert check_answer(answer, path).status_code == status, answer.text


async def refuse_last(http: httpx.AsyncClient, address: str, headers: dict[str, str]) -> httpx.Response:
    """The answer when a bucket has run dry."""
    for _ in range(100):
        answer = await http.get(address, headers=headers)
        if answer.status_code == 429:
            break
    return answer


async def test_answers_about_keys_are_as_documented(tmp_path: Path, prices: Path) -> None:
    document = make_document(Settings(**KEYS))
    async with serve(tmp_path, prices, **KEYS) as serving:
        for path in document["paths"]:
            if "{" not in path and "get" in document["paths"][path] and path != "/v1/events":
                without = check_answer(await serving.http.get(path), path, document)
                assert without.status_code == (200 if path in ("/healthz", "/readyz") else 401)
        known = {"Authorization": "Bearer secret"}
        refused = await serving.http.get("/v1/operations", headers=known)
        assert check_answer(refused, "/v1/operations", document).status_code == 403
        served = await serving.http.get("/openapi.json", headers=known)
        assert served.json() == json.loads(json.dumps(document))


async def test_every_type_of_event_is_as_documented(tmp_path: Path, prices: Path) -> None:
    events: list[dict[str, Any]] = []
    async with serve(tmp_path / "one", prices, chunk_rows=500, connect_burst=3, connect_per_s=0.001) as serving:
        cancelled = (await serving.submit(preset="relaxed"))["id"]
        async with serving.http.stream("GET", f"/v1/scans/{cancelled}/events", headers=NDJSON) as stream:
            async for line in stream.aiter_lines():
                if line:
                    events.append(json.loads(line))
                    if events[-1]["type"] == "progress":
                        await serving.http.delete(f"/v1/scans/{cancelled}")
        for _ in range(3):  # the last one finds its bucket empty
            foreign = {**SSE, "Last-Event-ID": "elsewhere-1"}
            events += read_items(await serving.http.get(f"/v1/scans/{cancelled}/events", headers=foreign))
    async with serve(tmp_path / "two", prices, chunk_rows=500, scan_deadline_s=0.05) as serving:
        failed = (await serving.submit())["id"]
        await serving.finish(failed)
        events += (await serving.http.get(f"/v1/scans/{failed}/events")).json()["events"]
        assert events[-1]["data"]["error"]["type"] == "urn:scanwire:problem:deadline-exceeded"
    async with serve(tmp_path / "three", prices, chunk_rows=100) as serving:
        stopped = (await serving.submit())["id"]
        async with serving.http.stream("GET", f"/v1/scans/{stopped}/events", headers=NDJSON) as stream:
            async for line in stream.aiter_lines():
                if line:
                    events.append(json.loads(line))
                serving.service.hub.parting.say_at_once(1000)
    validator = make_validator({"$ref": "#/components/schemas/Event"})
    for event in events:
        validator.validate(event)
        models.Event.model_validate_json(json.dumps(event), strict=True)
    assert {event["type"] for event in events} == {type_.value for type_ in EventType}


def test_models_take_no_member_that_is_not_named() -> None:
    for model in vars(models).values():
        if isinstance(model, type) and issubclass(model, models.Wire):
            assert model.model_config["extra"] == "forbid"
    assert issubclass(models.Event, BaseModel)


# Schemathesis: requests made from the document, good and bad, over real HTTP


EXISTING, PRODUCED = "s_" + "E" * 22, "s_" + "P" * 22
TOKEN = {"Authorization": f"Bearer {PRODUCED[2:]}"}


def narrow_ids(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the scans as ids that the fuzzed server has; any other id is then a bad one."""
    document = copy.deepcopy(document)
    for item in document["paths"].values():
        for method, operation in item.items():
            for part in walk(operation):
                if part.get("pattern") == models.SCAN_ID:
                    del part["pattern"]
                    part["enum"] = [PRODUCED if method == "post" else EXISTING]
    return document


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory, sample_prices: Path) -> Iterator[str]:
    """The address of a server on another thread, which has one scan that has ended and one that waits for events."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(serve(tmp_path_factory.mktemp("state"), sample_prices)) as serving,
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secrets.token_urlsafe", lambda size: EXISTING[2:])
            portal.call(partial(serving.submit, preset="relaxed"))
            portal.call(serving.finish, EXISTING)
            patch.setattr("secrets.token_urlsafe", lambda size: PRODUCED[2:])
            portal.call(serving.submit, "external")
        yield serving.url


@schemathesis.serializer("application/x-ndjson")
def write_lines(context: Any, value: Any) -> bytes:
    """One line for each item; anything may be on it, since OpenAPI cannot say what belongs there."""
    items = value if isinstance(value, list) else [value]
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


load_all_checks()
POSITIVE_DATA_ACCEPTANCE = CHECKS.get_one("positive_data_acceptance")
# Of those two, one never ends, and the other changes what the others are answered.
schema = schemathesis.openapi.from_dict(narrow_ids(DOCUMENT)).exclude(path_regex="^/v1/operations/")
schema.config.seed = 1


@schema.parametrize()
@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_requests_made_from_the_document_are_answered_as_it_says(case: Any, fuzzed: str) -> None:
    # JSON Schema cannot say which symbols there are, that start comes before end, or what `where` may hold.
    is_picky = case.method == "POST" or case.operation.label == "GET /v1/prices/{symbol}"
    excluded = [POSITIVE_DATA_ACCEPTANCE] if is_picky else []
    formats = case.operation.definition.raw["responses"].get("200", {}).get("content", {})
    token = TOKEN if case.operation.label == "POST /v1/scans/{id}/events" else {}
    for accept in formats or ["*/*"]:
        headers = {"Accept": accept, **token}
        case.call_and_validate(base_url=fuzzed, headers=headers, excluded_checks=excluded, timeout=10)
