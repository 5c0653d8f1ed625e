"""The price table: one Parquet file, sorted by symbol and date, that scans read slice by slice."""

import hashlib
import json
import os
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl

from app.core.errors import PricesChanged, PricesError
from app.core.scan import SYNTHETIC, Skipped
from app.market.dirt import PRICES, drop_bad_rows

COLUMNS = ("symbol", "date", *PRICES, "volume")
SCHEMA = pl.Schema({"symbol": pl.String, "date": pl.Date, **dict.fromkeys((*PRICES, "volume"), pl.Float64)})
ROW_GROUP_ROWS = 32_768  # small enough that a slice reads little beside itself, large enough to pack well
SCAN_ROWS = 1_000_000  # rows of symbol and date held at once while a file is checked
FIRST_CHUNK_ROWS = 8_000  # about six symbols of five years: the first match is not kept waiting
NAMED_SYMBOLS = 8  # by those who are told what there is
RAMP = 2  # each chunk is this many times the one before, up to chunk_rows
HINT = "Run `scanwire data import FILE` to make a price file that can be used."

Slice = tuple[int, int]  # offset and number of rows


@dataclass(frozen=True, slots=True)
class SymbolRows:
    """Where the rows of one symbol lie in the file, and which days they span."""

    symbol: str
    offset: int
    rows: int
    first: date
    last: date


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A price file that was checked from end to end, and what is known of it without reading prices."""

    path: Path
    data_version: str  # 16 hex digits of the SHA-256 of the file's bytes; "synthetic-" before them if invented
    stamp: str  # size, time of change and inode: cheap to compare, see `read_rows`
    symbols: tuple[SymbolRows, ...]  # in the order of the file
    rows: int
    first: date
    last: date
    source: str  # where the prices come from, in words
    is_synthetic: bool  # invented prices: to be marked wherever they are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A batch of whole symbols: the unit of work."""

    slices: tuple[Slice, ...]
    symbols: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The chunks of a scan in the order of the file, and the symbols asked for that the file does not hold."""

    chunks: tuple[Chunk, ...]
    missing: tuple[str, ...] = ()

    @property
    def symbols(self) -> int:
        return sum(chunk.symbols for chunk in self.chunks)

    @property
    def rows(self) -> int:
        return sum(chunk.rows for chunk in self.chunks)


def read_stamp(path: Path) -> str:
    """A text that changes whenever the file is replaced or written. Raises PricesError when there is no file."""
    try:
        stat = path.stat()
    except OSError:
        raise PricesError(f"There is no price file {path.name}. {HINT}") from None
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"


def open_store(path: Path) -> Store:
    """Check a price file and index its symbols; what comes back can be scanned, apart from damaged price pages.

    Reads the whole file once for its data version, and its symbols and dates; prices are not decoded.
    Raises PricesError, which names the file (never its directory) and the column, when the file is missing, empty,
    cut off, not Parquet, lacks a column, has one of a wrong type, or is not sorted by symbol and then strictly by
    date.
    """
    stamp = read_stamp(path)
    if not path.is_file():
        raise PricesError(f"{path.name or path} is not a file. {HINT}")
    if not path.stat().st_size:
        raise PricesError(f"The price file {path.name} is empty. {HINT}")
    try:
        _check_schema(path)
        symbols = _index_symbols(path)
        metadata = json.loads(pl.read_parquet_metadata(path).get("scanwire", "{}"))
        with path.open("rb") as file:
            data_version = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except (pl.exceptions.PolarsError, OSError, ValueError, pl.exceptions.PanicException) as error:
        raise _unreadable(path, error) from None
    if not symbols:
        raise PricesError(f"The price file {path.name} has its columns but no rows. {HINT}")
    return Store(
        path=path,
        data_version=f"{SYNTHETIC}{data_version}" if metadata.get("is_synthetic") else data_version,
        stamp=stamp,
        symbols=symbols,
        rows=sum(entry.rows for entry in symbols),
        first=min(entry.first for entry in symbols),
        last=max(entry.last for entry in symbols),
        source=str(metadata.get("source") or path.name),
        is_synthetic=bool(metadata.get("is_synthetic")),
    )


def _unreadable(path: Path, error: BaseException) -> PricesError:
    if isinstance(error, PermissionError):
        return PricesError(f"The price file {path.name} may not be read by this user.")
    if _is_csv(path):
        advice = f"Run `scanwire data import {path.name}`, and serve the price file that this makes."
        return PricesError(f"The price file {path.name} cannot be read as Parquet: it is CSV. {advice}")
    return PricesError(f"The price file {path.name} cannot be read as Parquet: it is damaged or cut off. {HINT}")


def _is_csv(path: Path) -> bool:
    """Whether it looks like a table in text, or has such a name and is packed."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    if head[:4] == b"PAR1" or b"\0" in head:
        return head[:2] == b"\x1f\x8b" and ".csv" in path.suffixes
    return any(mark in head.partition(b"\n")[0] for mark in b",;\t|")


