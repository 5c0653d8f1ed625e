"""Scanwire with many scans that are worked in its own process, each of which finds matches at a steady rate.

    python -m bench.peers.scanwire_many --port PORT --scans 500 --rate 20 --events 200 --row-bytes 75

It is the server of `scanwire serve` with the producers beside it. The scans are there from the start; SIGUSR1 starts
the producers.
"""

import argparse
import asyncio
import signal
import time

import orjson

from app.commands.launch import Launch, open_socket
from app.core.event import EventType
from app.core.scan import Scan
from app.core.settings import Settings
from app.log.eventlog import EventLog
from bench.producer import make_event


def make_scan_id(number: int) -> str:
    return f"s_bench{number:016d}"


async def open_scan(log: EventLog, scan_id: str) -> None:
    """A scan that is running, though the engine knows nothing of it."""
    scan = Scan(
        id=scan_id,
        scanner="gap-up",
        params={},
        client="ip:127.0.0.1",
        created_ts=log.now_ms(),
        data_version="bench",
        same_key=scan_id,
        cost_rows=0,
        chunk_rows=1,
    )
    log.create(scan)
    started = {"scanner": "gap-up", "params": {}, "total": 1, "unit": "events", "data_version": "bench", "attempt": 1}
    await log.append(scan_id, (EventType.QUEUED, {"position": 1, "eta_s": (0.0, 0.0)}), (EventType.STARTED, started))


async def produce(log: EventLog, scan_ids: list[str], rate: float, events: int, row_bytes: int) -> None:
    """Appends the events of all scans, one after another, `rate` rounds in a second: in each millisecond its part."""
    pad = orjson.loads(make_event(0, row_bytes))["pad"]
    start, per_ms = time.monotonic() + 0.1, max(round(rate * len(scan_ids) / 1000), 1)
    for number in range(events):
        for place in range(0, len(scan_ids), per_ms):  # the loop's timers know whole milliseconds
            early_s = start + (number + place / len(scan_ids)) / rate - time.monotonic()
            if early_s > 0:
                await asyncio.sleep(early_s)
            for scan_id in scan_ids[place : place + per_ms]:
                row = {"t": f"@{time.monotonic_ns():016d}", "pad": pad}
                appended = log.append_nowait(scan_id, (EventType.MATCHES, {"chunk": number, "rows": [row]}))
        await appended  # what was appended before is committed before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--scans", type=int, default=500)
    parser.add_argument("--rate", type=float, default=20, help="events per second and scan")
    parser.add_argument("--events", type=int, default=200, help="events for each scan")
    parser.add_argument("--row-bytes", type=int, default=75)
    options = parser.parse_args()
    scan_ids = [make_scan_id(number) for number in range(options.scans)]

    async def work(launch: Launch) -> int:
        log, asked = launch.service.log, asyncio.Event()
        await asyncio.gather(*(open_scan(log, scan_id) for scan_id in scan_ids))
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, asked.set)
        await asked.wait()
        await produce(log, scan_ids, options.rate, options.events, options.row_bytes)
        return 0

    Launch(Settings(), open_socket("127.0.0.1", options.port)).run(work)


if __name__ == "__main__":
    main()
