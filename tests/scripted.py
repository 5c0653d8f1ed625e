"""A server on a raw socket that answers by a script: for everything that a good server never does."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from app.core.scan import digest_rows

SCAN = "s_scripted"
Answer = Callable[["Request", asyncio.StreamWriter], Awaitable[None]]


class Request(NamedTuple):
    head: str

    @property
    def accept(self) -> str:
        match = re.search(r"^accept: (.*)\r$", self.head, re.IGNORECASE | re.MULTILINE)
        return match[1] if match else ""

    @property
    def after(self) -> int:
        """The number in the cursor that was sent; 0 without one."""
        match = re.search(r"after=test-(\d+)", self.head)
        return int(match[1]) if match else 0


class ScriptedServer:
    """Gives the answers in their order, one a connection; after the last one connections are just closed."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.requests: list[Request] = []
        self.url = ""
        self.answers = list(answers)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            if match := re.search(r"content-length: (\d+)", head, re.IGNORECASE):
                await reader.readexactly(int(match[1]))
            self.requests.append(Request(head))
            if self.answers:
                await self.answers.pop(0)(self.requests[-1], writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def script(*answers: Answer) -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer(answers)
    server = await asyncio.start_server(scripted.answer, "127.0.0.1", 0)
    scripted.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield scripted


# What is said


def make_event(seq: int, type: str, data: dict[str, Any], **others: Any) -> dict[str, Any]:
    head = {"id": f"test-{seq}", "scan": SCAN, "seq": seq, "type": type, "ts": 1_764_000_000_000 + seq}
    return {**head, **others, "data": data}


def make_events(count: int = 4) -> list[dict[str, Any]]:
    """A whole scan of `count` matches, one an event, with text that is hard on parsers."""
    rows = [{"symbol": f"S{index}\u2028\u0085é", "gap_pct": index / 7} for index in range(count)]
    events = [make_event(1, "queued", {"position": 1, "eta_s": None}), make_event(2, "started", {"total": count})]
    events += [make_event(3 + i, "matches", {"chunk": i, "rows": [row]}) for i, row in enumerate(rows)]
    end = {"state": "completed", "matches": count, "digest": digest_rows(rows), "skipped": [], "elapsed_s": 1}
    return [*events, make_event(3 + count, "end", end)]


def make_signal(type: str, data: dict[str, Any]) -> dict[str, Any]:
    """An event of the connection."""
    return {"scan": None, "seq": 0, "type": type, "ts": 1, "data": data}


def make_reset(snapshot: dict[str, Any] | None) -> dict[str, Any]:
    return {"scan": SCAN, "seq": 0, "type": "reset", "ts": 1, "data": {"reason": "epoch", "snapshot": snapshot}}


def encode(events: Sequence[dict[str, Any]], accept: str) -> bytes:
    """The body of an answer that holds these events, in the format asked for."""
    texts = [json.dumps(event, ensure_ascii=False) for event in events]
    if accept == "text/event-stream":
        return b": ok\n\n" + "".join(f"data: {text}\n\n" for text in texts).encode()
    if accept == "application/x-ndjson":
        return ("\n" + "".join(f"{text}\n" for text in texts)).encode()
    is_closed = any(event["type"] == "end" for event in events)
    tail = f'],"cursor":"test-0","closed":{json.dumps(is_closed)},"poll_after_s":1.5}}'
    return ('{"events":[' + ",".join(texts) + tail).encode()


def make_head(content_type: str, status: str = "200 OK", *fields: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", "Connection: close", *fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


# How it is said


def tell(events: Sequence[dict[str, Any]], *, cut: int | None = None, before: bytes = b"") -> Answer:
    """The events behind the request's cursor, in the format asked for; the connection breaks after `cut` bytes."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        new = [event for event in events if "id" not in event or event["seq"] > request.after]
        writer.write(make_head(request.accept) + (before + encode(new, request.accept))[:cut])
        await writer.drain()
        if cut is not None:
            writer.transport.abort() if cut % 2 else writer.close()

    return answer


def tell_all(events: Sequence[dict[str, Any]]) -> Answer:
    """These events, whatever the cursor says."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(make_head(request.accept) + encode(events, request.accept))
        await writer.drain()

    return answer


def refuse(status: str, problem: dict[str, Any] | None = None, *fields: str) -> Answer:
    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(make_head("application/problem+json", status, *fields) + json.dumps(problem or {}).encode())
        await writer.drain()

    return answer


def stay_silent(head: bytes = b"", until: asyncio.Event | None = None) -> Answer:
    """Says this much, and then nothing for as long as the client stands it."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head or make_head(request.accept))
        await writer.drain()
        while not writer.transport.is_closing():  # noqa: ASYNC110 - the transport has no event for it
            await asyncio.sleep(0.01)

    return answer


async def hang_up(request: Request, writer: asyncio.StreamWriter) -> None:
    """Breaks the connection instead of answering."""
    writer.transport.abort()
