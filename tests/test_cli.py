"""The command line, as a process of its own against a real server."""

import asyncio
import contextlib
import json
import os
import pty
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import pytest_asyncio

from app.commands.demo import read_demo_settings
from app.commands.environment import name_command
from app.core.settings import Settings, hash_key
from tests.conftest import Gate
from tests.serving import Serving, serve

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("trial_scanners")]

ROOT = Path(__file__).parents[1]
RELAXED = ("--preset", "relaxed", "--start", "2005-01-01")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(
    tmp_path_factory: pytest.TempPathFactory, sample_prices: Path, trial_scanners: None
) -> AsyncIterator[Serving]:
    async with serve(tmp_path_factory.mktemp("state"), sample_prices, chunk_rows=1) as serving:
        yield serving


class Ended(NamedTuple):
    code: int
    out: str
    err: str


HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "A" * 22 + "==",
}


async def start(
    *words: str, env: Mapping[str, str] | None = None, out: int | None = None, given: int = asyncio.subprocess.DEVNULL
) -> Process:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SCANWIRE_")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "app",
        *words,
        cwd=ROOT,
        env={"SCANWIRE_WORKERS": "1", **clean, **(env or {})},
        stdin=given,
        stdout=asyncio.subprocess.PIPE if out is None else out,
        stderr=asyncio.subprocess.PIPE,
    )


async def finish(process: Process) -> Ended:
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode is not None
    ended = Ended(process.returncode, (out or b"").decode(), err.decode())
    assert "Traceback" not in ended.err
    return ended


async def run(*words: str, **environment: str) -> Ended:
    return await finish(await start(*words, env=environment))


async def read_until(process: Process, text: str) -> str:
    """What the process wrote to stdout, up to the line that holds the text."""
    assert process.stdout is not None
    lines = []
    async with asyncio.timeout(30):
        while line := (await process.stdout.readline()).decode():
            lines.append(line)
            if text in line:
                return "".join(lines)
    raise AssertionError(f"{text!r} never came; it said: {''.join(lines)}")


def find_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


# Scans


async def test_json_gives_the_events_as_they_are(serving: Serving) -> None:
    ended = await run("scan", "gap-up", *RELAXED, "--json", "--url", serving.url)
    assert ended.code == 0
    events = [json.loads(line) for line in ended.out.splitlines()]
    answer = await serving.http.get(f"/v1/scans/{events[0]['scan']}/events", headers={"Accept": "application/x-ndjson"})
    durable = [line for line in answer.text.splitlines() if '"id":' in line]
    assert [line for line in ended.out.splitlines() if '"id":' in line] == durable
    assert events[-1]["type"] == "end"
    assert "118 matches" in ended.err


async def test_in_a_pipe_matches_are_lines_of_text(serving: Serving) -> None:
    ended = await run("scan", "gap-up", *RELAXED, SCANWIRE_URL=serving.url)
    header, first, *others = ended.out.splitlines()
    assert header.split()[:5] == ["symbol", "date", "close", "volume", "gap"]
    assert first.split()[:5] == ["AAPL", "2005-02-14", "5.44", "45,409,400", "+2.4%"]
    assert len(others) == 117
    assert "\x1b" not in ended.out + ended.err
    assert "gap-up completed: 118 matches" in ended.err
    assert "digest of the rows received is that of the rows found" in ended.err


async def test_every_parameter_of_a_scanner_is_a_flag(serving: Serving) -> None:
    words = ("--gap-pct-min", "0.04", "--vol-ratio-min=0.5", "--param", "close_range_min=0.5", "--symbols", "aapl,MSFT")
    ended = await run("scan", "gap-up", *RELAXED, *words, "--json", "--url", serving.url)
    assert ended.code == 0
    events = [json.loads(line) for line in ended.out.splitlines()]
    params = next(event["data"]["params"] for event in events if event["type"] == "started")
    assert (params["gap_pct_min"], params["vol_ratio_min"], params["close_range_min"]) == (0.04, 0.5, 0.5)
    rows = [row for event in events if event["type"] == "matches" for row in event["data"]["rows"]]
    assert rows
    assert min(row["gap_pct"] for row in rows) >= 0.04
    assert {row["symbol"] for row in rows} <= {"AAPL", "MSFT"}


