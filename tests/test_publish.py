"""`scanwire publish`: a process of its own whose standard input becomes a scan."""

import asyncio
import json
import os
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from app.core.scan import Scan
from tests.conftest import until
from tests.serving import Serving, serve
from tests.test_cli import Ended, find_port, finish, run, start

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(tmp_path_factory: pytest.TempPathFactory, sample_prices: Path) -> AsyncIterator[Serving]:
    async with serve(tmp_path_factory.mktemp("state"), sample_prices, max_row_bytes=2000) as serving:
        yield serving


async def begin(serving: Serving, *words: str, given: int = PIPE) -> tuple[Process, str]:
    """The process, and the id of its scan."""
    process = await start("publish", "--title", "Report", *words, "--url", serving.url, given=given)
    assert process.stdout is not None
    async with asyncio.timeout(30):
        scan_id, address = (await process.stdout.readline()).decode().split()
    assert address == f"{serving.url}/v1/scans/{scan_id}"
    return process, scan_id


async def publish(serving: Serving, text: bytes, *words: str) -> tuple[Ended, dict[str, Any], list[Any]]:
    """How it ended, the snapshot of the scan, and its rows."""
    process, scan_id = await begin(serving, *words)
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.close()
    ended = await finish(process)
    snapshot = (await serving.http.get(f"/v1/scans/{scan_id}")).json()
    return ended, snapshot, (await serving.http.get(f"/v1/scans/{scan_id}/matches")).json()["rows"]


def write_lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def get_scan(serving: Serving, scan_id: str) -> Scan:
    return serving.service.log.get(scan_id)


async def test_events_and_plain_rows_become_a_scan(serving: Serving) -> None:
    rows: list[dict[str, Any]] = [{"page": number, "text": "é\u2028"} for number in range(5000)]
    text = write_lines(
        {"type": "progress", "done": 1, "phase": "reading"},
        *rows[:4999],
        {"type": "matches", "rows": rows[4999:]},
        {"type": "progress", "done": 7},
    )
    ended, snapshot, found = await publish(serving, b"\n" + text.rstrip(), "--total", "7", "--unit", "pages")
    assert ended.code == 0, ended.err
    assert "Report completed: 5,000 matches" in ended.err
    assert snapshot["params"] == {"title": "Report", "total": 7, "unit": "pages"}
    assert (snapshot["state"], snapshot["progress"]["done"], snapshot["progress"]["phase"]) == (
        "completed",
        7,
        "reading",
    )
    assert found == rows
    # What came together is told together.
    assert snapshot["end"]["last_seq"] < 40


async def test_a_line_is_published_when_it_comes_and_not_when_the_next_one_does(serving: Serving) -> None:
    process, scan_id = await begin(serving)
    assert process.stdin is not None
    written: list[dict[str, int]] = []

    def is_there() -> bool:
        return get_scan(serving, scan_id).matches == len(written)

    for count in range(3):
        written.append({"count": count})
        process.stdin.write(write_lines(written[-1]))
        await until(is_there)
    process.stdin.close()
    assert (await finish(process)).code == 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{broken", "is not JSON"),
        (b"[1]", "is not an object"),
        (b'{"type":"started"}', "there are progress, matches, end"),
        (b'{"type":"progress","done":99}', "is refused: done: is above the total"),
        (b'{"nested":{"a":1}}', "is refused: rows.0:"),
        (b'{"long":"' + b"x" * 3000 + b'"}', "has more than 2000 bytes"),
        (b'{"long":"' + b"x" * 600_000 + b'"}', "is longer than 524288 bytes"),
        (b"x" * 600_000, "is longer than 524288 bytes"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_a_bad_line_fails_the_scan_and_what_came_before_is_kept(serving: Serving, line: bytes, says: str) -> None:
    text = write_lines({"a": 1}, {"a": 2}, {"type": "progress", "done": 1}) + line + b"\n" + write_lines({"a": 3})
    ended, snapshot, rows = await publish(serving, text, "--total", "5")
    assert ended.code == 1
    assert "Line 4 of the input" in ended.err
    assert says in ended.err
    assert snapshot["state"] == "failed"
    assert "Line 4" in snapshot["end"]["error"]["detail"]
    assert rows == [{"a": 1}, {"a": 2}]


async def test_an_end_in_the_input_is_the_end(serving: Serving) -> None:
    text = write_lines({"a": 1}, {"type": "end", "state": "failed", "error": "No paper."}, {"a": 2})
    ended, snapshot, rows = await publish(serving, text)
    assert ended.code == 1
    assert "Report failed: 1 match" in ended.err
    assert (snapshot["end"]["error"]["detail"], rows) == ("No paper.", [{"a": 1}])
    ended, snapshot, _ = await publish(serving, write_lines({"type": "end", "state": "cancelled"}))
    assert (ended.code, snapshot["state"]) == (4, "cancelled")


async def test_ctrl_c_cancels_the_scan(serving: Serving) -> None:
    process, scan_id = await begin(serving)
    assert process.stdin is not None
    process.stdin.write(write_lines({"a": 1}))
    await until(lambda: get_scan(serving, scan_id).matches == 1)
    process.send_signal(signal.SIGINT)
    ended = await finish(process)
    assert ended.code == 130
    assert "cancelled" in ended.err
    snapshot = (await serving.http.get(f"/v1/scans/{scan_id}")).json()
    assert (snapshot["state"], snapshot["matches"]) == ("cancelled", 1)


async def test_a_scan_that_was_cancelled_elsewhere_ends_the_command(serving: Serving) -> None:
    process, scan_id = await begin(serving)
    assert process.stdin is not None
    await serving.http.delete(f"/v1/scans/{scan_id}")
    process.stdin.write(write_lines({"a": 1}))
    ended = await finish(process)
    assert ended.code == 4
    assert "ended as cancelled" in ended.err


async def test_a_file_is_read_as_well_as_a_pipe(serving: Serving, tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(write_lines(*({"a": number} for number in range(100))))
    with (tmp_path / "lines").open("rb") as file:
        process, scan_id = await begin(serving, given=file.fileno())
        assert (await finish(process)).code == 0
    assert get_scan(serving, scan_id).matches == 100
    unreadable = os.open(tmp_path / "lines", os.O_WRONLY)
    process, scan_id = await begin(serving, given=unreadable)
    os.close(unreadable)
    ended = await finish(process)
    assert ended.code == 1
    assert "cannot be read" in ended.err
    assert get_scan(serving, scan_id).state == "failed"


async def test_without_a_server_or_a_good_title_nothing_begins(serving: Serving) -> None:
    assert (await run("publish", "--title", "x", "--url", f"http://127.0.0.1:{find_port()}")).code == 3
    ended = await run("publish", "--title", "x" * 300, "--url", serving.url)
    assert (ended.code, ended.out) == (2, "")
    assert "title" in ended.err
    assert (await run("publish", "--url", serving.url)).code == 2


async def test_scan_external_points_to_publish(serving: Serving) -> None:
    ended = await run("scan", "external", "--url", serving.url)
    assert (ended.code, ended.out) == (2, "")
    assert "-m app publish --title" in ended.err
    shown = await run("scanners", "external", "--url", serving.url)
    assert shown.code == 0
    assert "-m app publish" in shown.out
