"""What is checked of the routes of old, as their clients use them: these wait for nothing that an answer says, and take
any poll that is refused for the end."""

import asyncio
import secrets
from typing import Any

import httpx
import orjson
from websockets.asyncio.client import connect

from app.checks.course import SOON_S, Course
from app.checks.limits import SUBMITS_MAX
from app.checks.probe import NotApplicable, Probe, fail, read_limit, show_seconds
from app.checks.requests import time_answers
from app.core.event import EventType
from app.follow import read_refusal

# The playbook's poller.
FIRST_S, MOST_S, GROWTH, ATTEMPTS = 5.0, 30.0, 1.2, 100
DAYS = 20  # with matches, that the scan is about
NO_SCAN = "s_nonsense"
Key = tuple[str, str]


async def get_legacy(course: Course) -> str:
    """A scan that was submitted by the route of old; the answer to that is kept. Raises NotApplicable."""
    probe = course.probe
    if course.legacy:
        return str(course.legacy["scan_id"])
    if (await probe.request("GET", "/api/health")).status_code == 404:
        raise NotApplicable("the routes of old are not served here")
    days = sorted({row["date"] for row in _list_market_rows(course)})[-DAYS:]
    body: dict[str, Any] = {"start_date": days[0], "end_date": days[-1]} if days else {}
    # So that it equals no other scan, and may be cancelled.
    body["filters"] = {"min_volume": secrets.randbelow(1_000_000)}
    executed = probe.read_json(await probe.request("POST", "/api/scan/execute", json=body), 200)
    if executed.get("success") is not True or not executed.get("scan_id"):
        fail(f"POST /api/scan/execute says {str(executed)[:80]}")
    course.legacy = executed
    probe.scans[executed["scan_id"]] = None
    return str(executed["scan_id"])


def _list_market_rows(course: Course) -> list[dict[str, Any]]:
    told = course.told.get(course.market_id, ())
    return [row for event in told if event.type == EventType.MATCHES for row in event.data["rows"]]


async def check_results(course: Course) -> str:
    """As the playbook's poller: 5 s to 30 s apart. Then every address has the same rows."""
    probe, scan_id = course.probe, await get_legacy(course)
    pause_s, until = FIRST_S, probe.clock() + course.max_scan_s + SOON_S
    for attempt in range(1, ATTEMPTS + 1):
        await probe.wait(pause_s, "the next poll")
        status = probe.read_json(await probe.http.get(f"/api/scan/status/{scan_id}"), 200)
        if status.get("status") == "completed":
            break
        if status.get("status") not in ("initializing", "running") or status.get("results"):
            fail(f"poll {attempt} says {status.get('status')!r}, with {len(status.get('results') or ())} rows")
        if probe.clock() > until:
            fail(f"at poll {attempt} it is still {status['status']!r}, after {course.max_scan_s + SOON_S:g} s")
        pause_s = min(pause_s * GROWTH, MOST_S)
    else:
        fail(f"{ATTEMPTS} polls, and it is not completed")
    wanted = await _read_rows(probe, scan_id)
    answers = {"status": status, **await _ask_all(probe, scan_id)}
    if course.legacy.get("execution_time"):  # it was the last word
        answers["execute"] = course.legacy
    for name, answer in answers.items():
        _compare(name, answer, wanted)
    return f"completed at poll {attempt} of {ATTEMPTS}; {len(wanted):,} rows, the same by {', '.join(answers)}"


async def _ask_all(probe: Probe, scan_id: str) -> dict[str, Any]:
    paths = {"results": f"/api/scan/results/{scan_id}", "scans": f"/api/scans/{scan_id}"}
    return {name: probe.read_json(await probe.request("GET", path), 200) for name, path in paths.items()}


async def _read_rows(probe: Probe, scan_id: str) -> set[Key]:
    body = await probe.get_json(f"/v1/scans/{scan_id}/matches")
    return {(row["symbol"], row["date"]) for row in body["rows"]}


def _compare(name: str, answer: dict[str, Any], wanted: set[Key]) -> None:
    rows = [(row["ticker"], row["date"]) for row in answer["results"]]
    if len(rows) != len(wanted) or set(rows) != wanted or answer["total_found"] != len(wanted):
        fail(f"{name} has {len(rows):,} rows and says {answer['total_found']}; /v1 has {len(wanted):,}")


