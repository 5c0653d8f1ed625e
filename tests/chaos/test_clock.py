"""The wall clock is set forward and back an hour: whatever the service measures goes on as if nothing had happened."""

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import pytest

from app.core.scan import State
from tests.conftest import Gate, until
from tests.peers import meet, parse_events
from tests.serving import serve

HOUR_S = 3600
ROOT = Path(__file__).parents[2]


class WallClock:
    """Stands in for `time.time`, and is set as the test likes."""

    def __init__(self) -> None:
        self._real = time.time
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return self._real() + self.ahead_s


@pytest.mark.usefixtures("trial_scanners")
async def test_deadlines_retention_buckets_and_sessions_do_not_feel_the_clock_being_set(
    tmp_path: Path, sample_prices: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = WallClock()
    monkeypatch.setattr(time, "time", wall)
    bounds: dict[str, Any] = {
        "retention_s": 120,
        "tombstone_s": 120,
        "session_idle_s": 60,
        "producer_timeout_s": 60,
        "idempotency_s": 120,
        "scan_deadline_s": 100,
        "queued_unwatched_s": 60,
        "read_per_s": 8,
        "read_burst": 8,
        "submit_per_min": 4,
        "heartbeat_s": 0.5,
        "max_running": 1,
        "reap_every_s": 1000,
    }
    async with serve(tmp_path, sample_prices, chunk_rows=1, **bounds) as serving:
        service = serving.service
        finished = await serving.submit("gap-up", headers={"Idempotency-Key": "once"}, preset="relaxed")
        await serving.finish(finished["id"])
        running = await serving.submit("trial-gated", gate=str(gate.path))
        queued = await serving.submit("trial-gated", gate=str(gate.path), only_symbol="IBM")
        external = await serving.submit("external")
        await until(lambda: service.log.get(running["id"]).state is State.RUNNING)
        head = {"Authorization": f"Bearer {external['producer_token']}"}
        events_path = f"/v1/scans/{external['id']}/events"
        latest_ts = external["created_ts"]

        async with meet(serving.url) as peer:
            await peer.ask(events_path, "Accept: text/event-stream")
            await peer.read_until(b"event: started")
            for jump_s in (HOUR_S, -2 * HOUR_S, HOUR_S):
                wall.ahead_s += jump_s
                assert set(await service.reaper.reap()) <= {"buckets"}  # those that are full are none
                refused = await serving.http.post("/v1/scans", json={"scanner": "gap-up", "reuse": "never"})
                assert refused.status_code == 429
                assert 0 < refused.json()["retry_after_s"] <= 15
                again = await serving.http.post(
                    "/v1/scans",
                    json={"scanner": "gap-up", "params": {"preset": "relaxed"}, "reuse": "never"},
                    headers={"Idempotency-Key": "once"},
                )
                assert again.json()["id"] == finished["id"]

                # An event comes at once, with a time that went on; so does the next heartbeat.
                answer = await serving.http.post(
                    events_path, json={"type": "matches", "rows": [{"a": 1}]}, headers=head
                )
                assert answer.status_code == 202
                body = await peer.read_until(b"event: matches") + await peer.read_until(b"\n\n")
                (event,) = [event for event in parse_events(body) if event["type"] == "matches"]
                assert latest_ts <= event["ts"] < latest_ts + 20_000
                latest_ts = event["ts"]
                await peer.read_until(b": hb")

                # A bucket that is empty says how long to wait, and is refilled as time passes.
                polls = await asyncio.gather(*(serving.http.get("/v1/scans") for _ in range(30)))
                poll = next(poll for poll in polls if poll.status_code == 429)
                assert poll.json()["retry_after_s"] <= 0.13
                await asyncio.sleep(1)  # until it is full again
                assert (await serving.http.get("/v1/scans")).status_code == 200

        states = [service.log.get(scan["id"]).state for scan in (finished, running, queued, external)]
        assert states == [State.COMPLETED, State.RUNNING, State.QUEUED, State.RUNNING]
        assert not service.log.get(finished["id"]).is_trimmed
        gate.open()
        await until(lambda: service.log.get(queued["id"]).state.is_terminal)
        for scan in (running, queued):
            end = service.log.get(scan["id"]).end
            assert end is not None
            assert end["state"] == "completed"
            assert 0 <= end["elapsed_s"] < 60


def test_the_wall_clock_is_read_where_nothing_else_will_do_and_nowhere_else() -> None:
    """Elsewhere time is measured by the monotonic clock."""
    reads = re.compile(r"time\.time\b|time\.(gm|local)time\b|datetime\.(now|utcnow|today)|date\.today|from time import")
    found = {
        str(path.relative_to(ROOT)): len(reads.findall(path.read_text()))
        for path in (ROOT / "app").rglob("*.py")
        if reads.search(path.read_text())
    }
    assert found == {
        "app/application.py": 1,  # once at the start: what time it is
        "app/commands/journal.py": 2,  # the date of a salvage, by which files are named
        "app/commands/surroundings.py": 1,  # how old a file is, which the file system tells by it
        "app/commands/listings.py": 1,  # when a scan was made, shown in local time
        "app/follow.py": 1,  # a date in Retry-After
        "app/observe/webhook.py": 1,  # when it was signed, for who receives it
        "app/log/lock.py": 1,  # since when a lock is held, for people
        "app/observe/logs.py": 2,  # the time of a record, which the logging module took
    }
