"""Tables that are printed once: scanners, their parameters, and lists of scans."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.commands.environment import name_command
from app.commands.flags import describe_type, to_flag
from app.commands.terminal import STATE_STYLES
from app.core.scan import is_synthetic

PIPE_WIDTH = 200  # of lines that go to a file or a pipe


def print_table(table: Table) -> None:
    """On stdout: as wide as the terminal, or wide enough for a pipe, and without colours there."""
    if sys.stdout.isatty():
        Console().print(table)
        return
    console = Console(width=PIPE_WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())


def new_table(*headers: str, right: Sequence[str] = ()) -> Table:
    """Columns without lines; `right` are the ones with numbers. The last one may take several lines."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for header in headers:
        is_last = header == headers[-1]
        table.add_column(header, justify="right" if header in right else "left", no_wrap=not is_last)
    return table


def print_scans(snapshots: Sequence[Mapping[str, Any]]) -> None:
    if not snapshots:
        print(f"You have no scans here. Start one with: {name_command()} scan gap-up")
        return
    is_any_synthetic = any(is_synthetic(snapshot["data_version"]) for snapshot in snapshots)
    prices = ("prices",) if is_any_synthetic else ()
    table = new_table("id", "scanner", "state", "matches", *prices, "submitted", right=("matches",))
    for snapshot in snapshots:
        submitted = time.strftime("%Y-%m-%d %H:%M", time.localtime(snapshot["created_ts"] / 1000))
        state = Text(snapshot["state"], style=STATE_STYLES.get(snapshot["state"], "cyan"))
        mark = ("SYNTHETIC" if is_synthetic(snapshot["data_version"]) else "",) if is_any_synthetic else ()
        table.add_row(snapshot["id"], snapshot["scanner"], state, f"{snapshot['matches']:,}", *mark, submitted)
    print_table(table)


def print_scanners(scanners: Sequence[Mapping[str, Any]]) -> None:
    table = new_table("name", "what it finds")
    for scanner in scanners:
        table.add_row(scanner["name"], scanner["summary"])
    print_table(table)
    print(f"\nThe parameters of one: {name_command()} scanners NAME")


def print_scanner(scanner: Mapping[str, Any]) -> None:
    print(f"{scanner['title']}: {scanner['summary']}\n")
    presets: Mapping[str, Mapping[str, Any]] = scanner["presets"]
    table = new_table("flag", "default", *presets, "meaning", right=("default", *presets))
    for name, schema in scanner["params"]["properties"].items():
        values = [schema.get("default"), *(preset.get(name) for preset in presets.values())]
        meaning, type_ = schema.get("description", ""), describe_type(schema)
        if type_ != "text" and "YYYY" not in type_:
            meaning += f" [{type_}]"
        table.add_row(to_flag(name), *map(_show_value, values), Text(meaning))
    print_table(table)
    if scanner.get("is_external"):
        print("\nIts matches have the columns that a producer gives them.")
        print(f"Start one with: {name_command()} publish")
        return
    print("\nColumns of a match, beside those of every scan:")
    columns = new_table("column", "meaning")
    for name, meaning in scanner["columns"].items():
        columns.add_row(name, meaning)
    print_table(columns)


def _show_value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ",".join(map(_show_value, value))
    return f"{value:,.10g}" if isinstance(value, int | float) else str(value)
