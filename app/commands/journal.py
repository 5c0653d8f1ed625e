"""`scanwire journal`: whether the journal is whole, and a new one of what can be read when it is not."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.commands.datasets import refusing, working

if TYPE_CHECKING:
    from app.log.mending import Salvaged

DAMAGED = 1
SHOWN_PROBLEMS = 20

journal_app = typer.Typer(help="Check and salvage the journal.", no_args_is_help=True)
StateDir = Annotated[Path | None, typer.Option(help="Where the journal is kept; as for `serve` when left out.")]


@journal_app.command()
def check(state_dir: StateDir = None) -> None:
    """Say whether the journal is whole; a server may be at work on it. Exit codes: 0 whole, 1 damaged, 2 no journal."""
    with refusing():
        from app.commands.environment import name_command
        from app.log.check import check_journal

        path = _find_journal(state_dir)
        with working(f"Checking {_measure(path)}"):
            findings = check_journal(path)
    if not findings.problems:
        typer.echo(f"{path} is whole: {_count(findings.scans, 'scan')}, {_count(findings.events, 'event')}.")
        return
    typer.echo(f"{path} is damaged:")
    for problem in findings.problems[:SHOWN_PROBLEMS]:
        typer.echo(f"  {problem}")
    if len(findings.problems) > SHOWN_PROBLEMS:
        typer.echo("  … and more")
    typer.echo(
        "With the server stopped, this makes a new journal of all that can be read:\n"
        f"  {name_command()} journal salvage --state-dir {shlex.quote(str(path.parent))}"
    )
    raise typer.Exit(DAMAGED)


@journal_app.command()
def salvage(state_dir: StateDir = None) -> None:
    """Make a new journal of all that can be read of a damaged one, which is kept beside it under a name with the date.

    A finished scan that is not whole keeps its end alone; an unfinished one ends as lost, with the events before the
    first that is missing. When anything may be missing, clients are told to read their scans anew.
    """
    with refusing():
        import time

        from app.log.check import check_journal
        from app.log.salvage import salvage_journal

        path = _find_journal(state_dir)
        with working(f"Checking {_measure(path)}"):
            is_whole = not check_journal(path).problems
        if is_whole:
            typer.echo(f"{path} is whole; there is nothing to salvage.")
            return
        with working("Writing a new journal"):
            now = time.time()
            date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
            salvaged = salvage_journal(path, int(now * 1000), date)
    _report(salvaged)


def _report(salvaged: "Salvaged") -> None:
    kept = {
        "scans as they were": salvaged.whole,
        "of these with a new record": salvaged.rebuilt,
        "finished scans with their end alone": salvaged.trimmed,
        "unfinished scans, ended as lost": salvaged.ended,
        "events": salvaged.events,
    }
    lost = {
        "scans": salvaged.dropped,
        "events, as far as is known": salvaged.events_lost,
        "rows that make no sense": salvaged.unreadable,
    }
    for title, counts in (("Kept", kept), ("Lost", lost)):
        typer.echo(f"{title}:")
        for what, count in counts.items():
            typer.echo(f"  {count:>9,} {what}")
    typer.echo(
        "Cursors go on to fit: nothing that a client has read was lost."
        if salvaged.is_epoch_kept
        else "The journal has a new epoch: clients are told to read their scans anew."
    )
    typer.echo(f"The damaged journal is {salvaged.set_aside}; delete it when nobody needs it any more.")


def _find_journal(state_dir: Path | None) -> Path:
    from app.commands.environment import read_settings
    from app.core.settings import JOURNAL_NAME

    return read_settings(state_dir=state_dir).state_dir / JOURNAL_NAME


def _measure(path: Path) -> str:
    return f"{path.name} ({path.stat().st_size / 1e6:,.1f} MB)" if path.is_file() else path.name


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
