"""What people see of scans in a terminal: live while they run, and as plain lines where nothing can be redrawn."""

import asyncio
import contextlib
import hashlib
import math
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from app.core.event import EventType
from app.core.scan import SYNTHETIC_MARK, State, feed_digest, is_synthetic
from app.eventstream import ScanEvent

Row = Mapping[str, Any]

REDRAW_S = 0.1
ROWS_KEPT = 200  # for the table; no terminal shows more
OTHER_LINES = 6  # of a live screen, beside the rows and the line of each scan
STATE_STYLES = {"completed": "green", "failed": "red", "lost": "red", "cancelled": "yellow", "cancelling": "yellow"}


# Columns


@dataclass(frozen=True, slots=True)
class Column:
    """How one member of a match row is shown. `width` is the least number of cells, so that lines stay in place."""

    key: str
    header: str
    show: Callable[[Any], str]
    width: int
    is_left: bool = False

    def show_in(self, row: Row) -> str:
        """The cell of this row. The rows of an external scan may hold anything under any name."""
        value = row.get(self.key)
        try:
            text = self.show(value)
        except (TypeError, ValueError):
            text = show_number(value)
        return show_text(text)


def show_number(value: Any) -> str:
    """Whole numbers with separators, others with two decimals."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        is_whole = isinstance(value, int) or abs(value) >= 100_000
        return f"{value:,.0f}" if is_whole else f"{value:,.2f}"
    return str(value)


def show_text(text: str) -> str:
    """The text in one line, without anything that a terminal would obey."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def show_percent(value: Any) -> str:
    """A fraction as percent with its sign."""
    return "–" if value is None else f"{value:+.1%}"


def show_large(value: Any) -> str:
    """An amount in thousands, millions or billions."""
    if value is None:
        return "–"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f}"


_COLUMNS = {
    column.key: column
    for column in (
        Column("symbol", "symbol", str, 6, is_left=True),
        Column("date", "date", str, 10, is_left=True),
        Column("close", "close", lambda value: f"{value:,.2f}", 8),
        Column("volume", "volume", show_number, 11),
        Column("gap_pct", "gap", show_percent, 6),
        Column("gap_atr", "gap ATR", show_number, 7),
        Column("adv20_usd", "20d USD", show_large, 7),
        Column("parabolic_score", "score", lambda value: "–" if value is None else f"{value:.0f}", 5),
        Column("dollar_volume", "USD", show_large, 7),
        *(Column(key, key.removesuffix("_pct").replace("_", " "), show_percent, 6)
          for key in ("change_pct", "high_pct", "d1_high_pct")),
    )
}  # fmt: skip
_HIDDEN = frozenset(("setup",))


def choose_columns(rows: Sequence[Row], max_width: int | None = None) -> list[Column]:
    """The columns of these rows, from the left as many as fit into `max_width` cells."""
    chosen: list[Column] = []
    used = 0
    for key in rows[0] if rows else ():
        if key in _HIDDEN:
            continue
        column = _COLUMNS.get(key) or Column(key, show_text(key.replace("_", " ")), show_number, len(key))
        widest = max(column.width, len(column.header), *(len(column.show_in(row)) for row in rows))
        used += widest + (2 if chosen else 0)
        if max_width is not None and used > max_width and chosen:
            break
        chosen.append(column)
    return chosen


