"""Prices to start with: a real sample that comes with a package, and a synthetic universe for load tests."""

from collections.abc import Iterator
from datetime import date, timedelta
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from polars import col
from polars.io.plugins import register_io_source

from app.core.errors import PricesError
from app.market.dirt import PRICES
from app.market.importers import adjust
from app.market.store import COLUMNS, SCHEMA, write_lazy, write_store

SAMPLE_SOURCE = (
    "bokeh_sampledata: AAPL, FB, GOOG, IBM and MSFT, 2000 to 2013, real daily prices; adjusted for splits and "
    "dividends, volume for splits"
)
TRADING_DAYS = 252  # in a year
PIECE_ROWS = 400_000  # made at once: about 100 MB

Matrix = npt.NDArray[np.float64]  # one row a symbol, one column a day


def make_sample(path: Path) -> None:
    """Write the real sample of five US symbols as a price file. Raises PricesError when it cannot be made."""
    try:
        with resources.as_file(resources.files("bokeh_sampledata") / "_data" / "stocks.csv.gz") as file:
            raw = pl.read_csv(file, try_parse_dates=True)
    except (OSError, ModuleNotFoundError, pl.exceptions.PolarsError):
        raise PricesError(
            "The sample prices of bokeh_sampledata are not there; run `pip install bokeh_sampledata`."
        ) from None
    names = {name.title(): name for name in COLUMNS if name != "symbol"}
    frame = raw.rename(names | {"Ticker": "symbol", "Adj Close": "adj_close"}).with_columns(
        col(*PRICES, "volume", "adj_close").cast(pl.Float64)
    )
    write_store(adjust(frame), path, source=SAMPLE_SOURCE, is_synthetic=False)


def make_synthetic(path: Path, *, symbols: int, days: int, seed: int = 1, last: date = date(2025, 12, 31)) -> None:
    """Write invented prices: `symbols` symbols over `days` weekdays up to `last`; the same for the same arguments.

    Prices wander, jump in gaps, surge in volume and now and then run away in parabolic pushes, so that every setup
    finds something in a large table. The file says that it is synthetic. Memory is bounded by PIECE_ROWS.
    """
    if not 1 <= symbols <= 100_000 or not 1 <= days <= 20_000:
        raise PricesError("A synthetic table has 1 to 100,000 symbols and 1 to 20,000 days.")
    calendar = _weekdays(days, last)
    per_piece = max(1, PIECE_ROWS // days)

    def pieces(
        with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        for first in range(0, symbols, per_piece):
            piece = _make_piece(range(first, min(first + per_piece, symbols)), calendar, seed)
            yield piece.select(with_columns) if with_columns else piece

    schema = pl.Schema({**SCHEMA, **dict.fromkeys(PRICES, pl.Float32()), "volume": pl.Int64()})
    source = f"synthetic: {symbols} invented symbols, {days} days, seed {seed}"
    write_lazy(register_io_source(pieces, schema=schema, is_pure=True), path, source=source, is_synthetic=True)


def _weekdays(days: int, last: date) -> pl.Series:
    first = last - timedelta(days=days * 7 // 5 + 7)
    every = pl.date_range(first, last, eager=True)
    return every.filter(every.dt.weekday() <= 5).tail(days)


def _make_piece(numbers: range, calendar: pl.Series, seed: int) -> pl.DataFrame:
    """The rows of some symbols. Each piece has its own random numbers, by seed and first symbol."""
    random = np.random.default_rng([seed, numbers.start])
    shape = (len(numbers), len(calendar))
    wildness = random.lognormal(np.log(0.018), 0.45, (shape[0], 1))  # a normal day's move
    heat = _heat(random, shape)
    gaps = random.standard_normal(shape) * wildness * 0.4 + heat * 0.6
    news = random.random(shape) < 0.008
    gaps += news * random.normal(0.02, 0.07, shape)
    moves = random.standard_t(4, shape) * wildness * 0.6 + heat
    start = random.lognormal(np.log(25), 1.0, (shape[0], 1))
    close = start * np.exp(np.cumsum(np.clip(gaps + moves, -0.5, 0.5) - wildness**2 / 2, axis=1))
    close = np.clip(close, 0.5, 20_000)
    open_ = np.clip(close * np.exp(-np.clip(moves, -0.5, 0.5)), 0.5, 20_000)
    reach = np.abs(random.standard_normal((2, *shape))) * wildness * 0.5
    high = np.maximum(open_, close) * (1 + reach[0])
    low = np.minimum(open_, close) * (1 - np.clip(reach[1], 0, 0.5))
    trade = random.lognormal(np.log(2e6), 1.4, (shape[0], 1))
    excitement = 1 + 12 * np.abs(moves + gaps) + news * random.exponential(2.5, shape) + heat * 25
    volume = trade * random.lognormal(0, 0.35, shape) * excitement
    columns = {name: _flat(value, 2) for name, value in zip(PRICES, (open_, high, low, close), strict=True)}
    return pl.DataFrame(
        {
            "symbol": np.repeat([f"SYN{number:05d}" for number in numbers], shape[1]),
            "date": pl.concat([calendar] * shape[0]),
            **columns,
            "volume": np.maximum(volume.reshape(-1), 1).astype(np.int64),
        }
    ).select(COLUMNS)


def _heat(random: np.random.Generator, shape: tuple[int, int]) -> Matrix:
    """The extra daily rise of parabolic pushes: now and then a symbol runs away for some days, and falls back."""
    heat = np.zeros(shape)
    starts = np.argwhere(random.random(shape) < 0.0012)
    lengths = random.integers(3, 9, len(starts))
    rises = random.exponential(0.07, len(starts))
    for (symbol, day), length, rise in zip(starts, lengths, rises, strict=True):
        run = heat[symbol, day : day + length]
        run += rise * np.linspace(0.5, 1.5, length)[: len(run)]
        back = heat[symbol, day + length : day + 3 * length]
        back -= rise * 0.45
    return heat


def _flat(values: Matrix, decimals: int) -> npt.NDArray[np.float32]:
    return np.round(values.reshape(-1), decimals).astype(np.float32)
