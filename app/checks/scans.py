"""What is checked of scans: how many run at a time, that equal ones run once, their time, and their end."""

import asyncio
import contextlib
import math
import time

from app.checks.course import SOON_S, Course
from app.checks.probe import NotApplicable, fail, show_seconds
from app.checks.requests import read_metrics
from app.core.event import EventType
from app.core.scan import digest_rows
from app.eventstream import ScanEvent
from app.follow import NDJSON, SSE

TOGETHER_MAX = 6  # scans that are sent at once; one client may have eight
STREAMS = 3


async def check_concurrency(course: Course) -> str:
    """More scans at once than may run, as far as the submit limit lets them in: never more run than may."""
    probe = course.probe
    performance = await probe.get_json("/v1/performance")
    cap, room = performance.get("max_running"), performance.get("max_queued")
    if not (isinstance(cap, int) and isinstance(room, int) and cap > 0):
        fail(f"/v1/performance declares max_running {cap!r} and max_queued {room!r}")
    bodies = [course.make_submission() for _ in range(min(cap + 1, TOGETHER_MAX))]
    answers = await asyncio.gather(*(probe.submit(body, waits=False) for body in bodies))
    accepted: list[str] = []
    for body, answer in zip(bodies, answers, strict=True):
        if answer.status_code not in (429, 503):
            accepted.append(probe.read_json(answer, 200, 202)["id"])
            course.market = course.market or body
    course.market_id = accepted[0] if accepted else ""
    if accepted:
        await course.follow(accepted)
    else:
        accepted = [await course.get_market()]
    spans = []
    for scan_id in accepted:
        events = course.told[scan_id]
        if not events or events[0].type != EventType.QUEUED or not events[0].data.get("position"):
            fail(f"the first event of {scan_id} is not `queued` with a position")
        started = [event.ts for event in events if event.type == EventType.STARTED]
        ended = [event.ts for event in events if event.type == EventType.END]
        if started:
            spans.append((started[0], ended[0] if ended else math.inf))
    most = max((sum(begin <= at < end for begin, end in spans) for at, _ in spans), default=0)
    if most > cap:
        fail(f"{most} scans ran at once, and {cap} may")
    refused = len(bodies) - len(accepted)
    return (
        f"{cap} may run and {room} wait; of {len(bodies)} sent at once {len(accepted)} were accepted"
        + (f", {refused} refused" if refused > 0 else "")
        + f"; at most {most} ran at a time"
    )


async def check_single_flight(course: Course) -> str:
    probe = course.probe
    first = await course.get_market()
    answers = await asyncio.gather(*(probe.submit(course.market) for _ in range(2)))
    bodies = [probe.read_json(answer, 200, 202) for answer in answers]
    ids = {body["id"] for body in bodies}
    if len(ids) > 1 or not any(body.get("joined") for body in bodies):
        fail(f"the same scan was submitted twice at once, and runs {len(ids | {first})} times")
    return f"two more submissions of a scan gave {'it' if ids == {first} else 'one more scan'}, joined"


async def check_scan_time(course: Course) -> str:
    scan_id = await course.get_market()
    events = course.told[scan_id]
    if not events or events[-1].type != EventType.END:
        fail(f"{course.scanner} has not ended after {course.max_scan_s + SOON_S:g} s")
    end = events[-1].data
    took_s = (events[-1].ts - events[0].ts) / 1000
    if end["state"] != "completed":
        fail(f"{course.scanner} {end['state']}: {(end.get('error') or {}).get('detail', 'no reason given')}")
    if took_s >= course.max_scan_s:
        fail(f"{course.scanner} took {took_s:,.1f} s, and {course.max_scan_s:g} s are the target")
    rows = [row for event in events if event.type == EventType.MATCHES for row in event.data["rows"]]
    if digest_rows(rows) != end["digest"]:
        fail(f"the {len(rows):,} rows of {course.scanner} that came are not the {end['matches']:,} that were found")
    return f"{course.scanner} completed {show_seconds(took_s)} after it was accepted, {len(rows):,} matches, all proved"


async def check_sessions(course: Course) -> str:
    """Streams that are closed give their places back."""
    probe, scan_id = course.probe, await course.get_external()
    counts = [(await read_metrics(probe)).get("scanwire_streams")]
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(STREAMS):
            await stack.enter_async_context(probe.stream(NDJSON, scan_id))
        counts.append((await read_metrics(probe)).get("scanwire_streams"))
    until = probe.clock() + SOON_S
    before, during = counts
    if before is None or during is None:
        raise NotApplicable("/metrics has no scanwire_streams")
    if during < before + STREAMS:
        raise NotApplicable(f"streams of others come and go: {before:g} before, {during:g} with {STREAMS} of ours")
    while (after := (await read_metrics(probe)).get("scanwire_streams", 0)) > during - STREAMS:
        if probe.clock() > until:
            fail(f"{during:g} streams with {STREAMS} of ours, and {after:g} still {SOON_S:g} s after ours were closed")
        await probe.wait(0.1, "the end of streams that were closed")
    return f"{before:g} streams before, {during:g} with {STREAMS} of ours, {after:g} after they were closed"


async def check_cancel(course: Course) -> str:
    """The end is pushed to who watches, kept for who comes later, and given once."""
    probe, scan_id = course.probe, await course.get_external()
    snapshot = await probe.get_json(f"/v1/scans/{scan_id}")
    began = time.perf_counter()
    end: ScanEvent | None = None
    async with probe.stream(SSE, scan_id, snapshot["cursor"]) as events:
        probe.read_json(await probe.request("DELETE", f"/v1/scans/{scan_id}"), 200, 202)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SOON_S):
                async for event in events:
                    if event.type == EventType.END:
                        end = event
                        break
    took_s = time.perf_counter() - began
    if end is None:
        fail(f"{SOON_S:g} s after DELETE its stream has not told an end")
    if end.data["state"] != "cancelled":
        fail(f"after DELETE it ended as {end.data['state']}")
    again = probe.read_json(await probe.request("DELETE", f"/v1/scans/{scan_id}"), 200)
    page = await probe.get_json(f"/v1/scans/{scan_id}/events", headers={"Accept": "application/json"})
    ends = [event for event in page["events"] if event["type"] == "end"]
    if again["state"] != "cancelled" or [one["id"] for one in ends] != [end.id]:
        fail(f"afterwards its state is {again['state']}, and its events have {len(ends)} ends")
    return f"the end came {show_seconds(took_s)} after DELETE, and {end.data['matches']} matches are kept"


async def check_nothing_left(course: Course) -> str:
    left = await course.probe.clean_up()
    if left:
        fail(f"of {len(course.probe.scans)} scans that were started these could not be ended: {', '.join(left)}")
    return f"all {len(course.probe.scans)} scans that were started have ended"
