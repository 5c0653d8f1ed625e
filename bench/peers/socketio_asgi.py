"""python-socketio on uvicorn, WebSocket transport only: every client gets sio.emit(name, object)."""

import socketio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

sio = socketio.AsyncServer(async_mode="asgi", transports=["websocket"])


async def publish(request: Request) -> Response:
    await sio.emit("matches", await request.json())
    return Response(status_code=202)


app = socketio.ASGIApp(sio, Starlette(routes=[Route("/publish", publish, methods=["POST"])]))
