"""The far end of a connection, byte by byte: what a well-behaved client library hides or would never do."""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

Head = tuple[bytes, dict[bytes, bytes]]


class Peer:
    """A socket that is read when the test says so, and not before."""

    def __init__(self, connection: socket.socket, host: str) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._held = b""  # read, and not yet given
        self.host = host

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._socket, data)

    async def ask(self, path: str, *fields: str, version: str = "1.1", method: str = "GET", body: bytes = b"") -> None:
        """Sends a request, and waits for nothing."""
        head = "\r\n".join((f"{method} {path} HTTP/{version}", f"Host: {self.host}", *fields, "", ""))
        await self.send(head.encode() + body)

    async def read_some(self, size: int = 65_536) -> bytes:
        """What comes next; empty at the end. Raises ConnectionError when it is reset."""
        if self._held:
            held, self._held = self._held[:size], self._held[size:]
            return held
        async with asyncio.timeout(20):
            return await self._loop.sock_recv(self._socket, size)

    async def read_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            some = await self.read_some(size - len(data))
            if not some:
                raise EOFError(data)
            data += some
        return data

    async def read_until(self, mark: bytes) -> bytes:
        """Everything up to the mark, with it. Raises EOFError, with what came, when it does not come."""
        data = b""
        while mark not in data:
            some = await self.read_some()
            if not some:
                raise EOFError(data)
            data += some
        place = data.index(mark) + len(mark)
        self._held = data[place:] + self._held
        return data[:place]

    async def read_head(self) -> Head:
        """Status line and header fields, with names in lower case."""
        status, *fields = (await self.read_until(b"\r\n\r\n"))[:-4].split(b"\r\n")
        pairs = (field.partition(b": ") for field in fields)
        return status, {name.lower(): value for name, _, value in pairs}

    async def read_chunk(self) -> bytes:
        """One chunk of a body (RFC 9112, 7.1); empty when it was the last."""
        size = int((await self.read_until(b"\r\n"))[:-2], 16)
        data = await self.read_exactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def read_chunks(self) -> bytes:
        """The rest of a chunked body."""
        body = b""
        while chunk := await self.read_chunk():
            body += chunk
        return body

    async def read_answer(self) -> tuple[bytes, dict[bytes, bytes], bytes]:
        """A whole answer with a Content-Length or in chunks."""
        status, fields = await self.read_head()
        if b"content-length" in fields:
            return status, fields, await self.read_exactly(int(fields[b"content-length"]))
        return status, fields, await self.read_chunks()

    async def read_rest(self) -> bytes:
        """Everything up to the end of the connection, orderly or not."""
        data = b""
        with contextlib.suppress(ConnectionError):
            while some := await self.read_some():
                data += some
        return data

    def reset(self) -> None:
        """Breaks the connection off in the rudest way: what is on its way to here is refused."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def close(self) -> None:
        self._socket.close()


@contextlib.asynccontextmanager
async def meet(url: str, *, receive_buffer: int | None = None) -> AsyncIterator[Peer]:
    """A connection to a server; with `receive_buffer` the kernel takes about so many bytes that nobody has read."""
    host, _, port = url.partition("://")[2].partition(":")
    with socket.socket() as connection:
        connection.setblocking(False)
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
        yield Peer(connection, f"{host}:{port}")


def parse_events(body: bytes) -> list[dict[str, Any]]:
    """The events of an SSE body; heartbeats and other comments have none."""
    lines = body.decode().split("\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def durable(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if "id" in event]
