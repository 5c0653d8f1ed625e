"""`scanwire doctor`: the diagnosis of a server as tables to act on, and what is in its way on this machine."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import orjson
from rich.text import Text

from app.commands.environment import CommandFailed, name_command, read_settings
from app.commands.holder import LOCK_NAME, Process, list_users, name_port_holder
from app.commands.launch import LOOPBACK
from app.commands.listings import new_table, print_table
from app.commands.terminal import show_text
from app.follow import CONNECT_S, ClientError, describe_break, read_refusal
from app.log.lock import StateLock

HEALTHY, WRONG, NOT_ASKED = 0, 1, 2  # exit codes
DIAGNOSIS_S = 10.0
STYLES = {"P0": "bold red", "P1": "red", "P2": "yellow", "healthy": "green"}


class Finding(NamedTuple):
    """Something on this machine: what it is, and what to do about it, if anything."""

    what: str
    advice: str
    is_wrong: bool


def run_doctor(url: str, api_key: str | None, state_dir: Path | None, *, as_json: bool) -> int:
    """Asks, looks, tells; gives the exit code."""
    report: dict[str, Any] | None = None
    reason = ""
    try:
        report = ask_server(url, api_key)
    except ClientError as error:
        reason = str(error)
    try:
        findings = look_around(url, state_dir, is_answering=report is not None) if is_local(url) else []
    except CommandFailed as error:
        print(str(error), file=sys.stderr)
        return NOT_ASKED
    if as_json:
        here = [finding._asdict() for finding in findings]
        print(orjson.dumps({"url": url, "diagnosis": report, "error": reason or None, "here": here}).decode())
    else:
        if report is not None:
            print_report(report)
        for finding in findings:
            print(f"\n{show_text(finding.what)}" + (f"\n  → {finding.advice}" if finding.advice else ""))
    if report is None:
        print(f"It could not be asked: {reason}", file=sys.stderr)
        return NOT_ASKED
    is_well = report["severity"] == "healthy" and not report["causes"] and not report["emergency"]["is_on"]
    return HEALTHY if is_well and not any(finding.is_wrong for finding in findings) else WRONG


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
        if {"severity", "measures", "causes", "incidents", "emergency"} <= set(report):
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
    for cause in report["causes"]:
        print(f"\n{cause['name']} ({cause['kind']}): {show_text(cause['evidence'])}")
        if cause["clients"]:
            print("  who: " + ", ".join(f"{client} × {count:,}" for client, count in cause["clients"].items()))
        print(f"  → {show_text(cause['cure'])}")
    opened = [f"{incident['severity']} {incident['subject']}" for incident in report["incidents"]]
    print(f"\nOpen incidents: {', '.join(opened) or 'none'}")
    if report["emergency"]["is_on"]:
        print(f"EMERGENCY: {show_text(report['emergency']['reason'])}. It is lifted when nothing urgent is wrong.")


# This machine


def is_local(url: str) -> bool:
    try:
        return urlsplit(url).hostname in LOOPBACK
    except ValueError:
        return False


def look_around(url: str, state_dir: Path | None, *, is_answering: bool) -> list[Finding]:
    """Who holds the port, who works in the state directory, and what crashed servers left. Raises CommandFailed."""
    settings = read_settings(state_dir=state_dir)
    return [*_look_at_port(url, is_answering), *_look_at_directory(settings.state_dir)]


def _look_at_port(url: str, is_answering: bool) -> list[Finding]:
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return []
    told = name_port_holder(port)
    if is_answering:
        return [Finding(f"Port {port} answers. {told}".rstrip(), "", False)]
    if told:
        advice = "If that is not meant: `kill` with its pid lets it stop in order. Or serve on another port."
        return [Finding(f"Port {port} does not answer as it should. {told}", advice, True)]
    return [
        Finding(f"Nobody that this user may look at holds port {port}.", f"Start with: {name_command()} serve", True)
    ]


def _look_at_directory(state_dir: Path) -> list[Finding]:
    lock = StateLock(state_dir / LOCK_NAME)
    users = list_users(state_dir)
    holder = lock.find_holder()
    findings = [_describe_user(user, holder is not None and user.pid == holder.pid, state_dir) for user in users]
    if lock.is_held() and not users:
        who = "" if holder is None else f" (pid {holder.pid} by its own account)"
        findings.append(Finding(f"{state_dir} is held by a process that cannot be looked into{who}.", "", False))
    wal = state_dir / "journal.db-wal"
    if not lock.is_held() and wal.is_file() and wal.stat().st_size:
        findings.append(
            Finding(
                f"The last server on {state_dir} did not stop in order: its journal was not closed.",
                f"Nothing that was accepted is lost. The next start goes on from there: {name_command()} serve",
                True,
            )
        )
    return findings


def _describe_user(user: Process, is_holder: bool, state_dir: Path) -> Finding:
    where = f", serving on {', '.join(user.urls)}" if user.urls else ""
    what = f"pid {user.pid} works in {state_dir}{where}: {user.command}"
    if is_holder:
        return Finding(
            what,
            f"`kill {user.pid}` ends it in order; `{name_command()} serve --takeover` goes on in its place.",
            False,
        )
    return Finding(what, f"It does not hold the lock, and is in the way of none but itself: kill {user.pid}", True)
