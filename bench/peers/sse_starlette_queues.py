"""Fan-out as it is usually written with sse-starlette: one asyncio.Queue for every subscriber."""

import asyncio
from collections.abc import AsyncIterator

from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

queues: set[asyncio.Queue[str]] = set()


async def subscribe(request: Request) -> EventSourceResponse:
    async def listen() -> AsyncIterator[dict[str, str]]:
        queue: asyncio.Queue[str] = asyncio.Queue()
        queues.add(queue)
        try:
            yield {"comment": "ok"}
            while True:
                yield {"event": "matches", "data": await queue.get()}
        finally:
            queues.discard(queue)

    return EventSourceResponse(listen())


async def publish(request: Request) -> Response:
    text = (await request.body()).decode()
    for queue in queues:
        queue.put_nowait(text)
    return Response(status_code=202)


app = Starlette(
    routes=[Route("/events", subscribe, methods=["GET"]), Route("/publish", publish, methods=["POST"])],
)