async def test_what_does_not_fit_is_refused_with_what_would(serving: Serving) -> None:
    cases = {
        ("gap-up", "--gap-pct-mn", "0.1"): "Did you mean --gap-pct-min",
        ("gap-upp", "--gap-pct-min", "1"): "did you mean gap-up?",
        ("gap-upp",): "did you mean 'gap-up'?",
        ("gap-up", "--gap-pct-min", "200"): "less than or equal to 100",
        ("gap-up", "--start", "2013-01-01", "--end", "2012-01-01"): "is after end",
        ("gap-up", "--symbols", "AAPPL"): "did you mean AAPL",
    }
    endings = await asyncio.gather(*(run("scan", *words, "--url", serving.url) for words in cases))
    for ended, says in zip(endings, cases.values(), strict=True):
        assert (ended.code, ended.out) == (2, "")
        assert says in ended.err


async def test_no_server_is_exit_code_3() -> None:
    ended = await run("scan", "gap-up", "--url", f"http://127.0.0.1:{find_port()}")
    assert (ended.code, ended.out) == (3, "")
    assert "No Scanwire server can be reached" in ended.err


async def test_a_failed_scan_is_exit_code_1_and_says_why(serving: Serving) -> None:
    ended = await run("scan", "trial-raising", "--url", serving.url)
    assert ended.code == 1
    assert "failed" in ended.err


async def test_a_cancelled_scan_is_exit_code_4(serving: Serving, gate: Gate) -> None:
    words = ("--gate", str(gate.path), "--json", "--url", serving.url)
    process = await start("scan", "trial-gated", *words)
    scan_id = json.loads((await read_until(process, '"started"')).splitlines()[0])["scan"]
    cancelled = await run("cancel", scan_id, "--url", serving.url)
    assert cancelled.code == 0
    assert "trial-gated" in cancelled.out
    assert (await finish(process)).code == 4


async def test_ctrl_c_leaves_the_scan_running_and_says_how_to_come_back(serving: Serving, gate: Gate) -> None:
    process = await start("scan", "trial-gated", "--gate", str(gate.path), "--json", "--url", serving.url)
    scan_id = json.loads((await read_until(process, '"started"')).splitlines()[0])["scan"]
    process.send_signal(signal.SIGINT)
    ended = await finish(process)
    assert ended.code == 130
    assert f"Come back with: {sys.executable} -m app watch {scan_id} --url {serving.url}" in ended.err
    assert (await serving.http.get(f"/v1/scans/{scan_id}")).json()["state"] == "running"

    watching = await start("watch", scan_id, "--json", "--url", serving.url)
    await read_until(watching, '"started"')
    gate.open()
    ended = await finish(watching)
    assert ended.code == 0
    assert json.loads(ended.out.splitlines()[-1])["data"]["state"] == "completed"


async def test_a_reader_that_leaves_is_no_error(serving: Serving, gate: Gate) -> None:
    process = await start("scan", "trial-gated", "--gate", str(gate.path), "--json", "--url", serving.url)
    await read_until(process, '"started"')
    process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
    gate.open()
    assert process.stderr is not None
    async with asyncio.timeout(20):
        assert await process.stderr.read() == b""
        assert await process.wait() == 141


async def test_detached_scans_are_listed_and_watched_together(serving: Serving) -> None:
    submit = ("--fresh", "--detach", "--url", serving.url)
    submitted = await asyncio.gather(*(run("scan", name, *RELAXED, *submit) for name in ("gap-up", "volume-surge")))
    assert [ended.code for ended in submitted] == [0, 0]
    ids = [ended.out.strip() for ended in submitted]
    watched = await run("watch", *ids, "--url", serving.url)
    assert watched.code == 0
    assert "gap-up completed" in watched.err
    assert "volume-surge completed" in watched.err
    listed = await run("list", "--limit", "2", "--json", "--url", serving.url)
    assert [json.loads(line)["id"] for line in listed.out.splitlines()] in (ids, ids[::-1])
    assert ids[0] in (await run("list", "--url", serving.url)).out


