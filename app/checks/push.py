"""What `scanwire check` checks of pushing: that events come at once and in order, and again from any cursor."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import orjson

from app.checks.probe import Probe, fail, show_seconds
from app.eventstream import ScanEvent
from app.follow import POLL

PUSHED = 3  # events by each transport
PUSH_S = 2.0  # within which an event must come that was posted
ROWS = 6  # of which the events are read again, if that many did not come before


async def check_push(probe: Probe, scan_id: str, format_: str) -> str:
    """Each event that is posted comes while the stream is open, at once and in order."""
    snapshot = await probe.get_json(f"/v1/scans/{scan_id}")
    lags: list[float] = []
    seqs: list[int] = []
    async with probe.stream(format_, scan_id, snapshot["cursor"]) as events:
        for number in range(PUSHED):
            row = {"transport": format_, "number": number}
            began = time.perf_counter()
            await probe.post(scan_id, [{"type": "matches", "rows": [row]}])
            try:
                async with asyncio.timeout(PUSH_S):
                    event = await _next_durable(events)
            except TimeoutError:
                fail(f"event {number + 1} of {PUSHED} was posted, and had not come {PUSH_S:g} s later")
            lags.append(time.perf_counter() - began)
            if event.data.get("rows") != [row]:
                fail(f"event {number + 1} of {PUSHED} was posted, and another one came: {event.json[:80].decode()}")
            seqs.append(event.seq)
    if seqs != list(range(seqs[0], seqs[0] + PUSHED)):
        fail(f"the events came as seq {', '.join(map(str, seqs))}")
    slowest = max(lags)
    return (
        f"{PUSHED} events, each {show_seconds(slowest)} after it was posted at the latest, seq {seqs[0]} to {seqs[-1]}"
    )


async def _next_durable(events: AsyncGenerator[ScanEvent, None]) -> ScanEvent:
    async for event in events:
        if event.id is not None:
            return event
    return fail("the stream ended, and the scan has not")


async def _read_all(probe: Probe, scan_id: str) -> list[dict[str, Any]]:
    """Every event of the scan, by pages from the first on, of which there are enough. Raises Unmet."""
    events = await _read_pages(probe, scan_id, None)
    missing = ROWS - len(events)
    if missing > 0:
        for number in range(missing):
            await probe.post(scan_id, [{"type": "matches", "rows": [{"number": number}]}])
        events = await _read_pages(probe, scan_id, None)
    if [event["seq"] for event in events] != list(range(1, len(events) + 1)):
        fail(f"the events of the scan are seq {', '.join(str(event['seq']) for event in events)}")
    return events


async def _read_pages(probe: Probe, scan_id: str, after: str | None) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    while True:
        params = {} if after is None else {"after": after}
        path = f"/v1/scans/{scan_id}/events"
        page = await probe.get_json(path, params=params, headers={"Accept": "application/json"})
        durable = [event for event in page["events"] if "id" in event]
        if not durable:
            return events
        events += durable
        after = page["cursor"]


async def check_resume(probe: Probe, scan_id: str, format_: str) -> str:
    """From the cursor in the middle on, exactly what came behind it, and that in the same words."""
    known = await _read_all(probe, scan_id)
    place = len(known) // 2
    wanted = known[place:]
    if format_ == POLL:
        return _compare(known, place, await _read_pages(probe, scan_id, known[place - 1]["id"]))
    got: list[dict[str, Any]] = []
    async with probe.stream(format_, scan_id, known[place - 1]["id"]) as events:
        try:
            async with asyncio.timeout(PUSH_S):
                while len(got) < len(wanted):
                    got.append(orjson.loads((await _next_durable(events)).json))
        except TimeoutError:
            pass
    return _compare(known, place, got)


def _compare(known: list[dict[str, Any]], place: int, got: list[dict[str, Any]]) -> str:
    wanted = known[place:]
    seqs = [event.get("seq") for event in got]
    if seqs != [event["seq"] for event in wanted]:
        came = ", ".join(map(str, seqs)) or "nothing"
        fail(f"behind seq {place} come {place + 1} to {len(known)}; resumed there, {came} came")
    if got != wanted:
        fail(f"resumed behind seq {place}, the events are not those of before")
    return f"resumed behind seq {place} of {len(known)}: the {len(wanted)} events behind it, the same as before"
