"""What runs in a worker process: one chunk of a scan, from prices to match rows.

Here the two sides meet that do not know each other: `app.market`, which reads prices and makes features, and
`app.scanners`, which says in terms of features what a match is.
"""

import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
from polars import col

from app.core.errors import ScannerError, ScanwireError
from app.core.scan import Rows, Skipped, pack_rows
from app.market.dirt import PRICES
from app.market.features import add_features, add_features_at, is_costly, is_known, is_quick
from app.market.store import Slice, Store, open_store, read_rows
from app.market.where import parse_where
from app.scanners.params import MarketParams
from app.scanners.registry import Scanner, get_scanner, list_scanners, validate_params

NICENESS = 10
POSITION = "#position"  # a match's row number, which `ChunkPrices.matching` adds
FEW = 8  # with fewer rows left than one in so many, it pays to look at these and the rows before them alone
ROWS_PER_EVENT = 500
DECIMALS = 6  # of every number in a match row; prices and ratios are not known better than that

COMMON_COLUMNS = {
    "symbol": "the symbol",
    "date": "the day, YYYY-MM-DD",
    "setup": "the scanner's name",
    "close": "close, adjusted",
    "volume": "volume in shares, adjusted",
    "gap_pct": "open over yesterday's close, minus 1",
    "gap_atr": "distance of the open from yesterday's close in ATR",
    "adv20_usd": "mean daily trading of the 20 days before, in USD",
    "parabolic_score": "how parabolic the push up to yesterday was, 0..100",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkJob:
    """One chunk to do, as it is sent to a worker process."""

    path: Path
    stamp: str  # of the file that the chunk was planned for: Store.stamp
    slices: tuple[Slice, ...]
    scanner: str
    params: dict[str, Any]  # normalised, see `normalise_params`
    max_rows: int  # more are counted, not given


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkResult:
    """The matches of one chunk, sorted by symbol and date, and what was left out."""

    found: int  # matches, those over `max_rows` too
    parts: list[Rows]  # one for each event
    skipped: list[Skipped]
    took_s: float = 0.0


class ChunkPrices:
    """The prices of one chunk, as scanners see them (`app.scanners.registry.Prices`)."""

    def __init__(self, frame: pl.DataFrame, days: Sequence[pl.Expr] = ()) -> None:
        self.frame = frame  # gains columns, never loses rows: POSITION counts in it
        self._days = days  # the days that matches may be on

    def with_features(self, names: Iterable[str]) -> pl.DataFrame:
        self.frame = add_features(self.frame, names)
        return self.frame

    def matching(self, rules: Sequence[pl.Expr], measures: Mapping[str, pl.Expr] | None = None) -> pl.DataFrame:
        measures = measures or {}
        every = [*rules, *measures.values()]
        costly = [expr for expr in every if is_costly(expr)]
        # The cheap rules go first: what they leave is often a hundredth of the rows.
        first = [rule for rule in rules if (not is_costly(rule) if costly else is_quick(rule))]
        frame = self.with_features(_names(first)).with_row_index(POSITION)
        left = frame.select(pl.all_horizontal(True, *first, *self._days).fill_null(False)).to_series()
        if costly:  # only the symbols on which all else holds are worth it
            symbols = frame.filter(left)["symbol"].unique()
            frame = add_features(frame.filter(col("symbol").is_in(symbols.implode())), _names(every))
        elif left.sum() * FEW < frame.height:
            frame = add_features_at(frame, left, _names(every))
        else:
            frame = add_features(frame, _names(every))
        found = frame.lazy().filter(*rules, *self._days).select(POSITION, "symbol", "date", **measures)
        return found.collect(engine="in-memory")


def _names(exprs: Iterable[pl.Expr]) -> list[str]:
    return list(dict.fromkeys(name for expr in exprs for name in expr.meta.root_names()))


def normalise_params(name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a scan in canonical JSON form. Raises InvalidParams, which names what is wrong and how."""
    params = validate_params(get_scanner(name), raw)
    if params.where is not None:
        parse_where(params.where)
    return params.model_dump(mode="json")


def warm_up() -> int:
    """Make this process ready and polite; its id. The libraries do their first work on a few invented rows."""
    _be_nice()
    _warm_once()
    return os.getpid()


@cache
def _warm_once() -> None:
    days = [date(2020, 1, 1) + timedelta(day) for day in range(40)]
    prices = dict.fromkeys(PRICES, [10.0] * len(days))
    frame = pl.DataFrame({"symbol": ["A"] * len(days), "date": days, **prices, "volume": [1e6] * len(days)})
    scanner = list_scanners()[0]
    find_rows(scanner, validate_params(scanner, {"where": "close > 0"}), frame)
    add_features(frame, [name for name in COMMON_COLUMNS if is_known(name)])


def inspect_prices(path: Path) -> Store:
    """Check a price file and index it, away from the event loop. Raises PricesError."""
    _be_nice()
    return open_store(path)


def run_chunk(job: ChunkJob) -> ChunkResult:
    """The matches of one chunk: the same for the same job, whatever ran before.

    Raises PricesError or PricesChanged when the file cannot be read or is another one, and ScannerError when the
    scanner's own code fails; none of them shows a path or a traceback.
    """
    _be_nice()
    began = time.perf_counter()
    scanner = get_scanner(job.scanner)
    params = validate_params(scanner, job.params)
    frame, skipped = read_rows(job.path, job.slices, job.stamp)
    try:
        rows = find_rows(scanner, params, frame)
    except (ScanwireError, MemoryError):
        raise
    except (Exception, SystemExit, pl.exceptions.PanicException) as error:
        raise ScannerError(
            f"The scanner {scanner.name} failed with {type(error).__name__} on this chunk of prices. "
            "Other scanners are not affected."
        ) from None
    kept = rows[: job.max_rows]
    parts = [pack_rows(kept[start : start + ROWS_PER_EVENT]) for start in range(0, len(kept), ROWS_PER_EVENT)]
    return ChunkResult(found=len(rows), parts=parts, skipped=skipped, took_s=time.perf_counter() - began)


def find_rows(scanner: Scanner, params: MarketParams, frame: pl.DataFrame) -> list[dict[str, Any]]:
    """The match rows of a table of believable prices, sorted by symbol and date: JSON values only."""
    days = []
    if params.start:
        days.append(col("date") >= params.start)
    if params.end:
        days.append(col("date") <= params.end)
    prices = ChunkPrices(frame, days)
    found = scanner.find(prices, params)
    _check_found(scanner, found)
    found = found.filter(*days)
    if found.is_empty():
        return []
    where = parse_where(params.where) if params.where else None
    return _to_json(_complete(scanner, prices, found, where))


def _check_found(scanner: Scanner, found: object) -> None:
    if not isinstance(found, pl.DataFrame):
        raise ScannerError(f"The scanner {scanner.name} returned no table of matches.")
    for name in ("symbol", "date"):
        if name not in found.columns:
            raise ScannerError(f"The scanner {scanner.name} returned matches without the column {name}.")


def _complete(scanner: Scanner, prices: ChunkPrices, found: pl.DataFrame, where: pl.Expr | None) -> pl.DataFrame:
    """The matches that `where` lets through, with the columns that every match has, sorted by symbol and date."""
    common = [name for name in COMMON_COLUMNS if name != "setup"]
    names = [*common, *(_names([where]) if where is not None else ())]
    few = add_features_at(prices.frame, _is_found(prices.frame, found), [name for name in names if is_known(name)])
    if where is not None:
        few = few.filter(where)
    own = found.select("symbol", "date", pl.exclude(POSITION, *COMMON_COLUMNS)).unique(["symbol", "date"], keep="first")
    return (
        few.lazy()
        .select(col("symbol", "date"), pl.lit(scanner.name).alias("setup"), col(common[2:]))
        .join(own.lazy(), on=["symbol", "date"], how="inner")
        .sort("symbol", "date")
        .collect(engine="in-memory")
    )


def _is_found(frame: pl.DataFrame, found: pl.DataFrame) -> pl.Series:
    """For each row of the frame: is it a match?"""
    keys = ["symbol", "date"]
    if POSITION not in found.columns:  # it did not come from `matching`
        found = frame.select(keys).with_row_index(POSITION).join(found.select(keys), on=keys, how="semi")
    return pl.int_range(frame.height, eager=True).is_in(found[POSITION].cast(pl.Int64).implode())


def _to_json(frame: pl.DataFrame) -> list[dict[str, Any]]:
    floats = pl.selectors.float()
    return (
        frame.with_columns(
            col("date").dt.to_string("iso"),
            col("volume").round().cast(pl.Int64),
        )
        .with_columns(pl.when(floats.is_finite()).then(floats.round(DECIMALS)).name.keep())
        .to_dicts()
    )


@cache
def _be_nice() -> None:
    """Give way to the event loop, and leave Ctrl-C to the server; once per process."""
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
