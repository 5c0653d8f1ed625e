"""`scanwire check`: the playbook's checklist against a running server, and what came of it for people and pipelines."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import httpx
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.checks import legacy, limits, push, requests, scans
from app.checks.course import Course
from app.checks.probe import LONGEST_WAIT_S, WEBSOCKET, NotApplicable, Probe, Unmet, describe_failure
from app.commands.listings import PIPE_WIDTH
from app.commands.terminal import show_text
from app.follow import NDJSON, POLL, SSE, ClientError, describe_break, read_refusal

PASSED, FAILED, COULD_NOT_RUN = 0, 1, 2  # exit codes
EXTERNAL = "external"


Check = Callable[[Course], Awaitable[str]]


def _push(format_: str) -> Check:
    async def check(course: Course) -> str:
        return await push.check_push(course.probe, await course.get_external(), format_)

    return check


def _resume(format_: str) -> Check:
    async def check(course: Course) -> str:
        return await push.check_resume(course.probe, await course.get_external(), format_)

    return check


# Each gives its evidence, or raises Unmet or NotApplicable with it. The order needs few submissions, since the default
# limit is two at once and two a minute: the first two are scans of the market, the third is refused, waited for, and
# then the external scan that all the rest is about, since its producer is here.
CHECKS: tuple[tuple[str, Check], ...] = (
    ("health", requests.check_health),
    ("readiness", requests.check_readiness),
    ("metrics", requests.check_metrics),
    ("concurrency", scans.check_concurrency),
    ("scan time", scans.check_scan_time),
    ("single-flight", scans.check_single_flight),
    ("input validation", requests.check_input),
    ("answer time", requests.check_answer_time),
    ("read limit", limits.check_read_limit),
    ("submit limit", limits.check_submit_limit),
    ("poll hints", limits.check_hints),
    ("push by SSE", _push(SSE)),
    ("push by NDJSON", _push(NDJSON)),
    ("push by WebSocket", _push(WEBSOCKET)),
    ("resume by SSE", _resume(SSE)),
    ("resume by NDJSON", _resume(NDJSON)),
    ("resume by WebSocket", _resume(WEBSOCKET)),
    ("resume by polls", _resume(POLL)),
    ("sessions", scans.check_sessions),
    ("cancel", scans.check_cancel),
    ("legacy results", legacy.check_results),
    ("legacy refusals", legacy.check_refusals),
    ("legacy socket", legacy.check_socket),
    ("legacy answer time", legacy.check_answer_time),
    ("legacy rate limit", legacy.check_rate_limit),
)
LAST: tuple[str, Check] = ("nothing left behind", scans.check_nothing_left)


class Outcome(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    NOT_APPLICABLE = "n/a"


STYLES = {Outcome.PASS: "green", Outcome.FAIL: "bold red", Outcome.NOT_APPLICABLE: "yellow"}


class Result(NamedTuple):
    """One check: what came of it, the evidence in one line, and how long it took, with the waits."""

    check: str
    outcome: Outcome
    evidence: str
    seconds: float


class Wanted(NamedTuple):
    """What `scanwire check` was asked for."""

    url: str
    api_key: str | None
    scanner: str | None
    max_scan_s: float
    max_answer_s: float
    as_json: bool
    junit: Path | None


def run_check(wanted: Wanted) -> int:
    """Checks, tells, and gives the exit code: 0 nothing failed, 1 something did, 2 it could not be checked."""
    report = JsonReport() if wanted.as_json else TableReport(wanted.url)
    results: list[Result] = []

    async def collect() -> None:
        async with contextlib.aclosing(check_server(wanted, report.say)) as coming:
            async for result in coming:
                results.append(result)
                report.take(result)

    try:
        with report.shown():
            asyncio.run(collect())
    except ClientError as error:
        print(f"It could not be checked: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    report.conclude(results)
    if wanted.junit is not None:
        try:
            wanted.junit.write_bytes(make_junit(results))
        except OSError as error:
            print(f"The report cannot be written to {wanted.junit}: {error.strerror}.", file=sys.stderr)
            return COULD_NOT_RUN
    return FAILED if any(result.outcome is Outcome.FAIL for result in results) else PASSED


async def check_server(
    wanted: Wanted,
    say: Callable[[str], None],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[Result, None]:
    """Each result as soon as there is one. Nothing is left behind, however this is left.

    Raises ClientError when there is no server to check.
    """
    probe = Probe(wanted.url, wanted.api_key, say, sleep, clock)
    async with probe.http:
        course = Course(
            probe=probe,
            scanner=await _choose_scanner(probe, wanted.scanner),
            max_scan_s=wanted.max_scan_s,
            max_answer_s=wanted.max_answer_s,
        )
        is_clean = False
        try:
            for name, check in CHECKS:
                say(name)
                yield await _run(name, check, course)
            is_clean = True
            yield await _run(*LAST, course)
        finally:
            if not is_clean:
                await probe.clean_up()


async def _choose_scanner(probe: Probe, name: str | None) -> str:
    """The scanner of that name, or the first of the market. Raises ClientError where there is no Scanwire."""
    try:
        answer = await probe.request("GET", "/v1/scanners")
    except httpx.RequestError as error:
        raise describe_break(probe.http, error) from None
    except Unmet as error:
        raise ClientError(str(error)) from None
    if not answer.is_success:
        raise read_refusal(answer)
    try:
        names = [scanner["name"] for scanner in answer.json()["scanners"] if scanner["name"] != EXTERNAL]
    except (ValueError, KeyError, TypeError):
        raise ClientError(f"What answers at {probe.http.base_url} is not a Scanwire server.") from None
    if not names or (name is not None and name not in names):
        raise ClientError(f"There is no scanner {name or 'of the market'!r}; there are: {', '.join(names) or 'none'}.")
    return name or names[0]


async def _run(name: str, check: Check, course: Course) -> Result:
    began = time.monotonic()
    outcome, evidence = Outcome.FAIL, ""
    try:
        async with asyncio.timeout(2 * (LONGEST_WAIT_S + course.max_scan_s)):
            evidence = await check(course)
        outcome = Outcome.PASS
    except Unmet as unmet:
        evidence = str(unmet)
    except NotApplicable as reason:
        outcome, evidence = Outcome.NOT_APPLICABLE, str(reason)
    except Exception as error:  # whatever a server answers, the other checks go on
        evidence = describe_failure(course.probe, error)
    return Result(name, outcome, show_text(" ".join(evidence.split())), round(time.monotonic() - began, 3))


# Reports


class TableReport:
    """A line for each check as soon as it is done; on a terminal, what is under way below them."""

    def __init__(self, url: str) -> None:
        is_terminal = sys.stdout.isatty()
        self._console = Console() if is_terminal else Console(width=PIPE_WIDTH, color_system=None)
        self._status = self._console.status(f"checking {url}") if is_terminal else None
        self._name_width = max(len(name) for name, _ in (*CHECKS, LAST))

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        with self._status or contextlib.nullcontext():
            yield

    def say(self, text: str) -> None:
        if self._status is not None:
            self._status.update(show_text(text))
        elif text.startswith("waiting"):
            print(text, file=sys.stderr, flush=True)

    def take(self, result: Result) -> None:
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_column(width=4)
        line.add_column(width=self._name_width)
        line.add_column()
        line.add_row(Text(result.outcome, style=STYLES[result.outcome]), result.check, Text(result.evidence))
        with self._console.capture() as capture:
            self._console.print(line)
        text = "\n".join(part.rstrip() for part in capture.get().splitlines())
        self._console.file.write(f"{text}\n")
        self._console.file.flush()

    def conclude(self, results: Sequence[Result]) -> None:
        counts = {outcome: sum(result.outcome is outcome for result in results) for outcome in Outcome}
        took = f"{sum(result.seconds for result in results):,.0f} s"
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        print(f"{told} in {took}", flush=True)


class JsonReport:
    """One JSON object a line for each check; what is under way goes to stderr."""

    def shown(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def say(self, text: str) -> None:
        if text.startswith("waiting"):
            print(text, file=sys.stderr, flush=True)

    def take(self, result: Result) -> None:
        print(orjson.dumps(result._asdict()).decode(), flush=True)

    def conclude(self, results: Sequence[Result]) -> None:
        pass


def make_junit(results: Sequence[Result]) -> bytes:
    """The results as JUnit's XML, as build servers read it."""
    failures = sum(result.outcome is Outcome.FAIL for result in results)
    skipped = sum(result.outcome is Outcome.NOT_APPLICABLE for result in results)
    counts = {"tests": str(len(results)), "failures": str(failures), "errors": "0", "skipped": str(skipped)}
    suites = ElementTree.Element("testsuites", counts)
    seconds = f"{sum(result.seconds for result in results):.3f}"
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "scanwire check", "time": seconds, **counts})
    for result in results:
        fields = {"classname": "scanwire.check", "name": result.check, "time": f"{result.seconds:.3f}"}
        case = ElementTree.SubElement(suite, "testcase", fields)
        if result.outcome is Outcome.FAIL:
            ElementTree.SubElement(case, "failure", {"message": result.evidence})
        elif result.outcome is Outcome.NOT_APPLICABLE:
            ElementTree.SubElement(case, "skipped", {"message": result.evidence})
        else:
            ElementTree.SubElement(case, "system-out").text = result.evidence
    written: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return written
