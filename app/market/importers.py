"""Price files of the common shapes, made into one table: each row is checked, and what was dropped is told."""

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from io import BytesIO
from pathlib import Path

import polars as pl
from polars import col

from app.core.errors import PricesError
from app.market.dirt import BAD_ROWS, PRICES
from app.market.store import COLUMNS

MAX_REJECTED = 1_000  # rows that are told one by one; beyond, they are only counted
SPLIT_STEP = 1.2  # a step of the adjustment this large is a split; dividends move it by a few percent

_ALIASES: dict[str, tuple[str, ...]] = {
    "symbol": ("symbol", "ticker", "name", "sym", "code", "actsymbol", "instrument"),
    "date": ("date", "timestamp", "day", "datetime", "time", "tradedate", "tradingday"),
    "open": ("open", "o", "openprice", "priceopen"),
    "high": ("high", "h", "highprice", "pricehigh"),
    "low": ("low", "l", "lowprice", "pricelow"),
    "close": ("close", "c", "closeprice", "priceclose", "last"),
    "volume": ("volume", "vol", "v", "sharesvolume", "tradevolume"),
    "adj_close": ("adjclose", "adjustedclose", "adjcloseprice", "closeadj", "closeadjusted"),
}
_NUMBERS = (*PRICES, "volume")
_DATE_FORMATS = ("%Y-%m-%d", "%Y/%m/%d", "%Y%m%d", "%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y", "%d-%b-%Y", "%b %d, %Y")
_FIRST_DAY, _LAST_DAY = date(1900, 1, 1), date(2199, 12, 31)
_NOT_GIVEN = ("", "null", "nan", "na", "n/a", "none", "-")
_SYMBOL = r"^[A-Z0-9^][A-Z0-9.\-^=/_]{0,19}$"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """One row that was not taken, and why."""

    file: str
    row: int  # 1 is the first row of data, after the header
    symbol: str | None
    date: str | None  # as it was written
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What came out of the files: a table that `write_store` takes, and an account of the rest."""

    frame: pl.DataFrame  # the COLUMNS of a price file, sorted by symbol and date, each pair once
    rows: int  # read, in all files
    replaced: int  # rows that gave way to a later file's row of the same symbol and date
    rejected: tuple[Rejected, ...]  # the first MAX_REJECTED
    counts: Mapping[str, int]  # rejected rows by reason, all of them


def import_files(paths: Sequence[Path]) -> Imported:
    """The prices in these CSV or Parquet files, plain or gzipped; later files win on the same symbol and date.

    Header names count in any case and by their common aliases; a file without a symbol column is taken for one
    symbol, named by the file. Where an adjusted close is given, prices are adjusted by adjusted close over close,
    and volume for splits alone. Raises PricesError, which names the file (never its directory), when one is missing,
    empty, cut off, not text, or lacks a column.
    """
    if not paths:
        raise PricesError("There is no file to import; name one or more CSV or Parquet files.")
    taken: list[pl.DataFrame] = []
    rejected: list[Rejected] = []
    counts: Counter[str] = Counter()
    rows = 0
    for path in paths:
        checked = _check_rows(_read_columns(path))
        if checked.is_empty():
            raise PricesError(f"The file {path.name} has a header but no rows.")
        rows += checked.height
        wrong = checked.filter(col("reason").is_not_null())
        counts.update({reason: int(count) for reason, count in wrong.group_by("reason").len().iter_rows()})
        rejected += _tell(path, wrong.head(MAX_REJECTED - len(rejected)))
        taken.append(adjust(checked.filter(col("reason").is_null())).select(COLUMNS))
    merged = pl.concat(taken)
    if merged.is_empty():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common(3))
        raise PricesError(f"Not one row could be taken: {reasons}.")
    frame = merged.unique(["symbol", "date"], keep="last", maintain_order=True) if len(taken) > 1 else merged
    return Imported(
        frame=frame.sort("symbol", "date"),
        rows=rows,
        replaced=merged.height - frame.height,
        rejected=tuple(rejected),
        counts=dict(sorted(counts.items(), key=lambda counted: (-counted[1], counted[0]))),
    )


def adjust(frame: pl.DataFrame) -> pl.DataFrame:
    """Prices as if every split and dividend had been there from the start, by the column `adj_close`, if there is one.

    Volume is multiplied by the splits that came later: a split shows as a step of adj_close / close by SPLIT_STEP or
    more against the day before. Sorted by symbol and date; volume is a whole number.
    """
    whole = col("volume").round().cast(pl.Int64)
    frame = frame.sort("symbol", "date")
    if "adj_close" not in frame.columns:
        return frame.with_columns(whole)
    ratio = (col("adj_close") / col("close")).alias("ratio")
    step = col("ratio") / col("ratio").shift(1).over("symbol")
    is_split = (step >= SPLIT_STEP) | (step <= 1 / SPLIT_STEP)
    # With a small dividend on the same day the step is near a ratio of small numbers, such as 2, 3/2 or 1/10.
    ratio_of_small = pl.when(step >= 1).then((step * 12).round() / 12).otherwise(12 / (12 / step).round())
    split = pl.when((ratio_of_small / step - 1).abs() < 0.01).then(ratio_of_small).otherwise(step)
    return (
        frame.with_columns(ratio)
        .with_columns(pl.when(is_split).then(split).otherwise(1.0).alias("split"))
        .with_columns(later=col("split").shift(-1, fill_value=1.0).cum_prod(reverse=True).over("symbol"))
        .with_columns(*(col(price) * col("ratio") for price in PRICES), volume=col("volume") * col("later"))
        .with_columns(whole)
        .drop("ratio", "split", "later", "adj_close")
    )


def _tell(path: Path, wrong: pl.DataFrame) -> Iterable[Rejected]:
    for row in wrong.select("row", "symbol", "written", "reason").iter_rows(named=True):
        yield Rejected(file=path.name, row=row["row"], symbol=row["symbol"], date=row["written"], reason=row["reason"])


def _read_columns(path: Path) -> pl.DataFrame:
    """The known columns of a file under their own names, not yet converted."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise PricesError(f"There is no file {path.name}.") from None
    except IsADirectoryError:
        raise PricesError(f"{path.name or path} is a directory; name the files that are to be imported.") from None
    except OSError as error:
        raise PricesError(f"The file {path.name} cannot be read: {error.strerror or 'the disk failed'}.") from None
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error):
            raise PricesError(f"The file {path.name} is damaged or cut off: it does not unpack as gzip.") from None
    if not content.strip():
        raise PricesError(f"The file {path.name} is empty.")
    raw = _read_parquet(path, content) if content[:4] == b"PAR1" else _read_csv(path, content)
    chosen = _choose_columns(path, raw.columns)
    frame = raw.select(col(header).alias(name) for name, header in chosen.items())
    if "symbol" not in chosen:
        frame = frame.with_columns(symbol=pl.lit(path.name.partition(".")[0]))
    return frame.with_row_index("row", offset=1)


