"""What is known of a scan at one moment: the poll answer, the POST answer, a list entry."""

from typing import Any

from app.core.event import Cursor
from app.core.scan import Progress, Scan


def make_snapshot(
    scan: Scan, progress: Progress | None, epoch: str, *, joined: bool = False, poll_after_s: float | None = None
) -> dict[str, Any]:
    """The snapshot of DESIGN's wire format.

    Reading events from its `cursor` on gives exactly what the snapshot does not hold yet. `poll_after_s` is null
    when nothing more will come.
    """
    path = f"/v1/scans/{scan.id}"
    return {
        "id": scan.id,
        "scanner": scan.scanner,
        "params": scan.params,
        "state": scan.state,
        "position": scan.position,
        "eta_s": scan.eta_s,
        "progress": progress,
        "matches": scan.matches,
        "cursor": str(Cursor(epoch, scan.n)),
        "created_ts": scan.created_ts,
        "started_ts": scan.started_ts,
        "finished_ts": scan.finished_ts,
        "data_version": scan.data_version,
        "attempt": scan.attempt,
        "joined": joined,
        "poll_after_s": poll_after_s,
        "links": {
            "self": path,
            "events": f"{path}/events",
            "matches": f"{path}/matches",
            "ws": "/v1/ws",
            "cancel": path,
        },
        "end": scan.end,
    }
