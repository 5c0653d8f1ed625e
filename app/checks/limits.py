"""What is checked of limits: that they hold, and that waiting exactly as told is enough."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

import httpx

from app.checks.course import SOON_S, Course
from app.checks.probe import NotApplicable, fail, read_limit, show_seconds
from app.follow import read_refusal

SUBMITS_MAX = 8  # that are spent to reach the limit; one that takes more is not reached
READS_MAX = 200
HINTS = 4
_HINT_MAX_S = 25.0  # from there on they need not grow


async def check_read_limit(course: Course) -> str:
    probe = course.probe
    path = f"/v1/scans/{await course.get_market()}"
    declared = read_limit(await probe.request("GET", path))
    quota, window_s = (READS_MAX, 0.0) if declared is None else declared[:2]
    if quota > READS_MAX:
        raise NotApplicable(f"{quota:,} at once are too many to reach the limit politely")
    answers = await asyncio.gather(*(probe.http.get(path) for _ in range(quota)))
    if wrong := {answer.status_code for answer in answers} - {200, 429}:
        fail(f"of {quota} reads at once some were answered with {', '.join(map(str, sorted(wrong)))}")
    # One after another now: the last answer is to be the refusal, since then nothing else comes in between.
    began, more = probe.clock(), 1
    while (last := await probe.http.get(path)).status_code == 200 and more < quota:
        more += 1
    if last.status_code == 200 and (each_s := (probe.clock() - began) / more) > window_s / quota > 0:
        raise NotApplicable(f"an answer takes {show_seconds(each_s)}, in which the limit lets in another one")
    if last.status_code != 429:
        fail(f"{quota + more} reads, and none was refused; the last was answered with {last.status_code}")
    return await _wait_exactly(course, last, f"read {quota + more}", lambda: probe.http.get(path))


async def check_submit_limit(course: Course) -> str:
    """As the playbook has it: the first request is taken, the third is not."""
    probe = course.probe
    accepted = 0
    while True:
        answer = await probe.submit_external(waits=False)
        if answer.status_code == 429:
            refusal = read_refusal(answer)
            if str(refusal.problem.get("limit", "submit")).startswith("submit"):
                break
            await probe.wait(refusal.retry_after_s or 1.0, f"the limit {refusal.problem.get('limit')}")
            continue
        scan_id = probe.read_json(answer, 202)["id"]
        accepted += 1
        if course.external_id:
            await probe.request("DELETE", f"/v1/scans/{scan_id}")
        course.external_id = course.external_id or scan_id
        declared = read_limit(answer)
        quota, left = (SUBMITS_MAX, SUBMITS_MAX - accepted) if declared is None else (declared[0], declared[2])
        if left > SUBMITS_MAX:
            raise NotApplicable(f"{quota:,} at once are too many to reach the limit politely")
        if accepted > quota:
            fail(f"{accepted} submissions one after another, and none was refused; the limit is said to be {quota}")

    async def submit() -> httpx.Response:
        again = await probe.submit_external(waits=False)
        if again.status_code == 202 and not course.external_id:
            course.external_id = again.json()["id"]
        return again

    name = f"submission {len(probe.scans) + 1}"
    return await _wait_exactly(course, answer, name, submit)


async def _wait_exactly(
    course: Course, refused: httpx.Response, name: str, ask: Callable[[], Awaitable[httpx.Response]]
) -> str:
    """Waits for as long as a refusal says, and asks again. Raises Unmet."""
    if "retry-after" not in refused.headers:
        fail(f"{name} was refused with 429, without Retry-After")
    refusal = read_refusal(refused)
    wait_s = refusal.retry_after_s
    if wait_s is None:
        fail(f"{name} was refused with Retry-After: {refused.headers['retry-after'][:40]!r}, which is none")
    if float(refused.headers["retry-after"]) < wait_s:
        fail(f"Retry-After is {refused.headers['retry-after']}, and retry_after_s {wait_s:g}: one of them is wrong")
    await course.probe.wait(wait_s, f"{name} was refused by the limit {refusal.problem.get('limit', '')}".rstrip())
    again = await ask()
    if not again.is_success:
        fail(f"{name} was refused; after the {wait_s:g} s it was told to wait, the answer is {again.status_code}")
    return f"{name} was refused with 429; after exactly the {wait_s:g} s it was told to wait, it was taken"


async def check_hints(course: Course) -> str:
    """While nothing changes, each poll is told to wait longer; and waits."""
    path = f"/v1/scans/{await course.get_external()}"
    hints: list[float] = []
    for _ in range(HINTS):
        snapshot = await course.probe.get_json(path)
        hint = snapshot.get("poll_after_s")
        if not isinstance(hint, int | float) or hint <= 0:
            fail(f"a scan that is {snapshot.get('state')} has poll_after_s {hint!r}")
        hints.append(hint)
        if len(hints) < HINTS:
            await course.probe.wait(min(hint, SOON_S), "the next poll")
    told = " → ".join(f"{hint:.2f}" for hint in hints) + " s while nothing changed"
    if any(later < earlier * 1.1 for earlier, later in pairwise(hints) if earlier < _HINT_MAX_S):
        fail(f"poll_after_s does not grow: {told}")
    return told
