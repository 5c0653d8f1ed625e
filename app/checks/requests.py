"""What is checked of single requests: that the server lives, refuses what is wrong, and answers in time."""

import contextlib
import math
import re
import time
from statistics import mean
from typing import Any, NamedTuple

import httpx

from app.checks.course import Course
from app.checks.probe import Probe, fail, show_seconds
from app.follow import read_refusal

ANSWERS = 10  # that are timed


async def check_health(course: Course) -> str:
    body = await course.probe.get_json("/healthz")
    return "/healthz answers ok" if body.get("status") == "ok" else fail(f"/healthz says {body}")


async def check_readiness(course: Course) -> str:
    answer = await course.probe.http.get("/readyz")
    checks = course.probe.read_json(answer, 200, 503).get("checks", {})
    wrong = [f"{name}: {text}" for name, text in checks.items() if text != "ok"]
    if answer.status_code != 200 or wrong:
        fail(f"/readyz answers {answer.status_code}: {'; '.join(wrong) or 'no reason given'}")
    return f"/readyz answers ready: {', '.join(checks)}"


async def read_metrics(probe: Probe) -> dict[str, float]:
    """The samples without labels. Raises Unmet."""
    answer = await probe.request("GET", "/metrics")
    if answer.status_code != 200:
        fail(f"/metrics answers {answer.status_code}")
    return {name: float(value) for name, value in re.findall(r"^(scanwire_\w+) ([0-9.e+-]+)$", answer.text, re.M)}


async def check_metrics(course: Course) -> str:
    samples = await read_metrics(course.probe)
    wanted = ("queue_length", "slots_used", "slots", "streams", "sessions")
    if missing := [name for name in wanted if f"scanwire_{name}" not in samples]:
        fail(f"/metrics has no {', '.join(missing)}")
    return f"/metrics has {len(samples)} single samples, {', '.join(wanted)} among them"


class Bad(NamedTuple):
    name: str
    method: str
    path: str
    options: dict[str, Any]


def list_bad_requests(course: Course) -> list[Bad]:
    def submit(name: str, **options: Any) -> Bad:
        return Bad(name, "POST", "/v1/scans", options)

    json, scanner = {"Content-Type": "application/json"}, course.scanner
    return [
        submit("no JSON", content=b"{", headers=json),
        submit("JSON that is no object", json=[]),
        submit("another media type", content=b"{}", headers={"Content-Type": "text/plain"}),
        submit("no scanner", json={}),
        submit("an unknown scanner", json={"scanner": "no such scanner"}),
        submit("an unknown member", json={"scanner": scanner, "parms": {}}),
        submit("an unknown parameter", json={"scanner": scanner, "params": {"no_such_parameter": 1}}),
        submit("a value of a wrong type", json={"scanner": scanner, "params": {"symbols": 7}}),
        submit("a day that is none", json={"scanner": scanner, "params": {"start": "2024-02-31"}}),
        submit("SQL that is more", json={"scanner": scanner, "params": {"where": "close > 1; DROP TABLE prices"}}),
        submit("a body of 8 MB", content=b'"' + b"x" * 8_000_000 + b'"', headers=json),
        Bad("an unknown scan", "GET", "/v1/scans/s_nonsense", {}),
        Bad("a cursor that is none", "GET", "/v1/scans/s_nonsense/events?after=nonsense", {}),
        Bad("a method that is none", "DELETE", "/v1/scanners", {}),
        Bad("a path that is none", "GET", "/v1/no/such/path", {}),
    ]


async def check_input(course: Course) -> str:
    wrong = []
    bad_requests = list_bad_requests(course)
    for bad in bad_requests:
        try:
            answer = await course.probe.request(bad.method, bad.path, **bad.options)
        except httpx.WriteError:
            continue  # refused before all of it was sent
        if answer.is_success:
            wrong.append(f"{bad.name}: taken with {answer.status_code}")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                course.probe.scans.setdefault(answer.json()["id"], None)
        elif not 400 <= answer.status_code < 500:
            wrong.append(f"{bad.name}: answered with {answer.status_code}")
        elif not _is_clear(answer):
            wrong.append(f"{bad.name}: refused with {answer.status_code}, without a problem that says why")
    if wrong:
        fail("; ".join(wrong))
    return f"{len(bad_requests)} bad requests, each refused with a problem that says why"


def _is_clear(answer: httpx.Response) -> bool:
    if answer.headers.get("content-type", "").partition(";")[0] != "application/problem+json":
        return False
    problem = answer.json()
    return problem.get("status") == answer.status_code and bool(problem.get("detail"))


async def check_answer_time(course: Course) -> str:
    """Snapshots of a scan that has ended: asking for that has no better time."""
    return await time_answers(course, f"/v1/scans/{await course.get_market()}")


async def time_answers(course: Course, path: str) -> str:
    """Asks ten times, one after another. Raises Unmet when one fails, or most take too long."""
    probe = course.probe
    times: list[float] = []
    errors: list[str] = []
    while len(times) + len(errors) < ANSWERS:
        began = time.perf_counter()
        try:
            answer = await probe.http.get(path)
        except httpx.RequestError as error:
            errors.append(type(error).__name__)
            continue
        if answer.status_code == 429:
            await probe.wait(read_refusal(answer).retry_after_s or 1.0, "the read limit")
        elif answer.status_code == 200:
            times.append(time.perf_counter() - began)
        else:
            errors.append(str(answer.status_code))
    rate = f"error rate {len(errors) / ANSWERS:.0%}"
    if not times:
        fail(f"{rate}: {', '.join(dict.fromkeys(errors))}")
    times.sort()
    p95 = times[math.ceil(0.95 * len(times)) - 1]
    figures = {"average": mean(times), "min": times[0], "max": times[-1], "p95": p95}
    evidence = ", ".join(f"{name} {show_seconds(value)}" for name, value in figures.items()) + f", {rate}"
    if errors:
        fail(f"{evidence} ({', '.join(dict.fromkeys(errors))})")
    if p95 >= course.max_answer_s:
        fail(f"{evidence}; {course.max_answer_s:g} s are the target")
    return evidence
