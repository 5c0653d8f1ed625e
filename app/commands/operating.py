"""The commands of those who run a server."""

from pathlib import Path
from typing import Annotated

import typer

operating_app = typer.Typer()

DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option("--url", envvar="SCANWIRE_URL", help="Address of the server.")]
Key = Annotated[
    str | None, typer.Option("--api-key", envvar="SCANWIRE_API_KEY", help="For a server that asks for one.")
]


@operating_app.command(epilog="Exit codes: 0 nothing failed · 1 a check failed · 2 the server could not be checked.")
def check(
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    scanner: Annotated[str | None, typer.Option(help="The scanner to time; the first one when left out.")] = None,
    max_scan_s: Annotated[float, typer.Option(min=0, help="A scan must end within this time.")] = 30,
    max_answer_s: Annotated[float, typer.Option(min=0, help="A request must be answered within this time.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout, for pipes.")] = False,
    junit: Annotated[Path | None, typer.Option(help="Write the results to this file as JUnit's XML.")] = None,
) -> None:
    """Check whether a running server is ready: limits, pushing, resuming, cancelling, answer times.

    It submits a few scans of its own, waits as the limits say (about a minute in all), and leaves nothing behind.
    """
    from app.commands.check import Wanted, run_check

    wanted = Wanted(url, api_key or None, scanner, max_scan_s, max_answer_s, as_json, junit)
    raise typer.Exit(run_check(wanted))


@operating_app.command(
    epilog="Exit codes: 0 nothing is wrong · 1 something is · 2 the server could not be asked. "
    "The key must be an operator's."
)
def doctor(
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    state_dir: Annotated[Path | None, typer.Option(help="Of the server, if it runs on this machine.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
    fix: Annotated[
        bool, typer.Option("--fix", help="End servers that are in the way, and clear up after those that crashed.")
    ] = False,
) -> None:
    """Say what is wrong with a server, why, and what helps; on its own machine also who is in its way.

    On a terminal it asks before it changes anything; with --fix it does not ask. Servers are ended by SIGTERM.
    """
    from app.commands.doctor import run_doctor

    raise typer.Exit(run_doctor(url, api_key or None, state_dir, as_json=as_json, fixes=fix))