def _read_parquet(path: Path, content: bytes) -> pl.DataFrame:
    try:
        return pl.read_parquet(BytesIO(content))
    except (pl.exceptions.PolarsError, OSError, pl.exceptions.PanicException):
        raise PricesError(f"The file {path.name} is damaged or cut off: it cannot be read as Parquet.") from None


def _read_csv(path: Path, content: bytes) -> pl.DataFrame:
    content = content.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n")
    if b"\0" in content[:4096]:
        raise PricesError(f"The file {path.name} is neither text nor Parquet; CSV and Parquet can be imported.")
    header = content.partition(b"\n")[0]
    separator = max(",;\t|", key=lambda mark: header.count(mark.encode()))
    try:
        return pl.read_csv(BytesIO(content), separator=separator, infer_schema=False, truncate_ragged_lines=True)
    except pl.exceptions.PolarsError:
        raise PricesError(f"The file {path.name} cannot be read as CSV text in UTF-8.") from None


def _choose_columns(path: Path, headers: Sequence[str]) -> dict[str, str]:
    plain = {re.sub(r"[^a-z0-9]", "", header.lower()): header for header in reversed(headers)}
    chosen = {
        name: next((plain[alias] for alias in aliases if alias in plain), None) for name, aliases in _ALIASES.items()
    }
    for name in ("date", *_NUMBERS):
        if chosen[name] is None:
            saw = ", ".join(header[:40] for header in headers[:20])
            raise PricesError(f"The file {path.name} has no column {name!r}; its headers are: {saw}.")
    return {name: header for name, header in chosen.items() if header is not None}


