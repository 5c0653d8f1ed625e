"""`scanwire doctor`: the diagnosis of a server as tables to act on, and what is in its way on this machine."""

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson
from rich.text import Text

from app.commands.environment import CommandFailed
from app.commands.launch import LOOPBACK
from app.commands.listings import new_table, print_table
from app.commands.surroundings import Finding, look_around
from app.commands.terminal import show_text
from app.follow import CONNECT_S, ClientError, RequestRefused, describe_break, read_refusal

HEALTHY, WRONG, NOT_ASKED = 0, 1, 2  # exit codes
DIAGNOSIS_S = 10.0
STYLES = {"P0": "bold red", "P1": "red", "P2": "yellow", "healthy": "green"}


def run_doctor(url: str, api_key: str | None, state_dir: Path | None, *, as_json: bool, fixes: bool = False) -> int:
    """Asks, looks, tells, and does what it was told to; gives the exit code."""
    report: dict[str, Any] | None = None
    reason, is_answering = "", True
    try:
        report = ask_server(url, api_key)
    except ClientError as error:
        reason, is_answering = str(error), isinstance(error, RequestRefused)
    try:
        findings = look_around(url, state_dir, is_answering=is_answering) if is_local(url) else []
    except CommandFailed as error:
        print(str(error), file=sys.stderr)
        return NOT_ASKED
    if as_json:
        done = [finding.mend() if fixes and finding.is_wrong else None for finding in findings]
        here = [finding.to_json() | {"done": what} for finding, what in zip(findings, done, strict=True)]
        print(orjson.dumps({"url": url, "diagnosis": report, "error": reason or None, "here": here}).decode())
    else:
        if report is not None:
            print_report(report)
        settle(findings, fixes=fixes, asks=sys.stdin.isatty() and sys.stdout.isatty())
    if report is None:
        print(f"It could not be asked: {reason}", file=sys.stderr)
        return NOT_ASKED
    is_well = report["severity"] == "healthy" and not report["causes"] and not report["emergency"]["is_on"]
    return HEALTHY if is_well and not any(finding.is_wrong for finding in findings) else WRONG


def settle(findings: Sequence[Finding], *, fixes: bool, asks: bool) -> None:
    """Tells each finding. What it offers is done with `fixes`, where something is wrong, or with `asks` after a yes.

    Otherwise the command for it is told.
    """
    for finding in findings:
        print()
        _say(finding.what)
        if finding.offer and fixes and finding.is_wrong:
            _say(f"{finding.offer}: {finding.mend()}", "  ")
        elif finding.offer and asks and _is_yes(f"  {finding.offer}? [y/N] "):
            _say(str(finding.mend()), "  ")
        elif finding.advice:
            _say(finding.advice, "  → ")


def _is_yes(question: str) -> bool:
    print(question, end="", flush=True)  # input() would show it on stderr, wherever that goes
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def ask_server(url: str, api_key: str | None) -> dict[str, Any]:
    """The diagnosis. Raises ClientError."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        answer = httpx.get(
            f"{url.rstrip('/')}/v1/diagnosis",
            headers=headers,
            timeout=httpx.Timeout(DIAGNOSIS_S, connect=CONNECT_S),
        )
    except httpx.RequestError as error:
        raise describe_break(httpx.AsyncClient(base_url=url), error) from None
    except (httpx.InvalidURL, UnicodeEncodeError) as error:
        raise ClientError(f"{url!r} is not an address such as http://127.0.0.1:8000: {error}.") from None
    if not answer.is_success:
        raise read_refusal(answer)
    try:
        report = answer.json()
        if {"severity", "measures", "causes", "incidents", "emergency", "ts"} <= set(report):
            return dict(report)
    except (ValueError, TypeError):
        pass
    raise ClientError(f"What answers at {url} is not a Scanwire server that can say what is wrong.")


# The server


def print_report(report: Mapping[str, Any]) -> None:
    table = new_table("measure", "value", "target", "severity", "act within", right=("value", "target"))
    for measure in report["measures"]:
        unit = f" {measure['unit']}" if measure["unit"] else ""
        value = "–" if measure["value"] is None else f"{measure['value']:,.4g}{unit}"
        within = f"{measure['act_within_h']} h" if measure["act_within_h"] else ""
        severity = Text(measure["severity"], style=STYLES.get(measure["severity"], ""))
        table.add_row(measure["measure"], value, f"{measure['target']:,.4g}{unit}", severity, within)
    print_table(table)
    print()
    _say(_conclude(report))
    for cause in report["causes"]:
        since = _show_since(cause["since_ts"], report["ts"])
        print()
        _say(f"{cause['name']} ({cause['kind']}), {since}: {cause['evidence']}")
        if cause["clients"]:
            _say(", ".join(f"{client} × {count:,}" for client, count in cause["clients"].items()), "  who: ")
        _say(cause["cure"], "  → ")
    opened = [f"{incident['severity']} {incident['subject']}" for incident in report["incidents"]]
    print()
    _say(f"Open incidents: {', '.join(opened) or 'none'}")
    if report["emergency"]["is_on"]:
        _say(f"EMERGENCY: {report['emergency']['reason']}. It is lifted when nothing urgent is wrong.")


def _conclude(report: Mapping[str, Any]) -> str:
    """The worst of it, and by when to act, in one line."""
    causes, severity = len(report["causes"]), report["severity"]
    found = f"{causes or 'no'} cause{'s' * (causes != 1)} found"
    if severity == "healthy":
        return f"Every measure is within its target; {found}."
    within = min(measure["act_within_h"] for measure in report["measures"] if measure["act_within_h"])
    return f"{severity}: act within {within} h; {found}."


def _say(text: str, lead: str = "") -> None:
    """In lines of whole words on a terminal; in one line for a pipe."""
    text = f"{lead}{show_text(text)}"
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(
            text, width, subsequent_indent="  " * bool(lead) + "  ", break_long_words=False, break_on_hyphens=False
        )
    print(text, flush=True)


def _show_since(since_ts: int, now_ts: int) -> str:
    """Only for how long matters: the server's clock may be another."""
    seconds = max(0, now_ts - since_ts) / 1000
    if seconds < 1:
        return "just now"
    return f"for {seconds:,.0f} s" if seconds < 120 else f"for {seconds / 60:,.0f} min"


# This machine


def is_local(url: str) -> bool:
    try:
        return urlsplit(url).hostname in LOOPBACK
    except ValueError:
        return False