def make_table(columns: Iterable[Column], rows: Iterable[Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    columns = list(columns)
    for column in columns:
        justify: Any = "left" if column.is_left else "right"
        table.add_column(Text(column.header), justify=justify, no_wrap=True, min_width=column.width)
    for row in rows:
        table.add_row(*(Text(column.show_in(row)) for column in columns))
    return table


# One scan


@dataclass(slots=True)
class ScanView:
    """What the events of one scan came to so far."""

    id: str
    scanner: str = "scan"
    state: str = State.QUEUED
    progress: Mapping[str, Any] = field(default_factory=dict)  # the data of the last progress event
    position: int | None = None
    eta_s: Sequence[float] | None = None
    total: int | None = None
    unit: str = "symbols"
    data_version: str = ""
    matches: int = 0
    end: Mapping[str, Any] | None = None
    _digest: Any = field(default_factory=hashlib.sha256)

    def take(self, event: ScanEvent) -> None:
        data = event.data
        match event.type:
            case EventType.QUEUED:
                self.state, self.position, self.eta_s = State.QUEUED, data["position"], data["eta_s"]
            case EventType.STARTED:
                self.state, self.scanner = State.RUNNING, data["scanner"]
                self.total, self.unit = data["total"], data["unit"]
                self.data_version = data.get("data_version", "")
            case EventType.PROGRESS:
                self.progress = data
            case EventType.MATCHES:
                self.matches += len(data["rows"])
                feed_digest(self._digest, data["rows"])
            case EventType.CANCELLING:
                self.state = State.CANCELLING
            case EventType.END:
                self.state, self.end = data["state"], data
            case EventType.RESET:
                self._take_reset(data)

    def _take_reset(self, data: Mapping[str, Any]) -> None:
        """Everything that is kept is told again; what the snapshot knows counts until then."""
        self.progress, self.matches, self.end = {}, 0, None
        self._digest = hashlib.sha256()
        if data.get("snapshot") is None:
            self.state = State.LOST
        else:  # where `started` is not kept any more
            self.data_version = data["snapshot"].get("data_version", self.data_version)

    @property
    def is_synthetic(self) -> bool:
        return is_synthetic(self.data_version)

    @property
    def is_proved(self) -> bool:
        """The rows received are the ones that the scan found."""
        return self.end is not None and self._digest.hexdigest() == self.end["digest"]

    def summarise(self) -> str:
        """How it ended, in a sentence or two."""
        if self.end is None:
            return f"{self.scanner} {self.id}: not kept by the server any more"
        end = self.end
        text = f"{self.scanner} {self.state}: {end['matches']:,} match{'es' * (end['matches'] != 1)}"
        text += f" in {end['elapsed_s']:,.2f} s"
        if end["state"] == State.COMPLETED and self.total:
            text += f" over {self.total:,} {show_text(self.unit)}"
        if end.get("truncated"):
            text += "; more were found than are kept"
        if self.is_synthetic:
            text += f"\n{SYNTHETIC_MARK}."
        if (skipped := end.get("skipped_symbols") or len(end["skipped"])) > 0:
            first = end["skipped"][0]
            text += f"\nBad rows were left out of {skipped:,} symbols, such as {first['symbol']}: {first['reason']}"
        if end.get("error"):
            text += f"\n{show_text(end['error'].get('detail') or end['error'].get('title') or '')}"
        if self.is_proved:
            text += "\nThe digest of the rows received is that of the rows found."
        elif self.matches < end["matches"]:
            text += "\nThe rows are past their retention; only the end is kept."
        else:
            text += "\nThe rows received are NOT the ones that were found: their digest differs."
        return text

    def render(self, *, with_name: bool = False) -> RenderableType:
        """One line: what it does, how far it is, how long it will take."""
        text = Text(f"{self.scanner}  " if with_name else "", no_wrap=True, overflow="ellipsis")
        text.append(f"{self.state:<10}", style=STATE_STYLES.get(self.state, "cyan"))
        if self.state == State.QUEUED:
            text.append(f" place {self.position or '?'} in the queue{_show_eta(self.eta_s, ', starts in {}')}")
            return text
        done, total = self.progress.get("done", 0), self.progress.get("total", self.total)
        if self.end is not None and self.state == State.COMPLETED and self.total is not None:
            done = total = self.total
        line = Table.grid(padding=(0, 1, 0, 0))
        rate = self.progress.get("rate")
        notes = f"{done or 0:,}{'' if total is None else f'/{total:,}'} {show_text(self.unit)}"
        notes += f"  {rate:,.0f}/s" if rate else ""
        if self.end is None:
            notes += _show_eta(self.progress.get("eta_s"), "  {} left")
        line.add_row(text, ProgressBar(total=total or 1, completed=done or 0, width=20), Text(notes, no_wrap=True))
        return line


def _show_eta(eta_s: Sequence[float] | None, text: str) -> str:
    """`text` with its {} replaced by a span of seconds; nothing while nobody knows."""
    if eta_s is None:
        return ""
    low, high = (math.ceil(seconds) for seconds in eta_s)
    return text.format(f"{high} s" if low >= high else f"{low} to {high} s")


# Displays


class LiveDisplay:
    """Scans on a terminal, redrawn in place: the newest matches, as many as fit, and a line for each scan."""

    def __init__(self, views: Sequence[ScanView], console: Console) -> None:
        self._views = views
        self._console = console
        self._rows: deque[Row] = deque(maxlen=ROWS_KEPT)
        self._is_stale = True
        self._live = Live(console=console, auto_refresh=False, get_renderable=self._render, vertical_overflow="crop")

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Redraws when something changed, until the block is left; the last screen stays."""
        with self._live:
            drawing = asyncio.create_task(self._redraw())
            try:
                yield
            finally:
                drawing.cancel()
                self._live.refresh()

    async def _redraw(self) -> None:
        while True:
            if self._is_stale:
                self._is_stale = False
                self._live.refresh()
            await asyncio.sleep(REDRAW_S)

    def take(self, event: ScanEvent) -> None:
        if event.type == EventType.MATCHES:
            self._rows.extend(event.data["rows"])
        elif event.type == EventType.RESET:
            self._rows.clear()
        self._is_stale = True

    def say(self, text: str) -> None:
        self._console.print(Text(text))

    def _render(self) -> RenderableType:
        found = sum(view.matches for view in self._views)
        room = max(3, self._console.height - OTHER_LINES - len(self._views))
        newest = list(self._rows)[-room:]
        parts: list[RenderableType] = []
        if newest:
            parts.append(make_table(choose_columns(newest, self._console.width - 1), newest))
            note = f"the newest {len(newest)} of {found:,} matches" if found > len(newest) else f"{found:,} matches"
            parts.append(Text.assemble((note, "dim"), (self._mark_synthetic(), "bold yellow")))
        return Group(*parts, *(view.render(with_name=len(self._views) > 1) for view in self._views))

    def _mark_synthetic(self) -> str:
        """Which of the rows above are invented."""
        names = [view.scanner for view in self._views if view.is_synthetic]
        which = f" ({', '.join(names)})" if 0 < len(names) < len(self._views) else ""
        return f"  {SYNTHETIC_MARK}{which}" if names else ""


class PlainDisplay:
    """Matches as lines of text on `out`, each as it comes; everything else is said on `aside`."""

    def __init__(self, out: TextIO, aside: TextIO) -> None:
        self._out = out
        self._aside = aside
        self._columns: list[Column] = []

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        yield

    def take(self, event: ScanEvent) -> None:
        rows = event.data["rows"] if event.type == EventType.MATCHES else ()
        if rows and not self._columns:
            self._columns = choose_columns(rows)
            self._write([column.header for column in self._columns])
        for row in rows:
            self._write([column.show_in(row) for column in self._columns])
        if event.type == EventType.RESET:
            self.say("The server's log is another one now: what came before counts for nothing.")
        if event.type == EventType.STARTED and is_synthetic(event.data.get("data_version", "")):
            self.say(f"{SYNTHETIC_MARK}:")
        self._out.flush()

    def _write(self, texts: Sequence[str]) -> None:
        cells = []
        for column, text in zip(self._columns, texts, strict=True):
            width = max(column.width, len(column.header))
            cells.append(text.ljust(width) if column.is_left else text.rjust(width))
        self._out.write("  ".join(cells).rstrip() + "\n")

    def say(self, text: str) -> None:
        print(text, file=self._aside, flush=True)


class JsonDisplay(PlainDisplay):
    """Every event as one line of JSON on `out`, unchanged and at once; what people are told goes to `aside`."""

    def take(self, event: ScanEvent) -> None:
        self._out.write(event.json.decode() + "\n")
        self._out.flush()


Display = LiveDisplay | PlainDisplay


def choose_display(views: Sequence[ScanView], *, as_json: bool) -> Display:
    """Live on a terminal that can be redrawn, else plain lines; events as they are with `as_json`."""
    if as_json:
        return JsonDisplay(sys.stdout, sys.stderr)
    console = Console()
    if sys.stdout.isatty() and not console.is_dumb_terminal:
        return LiveDisplay(views, console)
    return PlainDisplay(sys.stdout, sys.stderr)


async def show_events(views: Sequence[ScanView], display: Display, events: AsyncGenerator[ScanEvent, None]) -> None:
    """Shows the events until they end, and then how each scan ended."""
    by_id = {view.id: view for view in views}
    # Whatever ends the display, such as a closed pipe, ends the stream as well.
    async with display.shown(), contextlib.aclosing(events):
        async for event in events:
            if event.scan in by_id:
                by_id[event.scan].take(event)
            display.take(event)
    for view in views:
        display.say(view.summarise())
