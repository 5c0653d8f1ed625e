"""How a scan looks to the clients of old: their four statuses, whole percents, words, and rows."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import orjson

from app.api.scans import read_matches
from app.api.service import Service
from app.core.scan import SYNTHETIC_MARK, Progress, Scan, State, is_synthetic
from app.engine.export import export_legacy
from app.scanners import legacy

INITIALIZING, RUNNING, COMPLETED, ERROR = "initializing", "running", "completed", "error"
# Cancelled and lost scans are errors here: what they found is not all there is to find.
_STATUSES = {
    State.QUEUED: INITIALIZING,
    State.RUNNING: RUNNING,
    State.CANCELLING: RUNNING,
    State.COMPLETED: COMPLETED,
}
_NOT_DONE_PERCENT = 99  # those clients take 100 for the end
_FEW_ROWS = 1000  # made in a millisecond or two; more are made in a worker process


class Found(NamedTuple):
    """The rows of a completed scan, as JSON."""

    total: int
    json: bytes


class LegacyRows:
    """Rows of completed scans in the form of old, made once for each scan, however many clients poll it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._found: OrderedDict[str, Found] = OrderedDict()  # the one asked for longest ago first
        self._making = asyncio.Lock()

    async def get(self, service: Service, scan: Scan) -> Found:
        """Raises Trimmed when the rows went past their retention just now."""
        if scan.id not in self._found:
            async with self._making:
                if scan.id not in self._found:
                    found = await self._make(service, scan)
                    self._keep(scan.id, found)
                    return found
        self._found.move_to_end(scan.id)
        return self._found[scan.id]

    async def _make(self, service: Service, scan: Scan) -> Found:
        pages = [event.json async for event in read_matches(service, scan)]
        if scan.matches <= _FEW_ROWS:
            return Found(scan.matches, export_legacy(pages))
        return Found(scan.matches, await service.runner.pool.call(export_legacy, pages))

    def _keep(self, scan_id: str, found: Found) -> None:
        self._found[scan_id] = found
        self._bytes += len(found.json)
        while self._bytes > self._max_bytes:
            self._bytes -= len(self._found.popitem(last=False)[1].json)


def find_scan(service: Service, scan_id: str) -> Scan | None:
    """A scan that can be shown in the form of old. One whose rows are past their retention is gone: it would look as
    if it had found nothing."""
    scan = service.log.find(scan_id)
    return None if scan is None or scan.scanner != legacy.NAME or scan.is_trimmed else scan


def name_status(scan: Scan) -> str:
    return _STATUSES.get(scan.state, ERROR)


def count_percent(done: int, total: int | None) -> int:
    """Whole percents of work done; 100 is not reached before the end."""
    return min(100 * done // total, _NOT_DONE_PERCENT) if total else 0


def describe_progress(progress: Progress | Mapping[str, Any] | None) -> tuple[int, str]:
    """Percents and words for a running scan."""
    if progress is None:
        return 0, "The scan has started."
    values = progress if isinstance(progress, Mapping) else {n: getattr(progress, n) for n in Progress.__slots__}
    done, total = values["done"], values["total"]
    return count_percent(done, total), f"{done} of {total} {values['unit']} scanned, {values['matches']} found so far."


def describe_scan(service: Service, scan: Scan) -> dict[str, Any]:
    """What every answer says of a scan: `scan_id`, `status`, `progress_percent` and `message`."""
    status = name_status(scan)
    percent, words = describe_progress(service.log.get_progress(scan.id))
    if status == INITIALIZING:
        percent, words = 0, describe_position(scan.position)
    elif status == COMPLETED:
        percent, words = 100, _describe_end(scan)
    elif status == ERROR:
        words = explain_error(scan) or ""
    elif scan.state is State.CANCELLING:
        words = "The scan is being cancelled."
    return {"scan_id": scan.id, "status": status, "progress_percent": percent, "message": _mark(scan, words)}


def describe_position(position: int | None) -> str:
    return f"The scan waits for its turn, at place {position or 1}."


def _mark(scan: Scan, words: str) -> str:
    """Invented prices are marked wherever what was found in them is shown."""
    return f"{SYNTHETIC_MARK}: {words}" if is_synthetic(scan.data_version) else words


def _describe_end(scan: Scan) -> str:
    end = scan.end or {}
    words = f"The scan is complete: {scan.matches} found."
    if end.get("truncated"):
        words += " There were more than are kept; ask for fewer days."
    if skipped := end.get("skipped_symbols"):
        words += f" Rows of {skipped} symbols could not be used and were left out: /v1/scans/{scan.id} names them."
    return words


def explain_error(scan: Scan) -> str | None:
    """Why a scan has no rows to show; None unless it ended in another way than completed."""
    if name_status(scan) != ERROR:
        return None
    error = (scan.end or {}).get("error")
    return error["detail"] if error else f"The scan was {scan.state} before it had looked at everything."


def measure_time(service: Service, scan: Scan) -> float:
    """Seconds that the scan has run, in all or so far."""
    if scan.end is not None:
        elapsed_s: float = scan.end["elapsed_s"]
        return elapsed_s
    return 0.0 if scan.started_ts is None else round((service.log.now_ms() - scan.started_ts) / 1000, 3)


def write_time(ms: int) -> str:
    """Milliseconds since 1970 in ISO 8601, which both `new Date()` and `datetime.fromisoformat()` read."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")


async def tell_rows(service: Service, rows: LegacyRows, scan: Scan) -> dict[str, Any]:
    """`results` and `total_found`: all rows of a completed scan, and none of one that is not."""
    found = await rows.get(service, scan) if scan.state is State.COMPLETED else Found(0, b"[]")
    return {"results": orjson.Fragment(found.json), "total_found": found.total}
