"""Rules behind a real nginx that runs README's text: nothing is held back, and nothing is lost when it, or the server
behind it, is exchanged.

Nothing here looks at a clock: an event is made when the one before has arrived, so one that is held back is waited for
in vain.
"""

import asyncio
import contextlib
import getpass
import json
import re
import shutil
import socket
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin, Subprotocol

from app.client import Client
from app.core.scan import State
from app.core.settings import Settings
from tests.conftest import require, until
from tests.peers import meet
from tests.serving import Serving, Tls, serve
from tests.test_backpressure import PART, SMALL
from tests.test_push import add_scan
from tests.test_scan import QUEUED, STARTED, ended, found
from tests.test_wire import count_held, tls

__all__ = ["tls"]

README = Path(__file__).parents[2] / "README.md"
SSE, NDJSON = "text/event-stream", "application/x-ndjson"
BEHIND: dict[str, Any] = {"workers": 1, "trusted_proxies": ("127.0.0.1",)}
WAIT_S = 20
PART_BYTES = len(json.dumps(PART[1]))


@dataclass(frozen=True, slots=True)
class Nginx:
    """One that runs: README's server at `url` and, with TLS, at `tls_url`; at `bare_url` one with a bare proxy_pass.

    `command` is what tells it something with `-s`.
    """

    process: Process
    url: str
    tls_url: str
    bare_url: str
    command: tuple[str, ...]

    def workers(self) -> dict[int, str]:
        """What its workers say they are doing, by pid."""
        pid, said = self.process.pid, {}
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                said[int(child)] = Path(f"/proc/{child}/cmdline").read_bytes().rstrip(b"\0").decode()
        return said

    async def reload(self) -> None:
        """Returns when the workers there were take nothing new any more, and others do."""
        before = self.workers()
        told = await asyncio.create_subprocess_exec(*self.command, "-s", "reload", stderr=DEVNULL)
        assert await told.wait() == 0
        await until(lambda: any(worker not in before for worker in self.workers()))
        await until(lambda: all("shutting down" in self.workers().get(worker, "shutting down") for worker in before))