def read_screen(terminal: int) -> str:
    """What was written to a terminal, of which this is our side, until the other one is closed; ours is then, too."""
    screen = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while piece := os.read(terminal, 65536):
            screen += piece
    os.close(terminal)
    return screen.decode()


async def test_on_a_terminal_the_scan_is_drawn_in_place(serving: Serving) -> None:
    ours, theirs = pty.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", "SCANWIRE_URL": serving.url}
    process = await start("scan", "gap-up", *RELAXED, env=environment, out=theirs)
    os.close(theirs)
    text, ended = await asyncio.gather(asyncio.to_thread(read_screen, ours), finish(process))
    assert ended == (0, "", ended.err)
    assert "the newest" in text
    assert "5/5 symbols" in text
    assert "\x1b[?25l" in text  # the cursor is hidden while it is drawn
    assert text.rstrip().endswith("The digest of the rows received is that of the rows found.")


async def test_scanners_are_told_with_their_parameters(serving: Serving) -> None:
    cases: tuple[tuple[str, ...], ...] = ((), ("gap-up",), ("gap-up", "--json"), ("gapup",), ("nope",))
    every, one, as_json, wrong, none = await asyncio.gather(
        *(run("scanners", *words, "--url", serving.url) for words in cases)
    )
    assert "volume-surge" in every.out
    line = next(line for line in one.out.splitlines() if line.startswith("--gap-pct-min"))
    assert line.split()[1:3] == ["0.05", "0.02"]
    assert "[a number from -1 to 100]" in line
    assert json.loads(as_json.out)["name"] == "gap-up"
    assert (wrong.code, "did you mean gap-up? There are: " in wrong.err) == (2, True)
    assert (none.code, "no scanner 'nope'; there are: gap-up, " in none.err) == (2, True)


# Without a server


async def test_the_command_loads_little() -> None:
    code = "import sys, app.cli; print(*{'polars', 'httpx', 'uvicorn', 'pydantic', 'rich'} & set(sys.modules))"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    assert (await process.communicate())[0] == b"\n"


async def test_exit_codes_are_in_the_help() -> None:
    for ended in await asyncio.gather(run("--help"), run("scan", "--help"), run("watch", "--help")):
        assert "3 no server" in " ".join(ended.out.split())
        assert "141" in ended.out
        assert "SCANWIRE_API_KEY" in ended.out


async def test_a_new_key_fits_its_setting() -> None:
    lines = (await run("key", "bob")).out.splitlines()
    api_key, setting = lines[1].partition("=")[2], lines[3].partition("=")[2]
    assert setting == f"bob:{hash_key(api_key)}"
    assert Settings(api_keys=(setting,)).api_keys == (setting,)
    assert (await run("key", "bob:x")).code == 2


async def test_an_api_key_comes_from_the_environment(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, api_keys=(f"bob:{hash_key('k1')}",)) as serving:
        assert (await run("list", SCANWIRE_URL=serving.url)).code == 2
        assert (await run("list", SCANWIRE_URL=serving.url, SCANWIRE_API_KEY="k1")).code == 0
        assert (await run("list", SCANWIRE_URL=serving.url, SCANWIRE_API_KEY="ключ")).code == 3


async def test_prices_are_imported_and_rejected_rows_told(tmp_path: Path) -> None:
    source, to, rejected = tmp_path / "a.csv", tmp_path / "a.parquet", tmp_path / "rejected.csv"
    source.write_text(
        "Date,Open,High,Low,Close,Volume,Name\n2020-01-02,1,2,0.5,1.5,100,aa\n2020-01-03,1,2,3,1.5,100,aa\nx,1,2,1,1,9,aa\n"
    )
    ended = await run("data", "import", str(source), "--to", str(to))
    assert ended.code == 0
    assert "3 rows read, 1 taken" in ended.out
    assert "2 rows were rejected" in ended.out
    assert any(line.split()[:4] == ["a.csv", "2", "AA", "2020-01-03"] for line in ended.out.splitlines())
    await run("data", "import", str(source), "--to", str(to), "--rejected", str(rejected), "--force")
    assert len(rejected.read_text().splitlines()) == 3
    info = await run("data", "info", str(to))
    assert "symbols  1: AA\n" in info.out
    missing = await run("data", "import", str(tmp_path / "none.csv"), SCANWIRE_STATE_DIR=str(tmp_path))
    assert (missing.code, "There is no file none.csv" in missing.err) == (2, True)


