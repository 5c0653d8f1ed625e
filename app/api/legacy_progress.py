"""The WebSocket of old, /api/scan/progress/{id}: the same log in other words.

    connected                 at once
    status, progress          as they come; none says `completed`, since clients close and lose the rows at that word
    final                     once, with all rows: also for who comes late
    error                     in its place: the scan failed, was cancelled or is not known

One task writes, so there is one order. Each connection reads the log for itself, so two tabs both get everything.
"""

import asyncio
import contextlib
from typing import Any

import orjson
from starlette.websockets import WebSocket, WebSocketDisconnect

from app.api.legacy_answers import (
    COMPLETED,
    ERROR,
    INITIALIZING,
    RUNNING,
    describe_position,
    describe_progress,
    describe_scan,
    explain_error,
    find_scan,
    measure_time,
    tell_rows,
    write_time,
)
from app.api.problems import close_reason
from app.api.service import Service, get_client, get_service
from app.api.websocket import GOING_AWAY, send_within
from app.core.errors import RateLimited
from app.core.event import Cursor, Event, EventType
from app.core.scan import Scan
from app.push.puller import Puller


async def serve_progress(websocket: WebSocket) -> None:
    """Charges the connect bucket before the handshake is answered."""
    service, client, scan_id = get_service(websocket), get_client(websocket), websocket.path_params["id"]
    service.limits.charge("connect", client)
    with (
        service.limits.open_stream(client),
        service.hub.pull("websocket") as subscriber,
        contextlib.suppress(WebSocketDisconnect),
    ):
        await websocket.accept()
        scan = find_scan(service, scan_id)
        if scan is None:
            await _send(websocket, service, "error", _lost(scan_id))
            await websocket.close()
            return
        with service.sessions.stream(client, [scan_id]):
            # What was before is in the first status.
            service.hub.subscribe(subscriber, scan_id, Cursor(service.log.epoch, scan.n))
            await _serve(websocket, service, client, subscriber, scan)


async def _serve(websocket: WebSocket, service: Service, client: str, subscriber: Puller, scan: Scan) -> None:
    tasks = [
        asyncio.create_task(_read(websocket, service, client)),
        asyncio.create_task(_write(websocket, service, subscriber, scan)),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(websocket: WebSocket, service: Service, client: str) -> None:
    """Clients of old say nothing; what comes all the same is thrown away, at the pace of any message."""
    while (await websocket.receive())["type"] != "websocket.disconnect":
        try:
            service.limits.charge("message", client)
        except RateLimited as refusal:
            await websocket.close(refusal.close_code, close_reason(refusal))
            return


async def _write(websocket: WebSocket, service: Service, subscriber: Puller, scan: Scan) -> None:
    await _send(websocket, service, "connected", {"scan_id": scan.id, "message": "You are told what happens."})
    percent = 0
    if not scan.state.is_terminal:
        about = describe_scan(service, scan)
        percent = about["progress_percent"]
        await _send(websocket, service, "status", about)
    async with contextlib.aclosing(subscriber.batches()) as batches:
        async for batch in batches:
            for event in batch:
                if event.type is EventType.BYE:
                    await websocket.close(1001, GOING_AWAY)
                    return
                if (told := _translate(event)) is not None:
                    type_, about = told
                    percent = max(percent, about["progress_percent"])
                    await _send(websocket, service, type_, about | {"progress_percent": percent})
    await _send_end(websocket, service, scan.id)
    await websocket.close()


def _translate(event: Event) -> tuple[str, dict[str, Any]] | None:
    """What an event says of a scan that goes on; None for one that says nothing to clients of old."""
    percent, status = 0, RUNNING
    match event.type:
        case EventType.QUEUED:
            status, words = INITIALIZING, describe_position(event.load_data()["position"])
        case EventType.STARTED:
            words = describe_progress(None)[1]
        case EventType.CANCELLING:
            words = "The scan is being cancelled."
        case EventType.PROGRESS:
            percent, words = describe_progress(event.load_data())
        case _:
            return None
    type_ = "progress" if event.type is EventType.PROGRESS else "status"
    return type_, {"scan_id": event.scan, "status": status, "progress_percent": percent, "message": words}


async def _send_end(websocket: WebSocket, service: Service, scan_id: str) -> None:
    scan = find_scan(service, scan_id)
    if scan is None:  # past its retention in this very moment
        await _send(websocket, service, "error", _lost(scan_id))
        return
    about = describe_scan(service, scan)
    if about["status"] != COMPLETED:
        await _send(websocket, service, "error", about | {"error": explain_error(scan)})
        return
    rows = await tell_rows(service, websocket.app.state.legacy_rows, scan)
    more = {"results_available": True, "execution_time": measure_time(service, scan)}
    await _send(websocket, service, "final", about | rows | more)


def _lost(scan_id: str) -> dict[str, Any]:
    words = "Scan not found"
    return {"scan_id": scan_id, "status": ERROR, "progress_percent": 0, "message": words, "error": words}


async def _send(websocket: WebSocket, service: Service, type_: str, about: dict[str, Any]) -> None:
    message = {"type": type_, **about, "timestamp": write_time(service.log.now_ms())}
    await send_within(service.settings.stall_s, websocket, orjson.dumps(message).decode())