def _check_schema(path: Path) -> None:
    schema = pl.read_parquet_schema(path)
    allowed: dict[str, tuple[pl.DataType, ...]] = {
        "symbol": (pl.String(),),
        "date": (pl.Date(),),
        **dict.fromkeys(PRICES, (pl.Float64(), pl.Float32())),
        "volume": (pl.Int64(), pl.Float64(), pl.Int32(), pl.Float32(), pl.UInt32(), pl.UInt64()),
    }
    for column, types in allowed.items():
        if column not in schema:
            saw = ", ".join(schema) or "none"
            raise PricesError(f"The price file {path.name} has no column {column!r}; its columns are: {saw}. {HINT}")
        if schema[column] not in types:
            raise PricesError(
                f"The column {column!r} of the price file {path.name} is {schema[column]}; "
                f"it must be {types[0]}. {HINT}"
            )


def _index_symbols(path: Path) -> tuple[SymbolRows, ...]:
    """The runs of equal symbols, after checking the order; reads SCAN_ROWS rows of two columns at a time."""
    runs: list[SymbolRows] = []
    total = int(pl.scan_parquet(path).select(pl.len()).collect().item())
    for offset in range(0, total, SCAN_ROWS):
        piece = pl.scan_parquet(path).select("symbol", "date").slice(offset, SCAN_ROWS).collect()
        for column in ("symbol", "date"):
            if piece[column].null_count():
                raise PricesError(f"The price file {path.name} has rows without a {column}. {HINT}")
        same = pl.col("symbol") == pl.col("symbol").shift(1)
        wrong = piece.filter(same & (pl.col("date") <= pl.col("date").shift(1)))
        if wrong.height:
            raise _out_of_order(path, wrong["symbol"][0], wrong["date"][0])
        spans = piece.group_by(pl.col("symbol").rle_id().alias("run"), maintain_order=True).agg(
            pl.col("symbol").first(), pl.len(), first=pl.col("date").first(), last=pl.col("date").last()
        )
        for symbol, rows, first, last in spans.select("symbol", "len", "first", "last").iter_rows():
            previous = runs[-1] if runs else None
            if previous and previous.symbol == symbol and first > previous.last:
                runs[-1] = SymbolRows(symbol, previous.offset, previous.rows + rows, previous.first, last)
            elif previous and previous.symbol >= symbol:
                raise _out_of_order(path, symbol, first)
            else:
                runs.append(SymbolRows(symbol, previous.offset + previous.rows if previous else 0, rows, first, last))
    return tuple(runs)


def _out_of_order(path: Path, symbol: str, day: date) -> PricesError:
    return PricesError(
        f"The price file {path.name} must be sorted by symbol and date, each pair once; {symbol} at {day} is out of "
        f"order or there twice. {HINT}"
    )


def read_rows(path: Path, slices: Sequence[Slice], stamp: str | None = None) -> tuple[pl.DataFrame, list[Skipped]]:
    """The rows of these slices that can be believed, prices and volume as Float64, and what was left out and why.

    A row is left out, and never ends a scan, when a price or the volume is missing, not finite or not positive, or
    when its high or low contradicts its open or close. Left-out rows are counted per symbol and reason; a row with
    two reasons counts for both. Raises PricesChanged when the file is not the one that `stamp` was read from, and
    PricesError when it cannot be read.
    """
    return drop_bad_rows(_read(path, slices, stamp))


def _read(path: Path, slices: Sequence[Slice], stamp: str | None) -> pl.DataFrame:
    merged = list(_merge(slices))
    lazy = pl.scan_parquet(path).select(COLUMNS)
    try:
        if stamp is not None and read_stamp(path) != stamp:
            raise PricesChanged("The price file was replaced while the scan ran. Submit the scan again.")
        pieces = [lazy.slice(offset, rows).collect() for offset, rows in merged]
        return (pl.concat(pieces) if pieces else SCHEMA.to_frame()).cast(SCHEMA)
    except (pl.exceptions.PolarsError, OSError, pl.exceptions.PanicException) as error:
        raise _unreadable(path, error) from None


