"""The producer: posts events at a steady rate on one connection, without waiting for one answer before the next."""

import re
import socket
import time
from collections.abc import Callable, Sequence

ANSWER_WITHIN_S = 60
Post = Callable[[Sequence[int]], Sequence[bytes]]  # the requests that carry an event for each of these timestamps


def produce(port: int, make_post: Post, *, rate: float, events: int, tick_s: float = 0, last: bytes = b"") -> None:
    """Posts so many events at so many a second, then `last`; returns when all posts are answered with 2xx.

    Events that are due within one tick are posted together, as a producer of many would: in one post where the
    server takes several, in pipelined ones where it does not. A timestamp is taken when the post leaves.
    """
    ticks, posts, made, answers = 0, 0, 0, bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_WITHIN_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = time.monotonic()
        while made < events:
            time.sleep(max(0.0, started + max(made / rate, ticks * tick_s) - time.monotonic()))
            due = max(1, min(int((time.monotonic() - started) * rate) + 1, events) - made) if tick_s else 1
            stamp = time.monotonic_ns()
            requests = make_post(range(stamp, stamp + due))  # 1 ns apart, so that no two events are alike
            connection.sendall(b"".join(requests))
            ticks, posts, made = ticks + 1, posts + len(requests), made + due
            _take(connection, answers, socket.MSG_DONTWAIT)
        if last:
            connection.sendall(last)
        wanted = posts + bool(last)
        while answers.count(b"HTTP/1.1 ") < wanted and _take(connection, answers):
            pass
    refused = set(re.findall(rb"HTTP/1\.1 [^2].*", answers))
    if refused or answers.count(b"HTTP/1.1 ") < wanted:
        raise SystemExit(f"the producer was refused: {refused or 'not all posts were answered'}")


def _take(connection: socket.socket, answers: bytearray, flags: int = 0) -> bool:
    try:
        part = connection.recv(1 << 16, flags)
    except BlockingIOError:
        return True
    answers += part
    return bool(part)


def make_event(stamp: int, bytes_: int) -> str:
    """One event as JSON of about so many bytes, with the timestamp that the load looks for."""
    return f'{{"t":"@{stamp:016d}","pad":"{"x" * (bytes_ - 34)}"}}'


def make_request(method: str, path: str, body: str = "", headers: str = "") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}"
    if body:
        head += f"Content-Length: {len(body)}\r\n"
    return f"{head}\r\n{body}".encode()