async def check_refusals(course: Course) -> str:
    """With a reason, and with what takes the place of each address."""
    probe, scan_id = course.probe, await get_legacy(course)
    asked = (
        ("a scan that is", "GET", f"/api/scan/status/{scan_id}", None, 200),
        ("an unknown scan", "GET", f"/api/scan/status/{NO_SCAN}", None, 404),
        ("its results", "GET", f"/api/scan/results/{NO_SCAN}", None, 404),
        ("code", "POST", "/api/scan/execute", {"uploaded_code": "def main(): pass"}, 400),
        ("a day that is none", "POST", "/api/scan/execute", {"start_date": "2024-02-31"}, 422),
    )
    wrong = []
    for name, method, path, body, expected in asked:
        answer = await probe.request(method, path, **({} if body is None else {"json": body}))
        if answer.status_code != expected:
            wrong.append(f"{name}: answered with {answer.status_code}, and not {expected}")
        elif expected != 200 and not _has_detail(answer):
            wrong.append(f"{name}: refused without a reason")
        elif "deprecation" not in answer.headers or "successor-version" not in answer.headers.get("link", ""):
            wrong.append(f"{name}: the answer does not say what takes the place of its address")
    if wrong:
        fail("; ".join(wrong))
    return f"{len(asked) - 1} refusals with a reason; every answer names the address that takes its place"


def _has_detail(answer: httpx.Response) -> bool:
    try:
        return bool(orjson.loads(answer.content)["detail"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return False


async def check_answer_time(course: Course) -> str:
    """The playbook's benchmark: ten requests, one after another."""
    return await time_answers(course, f"/api/scan/status/{await get_legacy(course)}")


async def check_rate_limit(course: Course) -> str:
    """The playbook's test of a limit: the first post is taken, and the third within a minute is not."""
    probe = course.probe
    await get_legacy(course)
    path, body = "/api/operation/execute", {"operation": "load test"}
    answer = await probe.request("POST", path, json=body)
    scan_id = probe.read_json(answer, 200)["scan_id"]
    declared = read_limit(answer)
    quota, left = (2, 2) if declared is None else (declared[0], declared[2])
    if left > SUBMITS_MAX:
        raise NotApplicable(f"{quota:,} at once are too many to reach the limit politely")
    number, began = 1, probe.clock()
    while answer.status_code != 429:
        if number > max(quota, 2):
            if declared is not None and (took_s := probe.clock() - began) > declared[1] / quota:
                raise NotApplicable(
                    f"{number} posts took {show_seconds(took_s)}, in which the limit lets in another one"
                )
            fail(f"{number} posts one after another, and none was refused; the limit is said to be {quota}")
        answer = await probe.http.post(path, json=body)
        number += 1
        if answer.status_code != 429:
            probe.read_json(answer, 200)
    if not read_refusal(answer).retry_after_s or "retry-after" not in answer.headers:
        fail(f"post {number} was refused with 429, without Retry-After")
    # All who post here share one scan: it is not ours to cancel, and it ends soon.
    until = probe.clock() + course.max_scan_s + SOON_S
    while (await probe.get_json(f"/v1/scans/{scan_id}"))["end"] is None:
        if probe.clock() > until:
            fail(f"the scan that was posted has not ended after {course.max_scan_s + SOON_S:g} s")
        await probe.wait(1, "the end of the scan that was posted")
    return f"post 1 was taken, and post {number} refused with 429, Retry-After {answer.headers['retry-after']}"


async def check_socket(course: Course) -> str:
    """Who comes late gets `connected` and `final`, with the rows, and then the close."""
    probe, scan_id = course.probe, await get_legacy(course)
    url = str(probe.http.base_url.join(f"/api/scan/progress/{scan_id}")).replace("http", "ws", 1)
    messages: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(course.max_scan_s + SOON_S):
            async with connect(url, additional_headers=probe.headers, compression=None, max_size=None) as socket:
                messages.extend([orjson.loads(text) async for text in socket])
    except TimeoutError:
        fail(f"{len(messages)} messages, and no close after {course.max_scan_s + SOON_S:g} s")
    types = [str(message.get("type")) for message in messages]
    completed = [type_ for type_, message in zip(types, messages, strict=True) if message.get("status") == "completed"]
    if types[:1] != ["connected"] or types[-1:] != ["final"] or completed != ["final"]:
        fail(f"the messages are {', '.join(types) or 'none'}; {', '.join(completed) or 'none'} say completed")
    wanted = await _read_rows(probe, scan_id)
    _compare("final", messages[-1], wanted)
    return f"{', '.join(types)}: {len(wanted):,} rows"
