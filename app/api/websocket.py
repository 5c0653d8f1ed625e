"""The WebSocket /v1/ws, subprotocol scanwire.v1: many scans, commands and events over one connection.

What a close code asks of the client:

    1001  the server goes away     come back after `bye.reconnect_ms`
    1008  refused (policy)         do not come back with the same request
    1009  a message was too big    send smaller ones
    1013  no place just now        try again later
    4408  the peer took nothing    come back, with the last cursor
    4429  too many messages        come back more slowly
"""

import asyncio
import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import orjson
from starlette.types import Receive, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from app.api.polling import read_cursor, require_known
from app.api.problems import close_reason
from app.api.scans import make_answer
from app.api.service import Service, get_client, get_service
from app.core.errors import InvalidParams, InvalidRequest, ScanwireError, TooLarge, UnknownScan
from app.core.event import Cursor, EventType
from app.core.scan import Scan
from app.engine.admission import Submission
from app.engine.limits import StreamLease
from app.engine.sessions import Presence
from app.push.frames import MESSAGES, frame_message
from app.push.puller import Puller
from app.push.subscriber import Subscriber
from app.push.wire import FINISH, WebSocketConnection, find_wire

Watched = Mapping[str, Cursor | None]  # scans that the address names, and from where on

SUBPROTOCOL = "scanwire.v1"
STALLED = 4408
GOING_AWAY = "going away"
_MAX_REPLIES = 64  # that wait to be written; then no further message is read
_MAX_REF_CHARS = 100


async def serve_websocket(websocket: WebSocket) -> None:
    """Charges the connect bucket before the handshake is answered, so that a refusal is a plain HTTP answer.

    With `?scan=A&scan=B&after=CURSOR` it subscribes at once, for clients that only listen.
    """
    service, client = get_service(websocket), get_client(websocket)
    offered = websocket.scope.get("subprotocols") or []
    if offered and SUBPROTOCOL not in offered:
        raise InvalidRequest(f"Sec-WebSocket-Protocol: this address speaks {SUBPROTOCOL}.")
    scan_ids = list(dict.fromkeys(websocket.query_params.getlist("scan")))
    after = read_cursor(websocket)
    if scan_ids or after:
        require_known(service, scan_ids)
    service.limits.charge("connect", client)
    watched, subprotocol = dict.fromkeys(scan_ids, after), SUBPROTOCOL if offered else None
    wire: WebSocketConnection | None = find_wire(websocket.scope)
    lease = service.limits.open_stream(client)
    if wire is None:
        with lease:
            await websocket.accept(subprotocol)
            await _serve_pulled(websocket, service, client, watched)
    else:
        try:
            opening = await wire.accept(subprotocol)
        except BaseException:
            lease.close()
            raise
        wire.rest = partial(_serve_pushed, wire, service, client, lease, watched, opening)


async def _serve_pushed(
    wire: WebSocketConnection,
    service: Service,
    client: str,
    lease: StreamLease,
    watched: Watched,
    opening: bytes,
    receive: Receive,
    send: Send,
) -> None:
    """Reads messages and answers them; events are written straight to the transport by the hub, behind `opening`."""
    with (
        lease,
        service.hub.push(wire, MESSAGES, ends=False, client=client) as subscriber,
        _Dialogue(service, client, subscriber, watched) as dialogue,
    ):
        service.hub.start(subscriber, opening)
        del opening  # it may be open for hours
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                return
            if message["type"] == FINISH:
                await send({"type": "websocket.close", "code": 1001, "reason": GOING_AWAY})
                return
            wire.write(frame_message(await dialogue.answer(message)))
            if (refusal := dialogue.refusal) is not None:
                await send({"type": "websocket.close", "code": refusal.close_code, "reason": close_reason(refusal)})
                return
            subscriber.wake()
            await wire.writable.wait()  # until the transport takes more