def _check_rows(raw: pl.DataFrame) -> pl.DataFrame:
    """The rows converted, with a column `reason`: null for a row to take."""
    numbers = [name for name in (*_NUMBERS, "adj_close") if name in raw.columns]
    frame = raw.with_columns(
        col("symbol").cast(pl.String).str.strip_chars().str.to_uppercase(),
        _read_dates(raw["date"]),
        col("date").cast(pl.String).alias("written"),
        *(_read_numbers(raw[name]) for name in numbers),
        *(_is_given(raw[name]).alias(f"given {name}") for name in numbers),
    )
    unreadable = pl.any_horizontal(col(name).is_null() & col(f"given {name}") for name in numbers)
    reasons = {
        "without a symbol": col("symbol").is_null() | (col("symbol") == ""),
        "whose symbol is not one, such as AAPL or BRK.B": ~col("symbol").str.contains(_SYMBOL),
        "without a date that can be read": col("date").is_null(),
        "whose date is before 1900 or after 2199": ~col("date").is_between(_FIRST_DAY, _LAST_DAY),
        "with something that is not a number": unreadable,
        **BAD_ROWS,
    }
    if "adj_close" in numbers:
        is_usable = (col("adj_close").is_finite() & (col("adj_close") > 0)).fill_null(False)
        reasons["whose adjusted close is not a positive number"] = ~is_usable
    checked = frame.with_columns(_first_reason(reasons))
    good = col("reason").is_null()
    is_again = good & (col("row") != col("row").filter(good).min().over("symbol", "date"))
    again = pl.lit("that repeats the symbol and date of an earlier row")
    return checked.with_columns(pl.when(is_again).then(again).otherwise("reason").alias("reason"))


def _first_reason(reasons: Mapping[str, pl.Expr]) -> pl.Expr:
    reason: pl.Expr = pl.lit(None, pl.String)
    for text, applies in reversed(list(reasons.items())):
        reason = pl.when(applies).then(pl.lit(text)).otherwise(reason)
    return reason.alias("reason")


def _is_given(values: pl.Series) -> pl.Series:
    if values.dtype == pl.String:
        return values.is_not_null() & ~values.str.strip_chars().str.to_lowercase().is_in(_NOT_GIVEN)
    return values.is_not_null()


def _read_numbers(values: pl.Series) -> pl.Series:
    """As Float64, null where it is no number; `1,234.5` and `$5` are read as well."""
    numbers = values.cast(pl.Float64, strict=False)
    if values.dtype == pl.String and numbers.null_count() > values.null_count():
        again = values.str.replace_all(r"[$,\s]", "").cast(pl.Float64, strict=False)
        numbers = numbers.zip_with(numbers.is_not_null(), again)
    return numbers


def _read_dates(values: pl.Series) -> pl.Series:
    """As dates in the one format that reads the most of them, null elsewhere; a time of day is cut off."""
    if values.dtype.is_temporal():
        return values.cast(pl.Date, strict=False)
    texts = values.cast(pl.String).str.strip_chars()
    best = texts.str.slice(0, 10).str.to_date(_DATE_FORMATS[0], strict=False)
    for form in _DATE_FORMATS[1:]:
        if best.null_count() == texts.null_count():
            break
        cut = texts.str.slice(0, 10) if form == "%Y/%m/%d" else texts
        read = cut.str.to_date(form, strict=False)
        best = read if read.null_count() < best.null_count() else best
    return best
