"""`scanwire data`: price files made, imported and looked at."""

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from app.market.importers import Imported
    from app.market.store import Store

REFUSED = 2
SHOWN_REJECTED = 10
TRADING_DAYS = 252

data_app = typer.Typer(help="Make, import and inspect price files.", no_args_is_help=True)
To = Annotated[Path | None, typer.Option("--to", help="Price file to write (Parquet).")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist already.")]


@data_app.command("import")
def import_prices(
    files: Annotated[list[Path], typer.Argument(help="CSV or Parquet files, plain or gzipped.")],
    to: To = None,
    rejected: Annotated[Path | None, typer.Option(help="Write every rejected row to this CSV file.")] = None,
    force: Force = False,
) -> None:
    """Make a price file of CSV or Parquet files; says which rows were dropped, and why."""
    with refusing():
        from app.market.importers import import_files
        from app.market.store import open_store, write_store

        path = to or _state_dir() / "prices.parquet"
        _refuse_existing(path, rejected, force=force)
        started = time.monotonic()
        with working(f"Reading {len(files)} file{'s' * (len(files) != 1)}"):
            imported = import_files(files)
        _report_rejected(imported, rejected)
        if not imported.frame.height:
            typer.echo("No row could be taken; no price file was written.", err=True)
            raise typer.Exit(REFUSED)
        with working("Writing the price file"):
            source = "imported from " + ", ".join(file.name for file in files[:5]) + ", …" * (len(files) > 5)
            write_store(imported.frame, path, source=source)
            store = open_store(path)
        elapsed_s = time.monotonic() - started
    taken = f"{imported.rows:,} rows read, {imported.frame.height:,} taken"
    typer.echo(
        taken
        + (f", {imported.replaced:,} replaced by later files" if imported.replaced else "")
        + f" in {elapsed_s:.1f} s"
    )
    _print_store(store)
    _tell_next(path)


@data_app.command()
def info(
    path: Annotated[Path | None, typer.Argument(help="A price file; what is served when left out.")] = None,
) -> None:
    """What is in a price file."""
    with refusing():
        from app.commands.environment import find_prices
        from app.market.store import open_store

        path = path or find_prices()
        with working("Checking the price file"):
            store = open_store(path)
    _print_store(store)


@data_app.command()
def synth(
    symbols: Annotated[int, typer.Option(min=1, max=100_000)] = 8000,
    years: Annotated[float, typer.Option(min=0.01, max=75, help=f"Of {TRADING_DAYS} days.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same prices.")] = 1,
    to: To = None,
    force: Force = False,
) -> None:
    """Invent prices for load tests; they are marked as synthetic wherever they are shown."""
    with refusing():
        from app.market.sample import make_synthetic
        from app.market.store import open_store

        path = to or _state_dir() / "synthetic.parquet"
        _refuse_existing(path, force=force)
        days = max(1, round(years * TRADING_DAYS))
        with working(f"Inventing {symbols * days:,} rows", lambda: _measure_written(path)):
            make_synthetic(path, symbols=symbols, days=days, seed=seed)
        with working("Checking the price file"):
            store = open_store(path)
    _print_store(store)
    _tell_next(path)


@contextmanager
def refusing() -> Iterator[None]:
    """What makes a command impossible is said in one sentence, with exit code 2."""
    from app.commands.environment import CommandFailed
    from app.core.errors import ScanwireError

    try:
        yield
    except ScanwireError as error:
        typer.echo(error.detail, err=True)
        raise typer.Exit(REFUSED) from None
    except CommandFailed as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(REFUSED) from None


def _state_dir() -> Path:
    from app.commands.environment import read_settings

    return read_settings().state_dir


def _refuse_existing(*paths: Path | None, force: bool) -> None:
    """Nothing is replaced unasked: it may be the work of an hour, and a server may be reading it."""
    from app.commands.environment import CommandFailed

    for path in paths:
        if path is not None and path.is_file() and not force:
            raise CommandFailed(f"{path} exists already. Name another file, or replace it with --force.")


@contextmanager
def working(text: str, measure: Callable[[], str] = str) -> Iterator[None]:
    """Shows on stderr that something is being done, for how long, and what `measure` says of it."""
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Measure(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(measure())

    console = Console(stderr=True)
    if not console.is_terminal:
        typer.echo(f"{text} …", err=True)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), Measure())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(text, total=None)
        yield


def _measure_written(path: Path) -> str:
    """How much of the file that will be `path` is on the disk so far."""
    sizes = [part.stat().st_size for part in path.parent.glob(f".{path.name}.*")]
    return f"{max(sizes) / 1e6:,.0f} MB written" if sizes else ""


def _report_rejected(imported: "Imported", to: Path | None) -> None:
    """Dropped rows by reason, and one by one: all of them in a file, or the first few here."""
    if not imported.counts:
        return
    from app.commands.listings import new_table, print_table

    total = sum(imported.counts.values())
    typer.echo(f"{total:,} row{'s were' if total != 1 else ' was'} rejected:")
    table = new_table("rows", "reason", right=("rows",))
    for reason, count in imported.counts.items():
        table.add_row(f"{count:,}", f"rows {reason}" if count != 1 else f"row {reason}")
    print_table(table)
    if to is not None:
        _write_rejected(imported, to)
        return
    table = new_table("file", "row", "symbol", "date", "reason", right=("row",))
    for one in imported.rejected[:SHOWN_REJECTED]:
        table.add_row(one.file, f"{one.row:,}", one.symbol or "", one.date or "", one.reason)
    print_table(table)
    if total > SHOWN_REJECTED:
        typer.echo("… and more; --rejected FILE writes them to a file.")


def _write_rejected(imported: "Imported", to: Path) -> None:
    import csv

    from app.commands.environment import CommandFailed

    try:
        with to.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("file", "row", "symbol", "date", "reason"))
            writer.writerows((one.file, one.row, one.symbol, one.date, one.reason) for one in imported.rejected)
    except OSError as error:
        raise CommandFailed(f"{to} cannot be written: {error.strerror}.") from None
    left = sum(imported.counts.values()) - len(imported.rejected)
    typer.echo(f"Rejected rows are in {to}" + (f"; {left:,} more are only counted" if left else ""))


def _tell_next(path: Path) -> None:
    from app.commands.environment import name_command

    typer.echo(f"\nServe them with: {name_command()} serve --prices {shlex.quote(str(path))}")


def _print_store(store: "Store") -> None:
    from app.market.store import name_symbols

    lines = {
        "file": str(store.path),
        "source": store.source,
        "symbols": name_symbols(store),
        "rows": f"{store.rows:,}",
        "days": f"{store.first} to {store.last}",
        "version": store.data_version,
    }
    if store.is_synthetic:
        typer.echo("SYNTHETIC: these prices are invented.")
    for name, value in lines.items():
        typer.echo(f"{name:<8} {value}")
