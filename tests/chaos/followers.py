"""Subscribers on plain sockets, hundreds in one event loop: they come back with their cursor, and keep count."""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any

import orjson

BACKOFF_S, BACKOFF_MAX_S = 0.5, 2.0
POLL_EVERY_S = 0.25
_HANDSHAKE = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
_KEY = "c2NhbndpcmUgaXMgaGVyZQ=="
_TEXT, _CLOSE, _PING, _PONG = 1, 8, 9, 10


class Refused(Exception):
    """The server answered, with something else than a stream."""


class Follower:
    """Follows scans to their ends over one transport: `sse`, `websocket` or `poll`.

    Times are of `time.monotonic()`. `away_s` is the longest time without a connection; for polls the longest time
    between two answers.
    """

    def __init__(self, port: int, scans: Iterable[str], transport: str) -> None:
        self.port = port
        self.scans = list(scans)
        self.transport = transport
        self.cursor: str | None = None
        self.events: list[dict[str, Any]] = []  # durable ones, as they came
        self.byes: list[tuple[float, float]] = []  # when, and after how many seconds to come back
        self.away_s = 0.0
        self.refused = 0  # connections that were not answered with a stream
        self.is_connected = asyncio.Event()
        self._left: float | None = None
        self._open = set(self.scans)

    async def run(self) -> None:
        failures = 0
        while self._open:
            back_s = None
            try:
                async with contextlib.aclosing(self._connect()) as events:
                    async for event in events:
                        failures = 0
                        self._arrive()
                        if event is None:
                            continue
                        if event["type"] == "bye":
                            back_s = event["data"]["reconnect_ms"] / 1000
                            self.byes.append((time.monotonic(), back_s))
                            break
                        self._take(event)
                        if not self._open:
                            return
            except (OSError, EOFError, Refused) as error:
                self.refused += isinstance(error, Refused | ConnectionRefusedError)
            self._leave()
            jitter_s = random.random() * min(BACKOFF_MAX_S, BACKOFF_S * 2**failures)
            failures += 1
            await asyncio.sleep((back_s or 0) + jitter_s)

    def _take(self, event: dict[str, Any]) -> None:
        if "id" in event:
            self.cursor = event["id"]
            self.events.append(event)
            if event["type"] == "end":
                self._open.discard(event["scan"])

    def _arrive(self) -> None:
        if self._left is not None:
            self.away_s = max(self.away_s, time.monotonic() - self._left)
        self._left = time.monotonic() if self.transport == "poll" else None
        self.is_connected.set()

    def _leave(self) -> None:
        self.is_connected.clear()
        if self._left is None:
            self._left = time.monotonic()

    def seqs(self, scan: str) -> list[int]:
        return [event["seq"] for event in self.events if event["scan"] == scan]

    # Transports: each gives the events of one connection, and None for any sign that it is there

    def _connect(self) -> AsyncGenerator[dict[str, Any] | None, None]:
        return {"sse": self._stream, "websocket": self._converse, "poll": self._poll}[self.transport]()

    def _path(self, base: str) -> str:
        after = "" if self.cursor is None else f"&after={self.cursor}"
        return f"{base}?{'&'.join(f'scan={scan}' for scan in sorted(self._open))}{after}"

    @contextlib.asynccontextmanager
    async def _ask(self, path: str, *fields: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        try:
            head = "\r\n".join((f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", *fields, "", ""))
            writer.write(head.encode())
            yield reader, writer
        finally:
            writer.close()

    async def _stream(self) -> AsyncGenerator[dict[str, Any] | None, None]:
        async with self._ask(self._path("/v1/events"), "Accept: text/event-stream") as (reader, _):
            head = await reader.readuntil(b"\r\n\r\n")
            if b"200" not in head[:15] or b"event-stream" not in head:
                raise Refused(head)
            held = b""
            while size := int(await reader.readline() or b"0", 16):
                held += (await reader.readexactly(size + 2))[:-2]
                yield None
                *blocks, held = held.split(b"\n\n")
                for block in blocks:
                    for line in block.split(b"\n"):
                        if line.startswith(b"data: "):
                            yield orjson.loads(line[6:])

    async def _converse(self) -> AsyncGenerator[dict[str, Any] | None, None]:
        async with self._ask(self._path("/v1/ws"), _HANDSHAKE + _KEY) as (reader, writer):
            head = await reader.readuntil(b"\r\n\r\n")
            if b"101" not in head[:15]:
                raise Refused(head)
            yield None
            while True:
                first, size = await reader.readexactly(2)
                if size > 125:
                    size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8))
                payload = await reader.readexactly(size)
                if first & 15 == _TEXT:
                    yield orjson.loads(payload)
                elif first & 15 == _PING:
                    writer.write(bytes((0x80 | _PONG, 0x80)) + bytes(4))
                elif first & 15 == _CLOSE:
                    writer.write(bytes((0x80 | _CLOSE, 0x80 | size)) + bytes(4) + payload)
                    return

    async def _poll(self) -> AsyncGenerator[dict[str, Any] | None, None]:
        while True:
            async with self._ask(self._path("/v1/events"), "Accept: application/json", "Connection: close") as (
                reader,
                _,
            ):
                head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
            if b"200" not in head[:15]:
                raise Refused(head)
            yield None
            for event in orjson.loads(body)["events"]:
                if event["type"] != "bye":  # a poll is over anyway
                    yield event
            await asyncio.sleep(POLL_EVERY_S)


def count_streams(default: int) -> int:
    """How many streams a test opens: many more than in the quick run where SCANWIRE_TEST_STREAMS says so."""
    return int(os.environ.get("SCANWIRE_TEST_STREAMS", default))