def find_symbol(store: Store, symbol: str) -> SymbolRows | None:
    """Where the rows of a symbol lie; None when the file does not hold it."""
    place = bisect_left(store.symbols, symbol, key=lambda entry: entry.symbol)
    entry = store.symbols[place] if place < len(store.symbols) else None
    return entry if entry is not None and entry.symbol == symbol else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Days:
    """Which rows of a symbol are asked for, at most `rows` of them: those around a day, or from one day to another."""

    rows: int
    around: date | None = None
    start: date | None = None
    end: date | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SymbolPrices:
    columns: dict[str, list[Any]]  # dates as YYYY-MM-DD, volume in whole shares
    left_out: list[str]  # why rows of these days cannot be believed
    next: str | None  # the first day that did not fit


def read_days(path: Path, stamp: str, entry: SymbolRows, days: Days) -> SymbolPrices:
    """The believable rows of one symbol on these days, oldest first. Raises as `read_rows` does."""
    frame = _read(path, [(entry.offset, entry.rows)], stamp)
    dates = frame["date"].to_list()
    if days.around is not None:
        # As many before the day as from it on; at either end of the history, fewer.
        first = bisect_left(dates, days.around) - days.rows // 2
        first, last = max(first, 0), first + days.rows
    else:
        first = bisect_left(dates, days.start) if days.start else 0
        last = bisect_right(dates, days.end) if days.end else frame.height
    following = dates[first + days.rows] if days.around is None and last > first + days.rows else None
    chosen, skipped = drop_bad_rows(frame[first : min(last, first + days.rows)])
    table = chosen.select(pl.col("date").dt.to_string("iso"), *PRICES, pl.col("volume").round().cast(pl.Int64))
    return SymbolPrices(
        columns=table.to_dict(as_series=False),
        left_out=[one.reason for one in skipped],
        next=None if following is None else following.isoformat(),
    )


def _merge(slices: Sequence[Slice]) -> Iterator[Slice]:
    start = end = 0
    for offset, rows in sorted(slices):
        if offset > end:
            if end > start:
                yield start, end - start
            start = offset
        end = max(end, offset + rows)
    if end > start:
        yield start, end - start


def describe(source: str, is_synthetic: bool) -> dict[str, str]:
    """The Parquet metadata that says where prices come from."""
    return {"scanwire": json.dumps({"source": source, "is_synthetic": is_synthetic})}


def write_lazy(rows: pl.LazyFrame, path: Path, *, source: str, is_synthetic: bool) -> None:
    """Write sorted rows as a price file, whole or not at all, in bounded memory.

    The rows must have the COLUMNS and their order; raises PricesError when the directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            rows.select(COLUMNS).sink_parquet(
                temporary,
                compression="lz4",
                row_group_size=ROW_GROUP_ROWS,
                metadata=describe(source, is_synthetic),
                engine="streaming",
            )
            temporary.chmod(0o644)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or "the disk failed"
        raise PricesError(f"The price file {path.name} cannot be written: {reason}.") from None


def write_store(frame: pl.DataFrame, path: Path, *, source: str, is_synthetic: bool = False) -> None:
    """Write a table as a price file, sorted, whole or not at all: a reader sees the old file or the new one.

    `frame` has the COLUMNS in any order; of rows with the same symbol and date the last is kept.
    """
    rows = frame.select(COLUMNS).unique(["symbol", "date"], keep="last", maintain_order=True).sort("symbol", "date")
    write_lazy(rows.lazy(), path, source=source, is_synthetic=is_synthetic)


def name_symbols(store: Store) -> str:
    """`5: AAPL, FB, GOOG, IBM, MSFT`, or how many there are and some of them."""
    names = [entry.symbol for entry in store.symbols[:NAMED_SYMBOLS]]
    count = len(store.symbols)
    return f"{count:,}{': ' if len(names) == count else ', such as '}{', '.join(names)}"


def plan_chunks(store: Store, symbols: Sequence[str] | None = None, chunk_rows: int = 100_000) -> Plan:
    """The same chunks for the same store and arguments: whole symbols, about `chunk_rows` rows in each.

    The first chunk is small and each next one up to twice as large, so that the first match comes quickly.
    """
    wanted = None if symbols is None else set(symbols)
    chosen = [entry for entry in store.symbols if wanted is None or entry.symbol in wanted]
    missing = () if wanted is None else tuple(sorted(wanted.difference(entry.symbol for entry in chosen)))
    chunks: list[Chunk] = []
    target = min(FIRST_CHUNK_ROWS, chunk_rows)
    batch: list[Slice] = []
    rows = 0
    for entry in chosen:
        batch.append((entry.offset, entry.rows))
        rows += entry.rows
        if rows >= target:
            chunks.append(Chunk(slices=tuple(_merge(batch)), symbols=len(batch), rows=rows))
            target, batch, rows = min(target * RAMP, chunk_rows), [], 0
    if batch:
        chunks.append(Chunk(slices=tuple(_merge(batch)), symbols=len(batch), rows=rows))
    return Plan(chunks=tuple(chunks), missing=missing)
