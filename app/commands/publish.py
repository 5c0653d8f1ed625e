"""`scanwire publish`: lines of JSON on standard input become the events of an external scan."""

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

import orjson

from app.client import Client, Production, RequestRefused

MAX_LINE_BYTES = 512 * 1024
READ_BYTES = 64 * 1024
STDIN = 0
BATCH_COUNT = 4000  # lines, and rows in them, in one request
BATCH_BYTES = 512 * 1024
AHEAD_CHUNKS = 16  # that are read before the server has taken what came before
EVENT_TYPES = ("progress", "matches", "end")


class BadInput(Exception):
    """Why the scan cannot go on with this input."""


class BadLine(BadInput):
    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"Line {number} of the input {reason}.")


class Line(NamedTuple):
    number: int
    size: int  # bytes
    event: dict[str, Any]


def read_line(number: int, text: bytes) -> Line:
    """An event as it is, and any other object as a match. Raises BadLine."""
    if len(text) > MAX_LINE_BYTES:
        raise BadLine(number, f"is longer than {MAX_LINE_BYTES} bytes")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadLine(number, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadLine(number, 'is not an object such as {"type":"progress","done":1}')
    if "type" not in value:
        return Line(number, len(text), {"type": "matches", "rows": [value]})
    if value["type"] not in EVENT_TYPES:
        raise BadLine(number, f"has the type {str(value['type'])[:40]!r}; there are {', '.join(EVENT_TYPES)}")
    return Line(number, len(text), value)


class Lines:
    """Lines out of a descriptor, in batches: what is at hand, without waiting for more.

    A thread reads, since neither files nor terminals can be waited for in every event loop.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue(AHEAD_CHUNKS)  # an empty one is the end
        self._fault: OSError | None = None

    async def batches(self) -> AsyncGenerator[list[bytes], None]:
        """Without their line feeds. A line that is longer than any may be is cut off, and the last one. Raises
        BadInput when nothing can be read."""
        threading.Thread(target=self._read, args=(asyncio.get_running_loop(),), daemon=True).start()
        rest = b""  # of a line whose end has not come yet
        is_open = True
        while is_open and len(rest) <= MAX_LINE_BYTES:
            chunks = [await self._chunks.get()]
            while not self._chunks.empty():
                chunks.append(self._chunks.get_nowait())
            is_open = chunks[-1] != b""
            *lines, rest = (rest + b"".join(chunks)).split(b"\n")
            yield lines
        if self._fault is not None:
            raise BadInput(f"Standard input cannot be read: {self._fault.strerror}.")
        yield [rest]

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants it any more
            while True:
                try:
                    chunk = os.read(self._fd, READ_BYTES)
                except OSError as error:
                    self._fault, chunk = error, b""
                asyncio.run_coroutine_threadsafe(self._chunks.put(chunk), loop).result()
                if not chunk:
                    return


class Publisher:
    """Posts lines to a scan, as many at a time as came while the server took the ones before."""

    def __init__(self, scan: Production, total: int | None, unit: str) -> None:
        self._scan = scan
        self._total = total
        self._unit = unit
        self._done: int | None = None
        self.matches = 0
        self._is_shown = sys.stderr.isatty()

    async def publish(self, fd: int) -> None:
        """Until the end of the input, or an `end` in it. Raises BadInput and RequestRefused; then all lines before
        the bad one are published."""
        number = 0
        async with contextlib.aclosing(Lines(fd).batches()) as batches:
            async for texts in batches:
                lines, bad = [], None
                for text in texts:
                    number += 1
                    if text.strip():
                        try:
                            lines.append(read_line(number, text))
                        except BadLine as error:
                            bad = error
                            break
                await self._post_all(lines)
                if bad is not None:
                    raise bad
                if self._scan.state is not None:
                    return

    async def _post_all(self, lines: list[Line]) -> None:
        part: list[Line] = []
        size = count = 0
        for line in lines:
            rows = line.event.get("rows")
            weight = 1 + (len(rows) if isinstance(rows, list) else 0)  # what the server counts
            if part and (count + weight > BATCH_COUNT or size + line.size > BATCH_BYTES):
                await self._post(part)
                part, size, count = [], 0, 0
            part.append(line)
            size, count = size + line.size, count + weight
            if line.event["type"] == "end":  # what comes behind it is not looked at
                break
        if part:
            await self._post(part)

    async def _post(self, lines: list[Line]) -> None:
        try:
            await self._scan.post([line.event for line in lines])
        except RequestRefused as refusal:
            place, reason = find_place(refusal)
            if place is None or place >= len(lines):
                raise
            if place:
                await self._post(lines[:place])
            raise BadLine(lines[place].number, f"is refused: {reason}") from None
        for line in lines:
            if line.event["type"] == "matches":
                self.matches += len(line.event["rows"])
            elif line.event["type"] == "progress":
                self._done = line.event["done"]
                self._total = line.event.get("total", self._total)
        self.show()

    def show(self, end: str = "") -> None:
        """The line of progress, redrawn in place on a terminal."""
        if self._is_shown:
            done = "" if self._done is None else f"{self._done:,}"
            total = "" if self._total is None else f" of {self._total:,}"
            done = f"{done}{total} {self._unit}, " if done else ""
            print(f"\r\x1b[K{done}{self.matches:,} matches{end}", end="", file=sys.stderr, flush=True)


def find_place(refusal: RequestRefused) -> tuple[int | None, str]:
    """Which of the posted events was refused, and why; None when it was not for one of them."""
    for error in refusal.problem.get("errors") or ():
        words = str(error.get("field", "")).split(".")
        if words[0] == "events" and len(words) > 1 and words[1].isdigit():
            inner = ".".join(words[2:])
            return int(words[1]), f"{inner}: {error.get('message')}" if inner else str(error.get("message"))
    return None, str(refusal)


async def publish_input(client: Client, title: str, total: int | None, unit: str) -> str:
    """Publishes standard input as a scan; gives the state that it ended in. Raises ClientError."""
    async with client.produce(title, total=total, unit=unit) as scan:
        print(f"{scan.id} {scan.url}", flush=True)
        publisher = Publisher(scan, total, unit)
        try:
            await publisher.publish(STDIN)
        except asyncio.CancelledError:
            publisher.show("\n")
            print("The scan is cancelled.", file=sys.stderr)
            raise
        except BadInput as error:
            publisher.show("\n")
            print(error, file=sys.stderr)
            await scan.end("failed", str(error))
        except RequestRefused as refusal:
            if scan.state is None:
                raise
            publisher.show("\n")
            print(refusal, file=sys.stderr)
        else:
            publisher.show("\n")
            if scan.state is None:
                await scan.end()
    state = scan.state or "lost"
    print(f"{title} {state}: {publisher.matches:,} match{'es' * (publisher.matches != 1)}", file=sys.stderr)
    return state