async def test_a_refusal_tells_once_how_long_to_wait(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, submit_per_min=1) as serving:
        endings = [await run("scan", "gap-up", "--fresh", "--detach", "--url", serving.url) for _ in range(2)]
    assert [ended.code for ended in endings] == [0, 2]
    assert endings[1].err.count("Try again in") == 1


async def test_hints_can_be_typed_as_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "my bin" / "scanwire"
    script.parent.mkdir()
    script.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["my bin/scanwire", "demo"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert name_command() == "'my bin/scanwire'"
    monkeypatch.setenv("PATH", str(script.parent))
    assert name_command() == "scanwire"
    # What is on the path is another installation.
    monkeypatch.setattr(sys, "argv", [".venv/bin/scanwire", "demo"])
    assert name_command() == ".venv/bin/scanwire"


async def test_a_file_is_replaced_only_when_asked_to(tmp_path: Path) -> None:
    source, kept = tmp_path / "a.csv", tmp_path / "kept"
    source.write_text("Date,Open,High,Low,Close,Volume,Name\n2020-01-02,1,2,0.5,1.5,100,aa\n")
    kept.write_text("precious")
    commands = (
        ("data", "import", str(source), "--to", str(kept)),
        ("data", "import", str(source), "--rejected", str(kept)),
        ("data", "synth", "--symbols", "1", "--years", "0.1", "--to", str(kept)),
    )
    for command in commands:
        ended = await run(*command, SCANWIRE_STATE_DIR=str(tmp_path))
        assert (ended.code, f"{kept} exists already. Name another file, or replace it with --force." in ended.err) == (
            2,
            True,
        )
        assert kept.read_text() == "precious"
    assert (await run(*commands[-1], "--force")).code == 0
    assert kept.read_bytes()[:4] == b"PAR1"


async def test_synthetic_prices_are_marked(tmp_path: Path) -> None:
    ended = await run("data", "synth", "--symbols", "3", "--years", "1", SCANWIRE_STATE_DIR=str(tmp_path))
    assert ended.code == 0
    assert "SYNTHETIC" in ended.out
    assert f"Serve them with: {sys.executable} -m app serve --prices {tmp_path / 'synthetic.parquet'}" in ended.out
    assert "SYNTHETIC" in (await run("data", "info", str(tmp_path / "synthetic.parquet"))).out


# Serving


async def test_what_keeps_the_server_from_starting_is_one_sentence(tmp_path: Path, serving: Serving) -> None:
    ports = [str(find_port()) for _ in range(3)]
    bad = tmp_path / "bad.parquet"
    bad.write_text("no prices")
    taken = str(httpx.URL(serving.url).port)
    is_taken = f"Port {taken} of 127.0.0.1 is taken. Choose another with --port"
    cases: list[tuple[tuple[str, ...], dict[str, str], str]] = [
        (("serve", "--port", taken), {}, is_taken),
        (("demo", "--port", taken), {}, is_taken),
        (("serve", "--port", ports[0], "--prices", str(bad)), {}, "The price file bad.parquet cannot be read"),
        (("serve", "--port", ports[1]), {"SCANWIRE_MAX_RUNNING": "0"}, "SCANWIRE_MAX_RUNNING: Input should be greater"),
        (("serve", "--port", ports[2]), {"SCANWIRE_STATE_DIR": "/dev/null/x"}, "SCANWIRE_STATE_DIR"),
        (
            ("serve", "--port", ports[2]),
            {"SCANWIRE_MAX_RUNING": "1"},
            "\n  SCANWIRE_MAX_RUNING is not a setting; did you mean SCANWIRE_MAX_RUNNING?",
        ),
    ]
    states = [{"SCANWIRE_STATE_DIR": str(tmp_path / str(place))} for place in range(len(cases))]
    endings = await asyncio.gather(
        *(run(*words, **(state | environment)) for state, (words, environment, _) in zip(states, cases, strict=True))
    )
    for ended, (words, _, says) in zip(endings, cases, strict=True):
        assert (ended.code, ended.out) == (2, ""), words
        assert says in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_server_says_where_it_serves_and_stops_in_order(
    tmp_path: Path, synthetic_prices: Path, number: signal.Signals
) -> None:
    port = find_port()
    environment = {"SCANWIRE_LOG_FORMAT": "console", "SCANWIRE_STATE_DIR": str(tmp_path)}
    process = await start("serve", "--port", str(port), "--prices", str(synthetic_prices), env=environment)
    said = await read_until(process, "Prices:")
    assert f"Scanwire serves on http://127.0.0.1:{port}" in said
    assert "SYNTHETIC" in said
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        assert (await http.get("/healthz")).status_code == 200
        refused = await http.get("/v1/ws?scan=s_nobody", headers=HANDSHAKE)
        assert refused.status_code == 404
    process.send_signal(number)
    ended = await finish(process)
    assert ended.code == 0
    assert "ERROR" not in ended.err  # what the peer did wrong is none of the server's


async def test_json_logs_are_json(tmp_path: Path, sample_prices: Path) -> None:
    environment = {"SCANWIRE_LOG_FORMAT": "json", "SCANWIRE_STATE_DIR": str(tmp_path)}
    process = await start("serve", "--port", str(find_port()), "--prices", str(sample_prices), env=environment)
    assert process.stderr is not None
    lines: list[dict[str, Any]] = []
    async with asyncio.timeout(30):
        while not any(line.get("action") == "serving" for line in lines):
            lines.append(json.loads(await process.stderr.readline()))
    process.send_signal(signal.SIGTERM)
    ended = await finish(process)
    lines += [json.loads(line) for line in ended.err.splitlines()]
    assert (ended.code, ended.out) == (0, "")
    assert lines[-1]["action"] == "stopped"
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


async def test_the_demo_runs_a_scan_and_serves_on(tmp_path: Path) -> None:
    port, state_dir = find_port(), str(tmp_path)
    for _ in range(2):  # the second time on what the first one left
        process = await start("demo", "--port", str(port), env={"SCANWIRE_STATE_DIR": state_dir})
        said = await read_until(process, "-m app scan gap-up --start 2005-01-01 --preset relaxed --url")
        assert "AAPL, FB, GOOG, IBM and MSFT" in said
        assert "AAPL    2005-02-14      5.44   45,409,400   +2.4%" in said
        curl = next(line for line in said.splitlines() if "curl -N" in line)
        async with httpx.AsyncClient() as http:
            events = await http.get(curl.split()[-1], headers={"Accept": "text/event-stream"})
            assert "event: end" in events.text
            assert events.text.count("event: matches") == 5
            page = await http.get(f"http://127.0.0.1:{port}/")
            assert page.status_code == 200
            for year in (2006, 2007, 2008):  # more than a client may submit elsewhere, and after the demo's own scan
                body = {"scanner": "gap-up", "params": {"start": f"{year}-01-01"}, "reuse": "never"}
                assert (await http.post(f"http://127.0.0.1:{port}/v1/scans", json=body)).status_code == 202
        process.send_signal(signal.SIGINT)
        ended = await finish(process)
        assert ended.code == 0
        assert "gap-up completed: 118 matches" in ended.err


async def test_the_environment_overrides_what_suits_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (read_demo_settings().chunk_rows, read_demo_settings().submit_per_min) == (1, 30)
    monkeypatch.setenv("SCANWIRE_SUBMIT_PER_MIN", "7")
    assert (read_demo_settings().chunk_rows, read_demo_settings().submit_per_min) == (1, 7)