async def _serve_pulled(websocket: WebSocket, service: Service, client: str, watched: Watched) -> None:
    """The same on any ASGI server: one task reads, and one writes replies and events in one order."""
    with (
        service.hub.pull(MESSAGES.name) as subscriber,
        _Dialogue(service, client, subscriber, watched) as dialogue,
        contextlib.suppress(WebSocketDisconnect),
    ):
        subscriber.wake()
        replies: asyncio.Queue[bytes] = asyncio.Queue(_MAX_REPLIES)
        tasks = [
            asyncio.create_task(_read(websocket, dialogue, subscriber, replies)),
            asyncio.create_task(_write(websocket, dialogue, subscriber, replies, service.settings.stall_s)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _read(
    websocket: WebSocket, dialogue: "_Dialogue", subscriber: Puller, replies: "asyncio.Queue[bytes]"
) -> None:
    while dialogue.refusal is None:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
        await replies.put(await dialogue.answer(message))
        subscriber.wake()
    await asyncio.Event().wait()  # the writer closes


async def _write(
    websocket: WebSocket, dialogue: "_Dialogue", subscriber: Puller, replies: "asyncio.Queue[bytes]", stall_s: float
) -> None:
    async with contextlib.aclosing(subscriber.batches(ends=False)) as batches:
        async for batch in batches:
            while not replies.empty():
                await send_within(stall_s, websocket, replies.get_nowait().decode())
            if (refusal := dialogue.refusal) is not None:
                await websocket.close(refusal.close_code, close_reason(refusal))
                return
            for event in batch:
                await send_within(stall_s, websocket, event.json.decode())
                if event.type is EventType.BYE:
                    await websocket.close(1001, GOING_AWAY)
                    return


async def send_within(stall_s: float, websocket: WebSocket, text: str) -> None:
    """Sends a message. Closes the connection and raises WebSocketDisconnect when the peer does not take it in time."""
    try:
        async with asyncio.timeout(stall_s):
            await websocket.send_text(text)
    except TimeoutError:
        with contextlib.suppress(TimeoutError):  # as likely as not it cannot be told so either
            async with asyncio.timeout(1):
                await websocket.close(STALLED, "nothing was taken for too long")
        raise WebSocketDisconnect(STALLED) from None


class _Dialogue:
    """What a client says on one connection, and what is answered. Leaving it gives back its sessions."""

    def __init__(self, service: Service, client: str, subscriber: Subscriber, watched: Watched) -> None:
        self._service = service
        self._client = client
        self._subscriber = subscriber
        self._sessions: dict[str, Presence] = {}
        self.refusal: ScanwireError | None = None  # why the connection is to be closed, after the answer
        for scan_id, cursor in watched.items():
            with contextlib.suppress(UnknownScan):  # reaped since it was looked up
                self.watch(scan_id, cursor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for session in self._sessions.values():
            session.close()

    async def answer(self, message: Mapping[str, Any]) -> bytes:
        """The reply to one message, as JSON."""
        ref: Any = None
        try:
            self._service.limits.charge("message", self._client)
            command = self._parse(message)
            ref = command.get("ref")
            reply = {"ok": True, **await self._obey(command)}
        except ScanwireError as error:
            reply = {"error": error.to_problem()}
            if error.close_code == 1009 or error.extra.get("limit") == "message":
                self.refusal = error
        return orjson.dumps({"ref": ref, **reply})

    def _parse(self, message: Mapping[str, Any]) -> dict[str, Any]:
        text = message.get("text")
        if text is None:
            raise InvalidRequest("The message is binary. Send JSON as text.")
        limit = self._service.settings.max_message_bytes
        if len(text) > limit or len(text.encode()) > limit:
            raise TooLarge(f"A message may have {limit} bytes. Send less.", max_bytes=limit)
        try:
            command = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"The message is not JSON: {error}.") from None
        if not isinstance(command, dict):
            raise InvalidRequest('The message is not a JSON object such as {"op":"ping"}.')
        ref = command.get("ref")
        if not isinstance(ref, str | int | None) or (isinstance(ref, str) and len(ref) > _MAX_REF_CHARS):
            del command["ref"]
            raise InvalidParams.of("ref", f"must be an integer or a text of up to {_MAX_REF_CHARS} characters")
        return command

    async def _obey(self, command: dict[str, Any]) -> dict[str, Any]:
        command = {name: value for name, value in command.items() if name != "ref"}
        match command.pop("op", None):
            case "ping":
                _refuse_others("ping", command)
                return {"ts": self._service.log.now_ms()}
            case "subscribe":
                return self._subscribe(command)
            case "unsubscribe":
                scan_id = _take_scan("unsubscribe", command)
                self._service.hub.unsubscribe(self._subscriber, scan_id)
                if scan_id in self._sessions:
                    self._sessions.pop(scan_id).close()
                return {"scan": scan_id}
            case "submit":
                return await self._submit(command)
            case "cancel":
                scan_id = _take_scan("cancel", command)
                scan = await self._service.admission.cancel(self._client, scan_id)
                return {"scan": scan_id, "snapshot": make_answer(self._service, self._client, scan)}
            case op:
                raise InvalidParams.of(
                    "op", f"{str(op)[:40]!r} is unknown; there are subscribe, unsubscribe, submit, cancel, ping"
                )

    def _subscribe(self, command: dict[str, Any]) -> dict[str, Any]:
        after = command.pop("after", None)
        scan_id = _take_scan("subscribe", command)
        if not isinstance(after, str | None):
            raise InvalidParams.of("after", "must be a cursor, as text")
        scan = self.watch(scan_id, Cursor.parse(after) if after else None)
        return {"scan": scan_id, "snapshot": make_answer(self._service, self._client, scan)}

    def watch(self, scan_id: str, cursor: Cursor | None) -> Scan:
        """The scan, whose events come from now on. Raises UnknownScan, and InvalidParams for one too many."""
        scan = self._service.log.get(scan_id)
        limit = self._service.settings.max_scans_per_stream
        if scan_id not in self._sessions and len(self._sessions) >= limit:
            raise InvalidParams.of("scan", f"one connection may watch {limit} scans; unsubscribe from one first")
        self._service.hub.subscribe(self._subscriber, scan_id, cursor)
        if scan_id not in self._sessions:
            self._sessions[scan_id] = self._service.sessions.stream(self._client, [scan_id])
        return scan

    async def _submit(self, command: dict[str, Any]) -> dict[str, Any]:
        key = command.pop("idempotency_key", None)
        if not isinstance(key, str | None):
            raise InvalidParams.of("idempotency_key", "must be text")
        self._service.limits.charge("read", self._client)
        asked = Submission.read(command)
        scan, joined, token = await self._service.admission.submit(self._client, asked, key)
        if not joined:
            self._service.limits.refund("read", self._client)
        reply = {"scan": scan.id, "snapshot": make_answer(self._service, self._client, scan, joined=joined)}
        return reply if token is None else {**reply, "producer_token": token}


def _take_scan(op: str, command: dict[str, Any]) -> str:
    scan_id = command.pop("scan", None)
    _refuse_others(op, command)
    if not isinstance(scan_id, str):
        raise InvalidParams.of("scan", "must be the id of a scan")
    return scan_id


def _refuse_others(op: str, command: Mapping[str, Any]) -> None:
    if command:
        raise InvalidParams.of(next(iter(command))[:40], f"is not a member of the message {op!r}")
