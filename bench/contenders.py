"""The servers that bench.fanout compares: how each is started, subscribed to and fed.

What a peer does is in its own file in bench/peers/. All run on loopback; all but the floor are fed by HTTP POST.
"""

import base64
import contextlib
import getpass
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure import Server, find_port, run_server, serve, serve_scanwire
from bench.producer import Post, make_event, make_request
from bench.subscribers import Subscription, compile_c

PEERS = Path(__file__).parent / "peers"
# Where npm packages are kept between runs.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scanwire-bench"
# A frame of this many bytes arrives for each event, whoever sends it: what Scanwire's SSE frame has with a small row.
FRAME_BYTES = 260
POST_ROWS = 200  # what is well below the default bound of a request body
_JOIN = b"\x81\x82mask\x59\x51"  # a masked text frame "40": a Socket.IO client joins the default namespace


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be delivered: `events` at `rate` per second, each in a frame of about `frame_bytes`."""

    rate: float
    events: int
    frame_bytes: int = FRAME_BYTES


@dataclass(frozen=True, slots=True)
class Feed:
    """A stream of events that can be subscribed to, and how events get into it."""

    subscription: Subscription
    make_post: Post
    last: bytes = b""  # the post that ends it, where it has an end
    makes_events: bool = False  # the server makes all events itself, after one post


@dataclass(frozen=True, slots=True)
class Running:
    """A server that runs; `open_feed` gives a new feed, or the only one it has."""

    server: Server
    open_feed: Callable[[], Feed]


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    start: Callable[[Work, set[int] | None], AbstractContextManager[Running]]
    needs: Sequence[str] = field(default=())  # what is not installed of what it needs


# Scanwire


@contextlib.contextmanager
def start_scanwire(
    work: Work, cpus: set[int] | None, *, websocket: bool = False, env: Mapping[str, str] = {}
) -> Iterator[Running]:
    with serve_scanwire(cpus=cpus, env=env) as server:
        yield Running(server, lambda: open_external_scan(server, work, websocket=websocket))


def open_external_scan(server: Server, work: Work, *, websocket: bool = False, rows: int = 1) -> Feed:
    """A new scan whose matches come by HTTP, so many rows in an event and up to POST_ROWS in a post."""
    params = {"title": "fan-out", "total": work.events, "unit": "events"}
    scan = fetch(server, "/v1/scans", {"scanner": "external", "params": params})
    headers = f"Authorization: Bearer {scan['producer_token']}\r\nContent-Type: application/x-ndjson\r\n"
    row_bytes = count_row_bytes(work, websocket=websocket)

    def make_post(stamps: Sequence[int]) -> list[bytes]:
        all_rows = [make_event(stamp, row_bytes) for stamp in stamps]
        events = ['{"type":"matches","rows":[' + ",".join(some) + "]}" for some in _split(all_rows, rows)]
        bodies = ["\n".join(some) for some in _split(events, max(1, POST_ROWS // rows))]
        return [make_request("POST", f"/v1/scans/{scan['id']}/events", body, headers) for body in bodies]

    end = make_request("POST", f"/v1/scans/{scan['id']}/events", '{"type":"end","state":"completed"}', headers)
    return Feed(subscribe_to_scan(scan["id"], websocket=websocket), make_post, last=end)


def count_row_bytes(work: Work, *, websocket: bool) -> int:
    """The size of the one row of an event, such that its frame has the size that the work asks for."""
    return max(34, work.frame_bytes - (138 if websocket else 178))


def _split(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (items[place : place + size] for place in range(0, len(items), size))


def subscribe_to_scan(*scan_ids: str, websocket: bool = False) -> Subscription:
    """One scan a connection."""
    if websocket:
        requests = [ask_websocket(f"/v1/ws?scan={scan_id}", "scanwire.v1") for scan_id in scan_ids]
    else:
        requests = [ask_sse(f"/v1/scans/{scan_id}/events") for scan_id in scan_ids]
    return Subscription(requests, ready='"type":"started"')


def fetch(server: Server, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


# Peers


def ask_sse(path: str) -> bytes:
    return make_request("GET", path, headers="Accept: text/event-stream\r\n")


def ask_websocket(path: str, subprotocol: str = "") -> bytes:
    key = base64.b64encode(b"scanwire bench 0").decode()
    headers = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
    if subprotocol:
        headers += f"Sec-WebSocket-Protocol: {subprotocol}\r\n"
    return make_request("GET", path, headers=headers)


def make_feed(subscription: Subscription, frame_bytes: int, *, overhead: int) -> Feed:
    """The one feed of a peer. `overhead` is what its frame adds to the event."""

    def make_post(stamps: Sequence[int]) -> list[bytes]:
        events = (make_event(stamp, frame_bytes - overhead) for stamp in stamps)
        return [make_request("POST", "/publish", event, "Content-Type: application/json\r\n") for event in events]

    return Feed(subscription, make_post)


@contextlib.contextmanager
def start_floor(work: Work, cpus: set[int] | None) -> Iterator[Running]:
    port = find_port()
    with tempfile.TemporaryDirectory() as folder:
        program = compile_c(PEERS / "floor.c", Path(folder))
        words = [str(program), str(port), str(work.rate), str(work.events), str(work.frame_bytes)]
        feed = Feed(
            Subscription([ask_sse("/events")], ready=": ok"), lambda _: [make_request("POST", "/")], makes_events=True
        )
        with run_server(words, port, cpus=cpus) as server:
            yield Running(server, lambda: feed)


@contextlib.contextmanager
def start_nchan(work: Work, cpus: set[int] | None, *, websocket: bool = False) -> Iterator[Running]:
    port = find_port()
    with tempfile.TemporaryDirectory() as folder:
        text = (PEERS / "nchan.conf").read_text()
        for name, value in {"PORT": str(port), "FOLDER": folder, "USER": getpass.getuser()}.items():
            text = text.replace(name, value)
        config = Path(folder) / "nginx.conf"
        config.write_text(text)
        request = ask_websocket("/events") if websocket else ask_sse("/events")
        feed = make_feed(Subscription([request]), work.frame_bytes, overhead=4 if websocket else 27)
        with run_server(["nginx", "-c", str(config), "-e", f"{folder}/error.log"], port, cpus=cpus) as master:
            (worker,) = master.children()
            yield Running(Server(worker, port), lambda: feed)


def make_node_peer(name: str, script: str, subscription: Subscription, overhead: int) -> Contender:
    """A Node peer; the packages that its file names are fetched into the cache when they are not there yet."""
    source = PEERS / script
    wanted = re.findall(r"^// npm: (\S+)$", source.read_text(), re.MULTILINE)

    @contextlib.contextmanager
    def start(work: Work, cpus: set[int] | None) -> Iterator[Running]:
        port = find_port()
        modules = CACHE / source.stem
        if not modules.exists():
            modules.mkdir(parents=True)
            subprocess.run(["npm", "install", "--silent", "--no-fund", "--prefix", modules, *wanted], check=True)
        env = {"NODE_PATH": str(modules / "node_modules"), "NODE_ENV": "production"}
        with run_server(["node", str(source), str(port)], port, env=env, cpus=cpus) as server:
            yield Running(server, lambda: make_feed(subscription, work.frame_bytes, overhead=overhead))

    return Contender(name, start, find_missing("node", "npm"))


def make_python_peer(name: str, target: str, package: str, subscription: Subscription, overhead: int) -> Contender:
    @contextlib.contextmanager
    def start(work: Work, cpus: set[int] | None) -> Iterator[Running]:
        with serve(f"bench.peers.{target}:app", cpus=cpus) as server:
            yield Running(server, lambda: make_feed(subscription, work.frame_bytes, overhead=overhead))

    return Contender(name, start, [] if importlib.util.find_spec(package) else [package])


def find_missing(*programs: str) -> list[str]:
    return [program for program in programs if shutil.which(program) is None]


def find_nchan() -> list[str]:
    modules = [
        Path(folder) / "ngx_nchan_module.so" for folder in ("/usr/lib/nginx/modules", "/usr/share/nginx/modules")
    ]
    return find_missing("nginx") + ["Nchan"] * (not any(module.exists() for module in modules))


FLOOR = Contender("write() loop in C, SSE (the floor)", start_floor, find_missing("cc"))
SCANWIRE_SSE = Contender("Scanwire, SSE", start_scanwire)
SCANWIRE_WS = Contender("Scanwire, WebSocket", partial(start_scanwire, websocket=True))
NCHAN_SSE = Contender("Nchan on nginx, SSE", start_nchan, find_nchan())
NCHAN_WS = Contender("Nchan on nginx, WebSocket", partial(start_nchan, websocket=True), find_nchan())
NODE_WS = make_node_peer("Node ws, WebSocket", "ws.js", Subscription([ask_websocket("/")]), 4)
SOCKET_IO = make_node_peer(
    "Socket.IO on Node, WebSocket",
    "socketio.js",
    Subscription([ask_websocket("/socket.io/?EIO=4&transport=websocket")], ready="40{", then=_JOIN),
    18,
)
PYTHON_SOCKETIO = make_python_peer(
    "python-socketio, WebSocket",
    "socketio_asgi",
    "socketio",
    Subscription([ask_websocket("/socket.io/?EIO=4&transport=websocket")], ready="40{", then=_JOIN),
    18,
)
SSE_STARLETTE = make_python_peer(
    "sse-starlette with queues, SSE",
    "sse_starlette_queues",
    "sse_starlette",
    Subscription([ask_sse("/events")], ready=": ok"),
    35,
)
EVERYONE = (FLOOR, SCANWIRE_SSE, SCANWIRE_WS, NCHAN_SSE, NCHAN_WS, NODE_WS, SOCKET_IO, PYTHON_SOCKETIO, SSE_STARLETTE)