def find_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def read_readme(upstream: str, tls: Tls, http_port: int, tls_port: int) -> str:
    """README's text with other addresses and files; nothing else in it is changed."""
    text: str
    (text,) = re.findall(r"^```nginx\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    for old, new in {
        "listen 443 ssl": f"listen 127.0.0.1:{http_port}; listen 127.0.0.1:{tls_port} ssl",
        "/etc/ssl/scan.example.org.pem": str(tls.certificate),
        "/etc/ssl/scan.example.org.key": str(tls.key),
        "http://127.0.0.1:8000": upstream,
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@contextlib.asynccontextmanager
async def proxy(folder: Path, upstream: str, tls: Tls, *, main: str = "") -> AsyncIterator[Nginx]:
    """nginx in front of a server, with its defaults; `main` goes into the main context."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    require(program is not None, "no nginx")
    assert program is not None
    http_port, tls_port, bare_port = find_ports(3)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    text = f"""
        daemon off; pid {folder}/nginx.pid; user {getpass.getuser()} {getpass.getuser()}; {main}
        events {{}}
        http {{
            access_log off; {" ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)}
            server {{ listen 127.0.0.1:{bare_port}; location / {{ proxy_pass {upstream}; }} }}
            {read_readme(upstream, tls, http_port, tls_port)}
        }}"""
    (folder / "nginx.conf").write_text(text)
    command = (program, "-c", f"{folder}/nginx.conf", "-e", f"{folder}/error.log")
    process = await asyncio.create_subprocess_exec(*command, stderr=DEVNULL)
    nginx = Nginx(
        process,
        f"http://127.0.0.1:{http_port}",
        f"https://127.0.0.1:{tls_port}",
        f"http://127.0.0.1:{bare_port}",
        command,
    )
    try:
        async with asyncio.timeout(WAIT_S), httpx.AsyncClient() as http:
            while True:
                assert process.returncode is None, (folder / "error.log").read_text()
                with contextlib.suppress(httpx.TransportError):
                    await http.get(nginx.bare_url)
                    break
                await asyncio.sleep(0.01)
        yield nginx
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


@contextlib.asynccontextmanager
async def serve_behind(folder: Path, prices: Path, tls: Tls, **settings: Any) -> AsyncIterator[tuple[Serving, Nginx]]:
    async with (
        serve(folder / "state", prices, **BEHIND | settings) as serving,
        proxy(folder, serving.url, tls) as nginx,
    ):
        yield serving, nginx


@contextlib.asynccontextmanager
async def stream(url: str, accept: str, tls: Tls, *, after: str = "") -> AsyncIterator[AsyncIterator[str]]:
    """The lines of a stream by curl, which speaks HTTP/2 under TLS; its head comes first."""
    program = shutil.which("curl")
    require(program is not None, "no curl")
    assert program is not None
    words = ["-sNi", "--http2", "--cacert", str(tls.certificate), "-H", f"Accept: {accept}"]
    words += ["-H", f"Last-Event-ID: {after}"] if after else []
    curl = await asyncio.create_subprocess_exec(program, *words, url, stdout=PIPE)
    assert curl.stdout is not None

    async def lines() -> AsyncIterator[str]:
        assert curl.stdout is not None
        while True:
            async with asyncio.timeout(WAIT_S):
                line = await curl.stdout.readline()
            if not line:
                return
            yield line.decode().rstrip("\r\n")

    try:
        yield lines()
    finally:
        if curl.returncode is None:
            curl.kill()
        await curl.wait()


async def read_event(lines: AsyncIterator[str]) -> Any:
    """The next durable event of a stream, in either format; None at the end."""
    async for line in lines:
        text = line.removeprefix("data: ")
        if text.startswith("{") and "id" in (event := json.loads(text)):
            return event
    return None


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("accept", [SSE, NDJSON])
@pytest.mark.parametrize(("way", "version"), [("tls_url", "HTTP/2"), ("url", "HTTP/1.1"), ("bare_url", "HTTP/1.1")])
async def test_the_first_byte_and_each_event_come_at_once(
    tmp_path: Path, sample_prices: Path, tls: Tls, way: str, version: str, accept: str
) -> None:
    async with serve_behind(tmp_path, sample_prices, tls) as (serving, nginx):
        log = serving.service.log
        await add_scan(log, "s_a", QUEUED)
        async with stream(f"{getattr(nginx, way)}/v1/scans/s_a/events", accept, tls) as lines:
            assert (await anext(lines)).split()[:2] == [version, "200"]
            assert (await read_event(lines))["seq"] == 1
            for seq, part in enumerate([STARTED, *map(found, (1, 2, 3)), ended(State.COMPLETED)], 2):
                await log.append("s_a", part)
                assert (await read_event(lines))["seq"] == seq
            assert await read_event(lines) is None  # the end of the stream comes as well
        await until(lambda: not any(count_held(serving)))


async def test_the_first_byte_comes_though_there_is_no_event(tmp_path: Path, sample_prices: Path, tls: Tls) -> None:
    async with serve_behind(tmp_path, sample_prices, tls) as (serving, nginx):
        await add_scan(serving.service.log, "s_a", QUEUED)
        cursor = f"{serving.service.log.epoch}-{serving.service.log.shown_n}"
        async with stream(f"{nginx.tls_url}/v1/scans/s_a/events", SSE, tls, after=cursor) as lines:
            async for line in lines:
                if line == ": ok":
                    break
            else:
                pytest.fail("the stream ended")
        await until(lambda: not any(count_held(serving)))  # that the client left comes through too


async def test_a_client_that_stops_reading_is_cut_off_and_nginx_keeps_no_backlog_for_it(
    tmp_path: Path, sample_prices: Path, tls: Tls
) -> None:
    async with (
        serve_behind(tmp_path, sample_prices, tls, stall_s=0.5) as (serving, nginx),
        meet(nginx.url, receive_buffer=SMALL) as stopped,
    ):
        log, hub = serving.service.log, serving.service.hub
        await add_scan(log, "s_a", QUEUED, STARTED)
        await stopped.ask("/v1/scans/s_a/events", f"Accept: {SSE}")
        await until(lambda: hub.statistics().channels == 1)
        for _ in range(40):  # far more than the kernel takes for both connections
            await log.append("s_a", *[PART] * (2**20 // PART_BYTES))
        await until(lambda: hub.statistics().channels == 0)


@pytest.mark.parametrize("way", ["tls_url", "url"])
async def test_a_websocket_is_upgraded_and_each_message_comes_at_once(
    tmp_path: Path, sample_prices: Path, tls: Tls, way: str
) -> None:
    async with serve_behind(tmp_path, sample_prices, tls) as (serving, nginx):
        log = serving.service.log
        await add_scan(log, "s_a", QUEUED)
        url = getattr(nginx, way).replace("http", "ws", 1)
        trust = tls.make_context() if way == "tls_url" else None
        # A browser sends the page's origin, whose host and port must reach the server.
        origin, own = Origin(getattr(nginx, way)), [Subprotocol("scanwire.v1")]
        async with connect(f"{url}/v1/ws?scan=s_a", subprotocols=own, origin=origin, ssl=trust) as peer:
            for seq, part in enumerate([STARTED, *map(found, (1, 2, 3)), ended(State.COMPLETED)], 2):
                assert json.loads(await peer.recv())["seq"] == seq - 1
                await log.append("s_a", part)
            await peer.send('{"op":"ping","ref":1}')
            assert json.loads(await peer.recv())["type"] == "end"
            assert json.loads(await peer.recv())["ref"] == 1
        await until(lambda: not any(count_held(serving)))


async def test_a_long_poll_is_held_and_answered_when_something_happens(
    tmp_path: Path, sample_prices: Path, tls: Tls
) -> None:
    async with (
        serve_behind(tmp_path, sample_prices, tls) as (serving, nginx),
        httpx.AsyncClient(base_url=nginx.url, timeout=WAIT_S) as http,
    ):
        log = serving.service.log
        await add_scan(log, "s_a", QUEUED)
        cursor = (await http.get("/v1/scans/s_a")).json()["cursor"]
        for path in ("/v1/scans/s_a", "/v1/scans/s_a/events"):
            asking = asyncio.create_task(
                http.get(path, params={"after": cursor}, headers={"Prefer": "wait=60", "Accept": "application/json"})
            )
            await until(lambda: serving.service.limits.statistics().streams == 1)
            await log.append("s_a", QUEUED)
            answer = await asking
            assert answer.status_code == 200
            assert answer.json()["cursor"] != cursor
            cursor = answer.json()["cursor"]
    assert not any(count_held(serving))


def test_nothing_that_is_open_is_silent_for_as_long_as_a_proxy_waits() -> None:
    settings, proxy_read_timeout_s = Settings(), 60
    assert settings.long_poll_max_s < proxy_read_timeout_s - 5
    assert settings.heartbeat_s < proxy_read_timeout_s / 2


async def test_who_asks_through_the_proxy_is_charged_and_nobody_else_whatever_they_claim(
    tmp_path: Path, sample_prices: Path, tls: Tls
) -> None:
    async with serve_behind(tmp_path, sample_prices, tls, read_burst=2, read_per_s=0.001) as (_, nginx):

        async def ask(address: str, claimed: str) -> int:
            transport = httpx.AsyncHTTPTransport(local_address=address)
            async with httpx.AsyncClient(transport=transport, timeout=WAIT_S) as http:
                return (await http.get(f"{nginx.url}/v1/scans", headers={"X-Forwarded-For": claimed})).status_code

        assert [await ask("127.0.0.2", f"192.0.2.{n}") for n in range(4)] == [200, 200, 429, 429]
        assert [await ask("127.0.0.3", "127.0.0.2") for _ in range(3)] == [200, 200, 429]


# What is exchanged under open streams


async def test_streams_go_on_through_a_reload(tmp_path: Path, sample_prices: Path, tls: Tls) -> None:
    async with serve_behind(tmp_path, sample_prices, tls) as (serving, nginx):
        log = serving.service.log
        await add_scan(log, "s_a", QUEUED)
        path = "/v1/scans/s_a/events"
        async with (
            stream(nginx.tls_url + path, SSE, tls) as second_version,
            stream(nginx.url + path, SSE, tls) as first_version,
            connect(f"{nginx.url.replace('http', 'ws')}/v1/ws?scan=s_a") as peer,
        ):
            assert (await read_event(second_version))["seq"] == (await read_event(first_version))["seq"] == 1
            assert json.loads(await peer.recv())["seq"] == 1
            await nginx.reload()
            assert len(nginx.workers()) == 2
            async with stream(nginx.tls_url + path, SSE, tls) as newcomer:
                assert (await read_event(newcomer))["seq"] == 1
                for seq, part in enumerate([STARTED, found(1), ended(State.COMPLETED)], 2):
                    await log.append("s_a", part)
                    for lines in (second_version, first_version, newcomer):
                        assert (await read_event(lines))["seq"] == seq
                    assert json.loads(await peer.recv())["seq"] == seq
        await until(lambda: len(nginx.workers()) == 1)
        await until(lambda: not any(count_held(serving)))


async def follow(client: Client, scan: str, seqs: "asyncio.Queue[int]") -> list[int]:
    """The seqs of all durable events, each also put into `seqs` as it comes."""
    told = []
    async for event in client.scan(scan):
        if event.id is not None:
            told.append(event.seq)
            seqs.put_nowait(event.seq)
    return told


async def test_a_reload_that_cuts_streams_loses_nothing_and_gives_nothing_twice(
    tmp_path: Path, sample_prices: Path, tls: Tls
) -> None:
    async with (
        serve(tmp_path / "state", sample_prices, **BEHIND) as serving,
        proxy(tmp_path, serving.url, tls, main="worker_shutdown_timeout 200ms;") as nginx,
        Client(nginx.url, formats=(SSE,)) as client,
    ):
        log, came = serving.service.log, asyncio.Queue[int]()
        await add_scan(log, "s_a", QUEUED, STARTED)
        following = asyncio.create_task(follow(client, "s_a", came))
        url, told = f"{nginx.url.replace('http', 'ws')}/v1/ws?scan=s_a", list[Any]()
        async with stream(f"{nginx.tls_url}/v1/scans/s_a/events", SSE, tls) as lines, connect(url) as peer:
            for seq in (1, 2):
                assert await came.get() == (await read_event(lines))["seq"] == seq
                told.append(json.loads(await peer.recv()))
            await nginx.reload()
            await until(lambda: len(nginx.workers()) == 1)  # the old one has cut them all
            for rows in (1, 2, 3):
                await log.append("s_a", found(rows))
            assert await read_event(lines) is None
            with pytest.raises(ConnectionClosed):
                await peer.recv()
        path = f"/v1/scans/s_a/events?after={told[-1]['id']}"
        async with stream(nginx.tls_url + path, SSE, tls) as lines, connect(f"{url}&after={told[-1]['id']}") as peer:
            await log.append("s_a", ended(State.COMPLETED))
            for seq in (3, 4, 5, 6):
                assert (await read_event(lines))["seq"] == json.loads(await peer.recv())["seq"] == seq
        async with asyncio.timeout(WAIT_S):
            assert await following == [1, 2, 3, 4, 5, 6]


async def test_while_the_server_is_away_nginx_says_502_and_clients_go_on_afterwards(
    tmp_path: Path, sample_prices: Path, tls: Tls
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = contextlib.AsyncExitStack()
        serving = await server.enter_async_context(serve(tmp_path / "state", sample_prices, **BEHIND))
        nginx = await stack.enter_async_context(proxy(tmp_path, serving.url, tls))
        client = await stack.enter_async_context(Client(nginx.url, formats=(SSE,)))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=nginx.url, timeout=WAIT_S))
        scan = await serving.submit("external", title="kept")
        events, headers = scan["links"]["events"], {"Authorization": f"Bearer {scan['producer_token']}"}

        async def post(*parts: dict[str, Any]) -> None:
            assert (await http.post(events, json=parts, headers=headers)).status_code == 202

        came = asyncio.Queue[int]()
        following = asyncio.create_task(follow(client, scan["id"], came))
        await post({"type": "matches", "rows": [{"row": 1}]})
        while await came.get() < 2:
            pass
        await server.aclose()
        assert (await http.get(events)).status_code == 502
        port = int(serving.url.rpartition(":")[2])
        await stack.enter_async_context(serve(tmp_path / "state", sample_prices, port=port, **BEHIND))
        await post({"type": "matches", "rows": [{"row": 2}]}, {"type": "end", "state": "completed"})
        async with asyncio.timeout(WAIT_S):
            assert await following == [1, 2, 3, 4]
