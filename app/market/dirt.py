"""Rows that cannot be believed, and why: what every reader of prices leaves out and reports."""

import polars as pl

from app.core.scan import Skipped

PRICES = ("open", "high", "low", "close")
NOISE = 1e-6  # relative; prices kept as Float32, or adjusted in it, differ by some 1e-7 from what was quoted

_GIVEN = pl.col(*PRICES).is_not_null() & pl.col(*PRICES).is_not_nan()
_CEILING, _FLOOR = pl.col("high") * (1 + NOISE), pl.col("low") * (1 - NOISE)

# Why a row cannot be believed, to be read after "3 rows". Each is true or false on every row.
BAD_ROWS: dict[str, pl.Expr] = {
    "without a price": ~pl.all_horizontal(_GIVEN),
    "whose price is not a positive number": pl.any_horizontal(
        (pl.col(*PRICES) <= 0) | pl.col(*PRICES).is_infinite()
    ).fill_null(False),
    "whose high or low contradicts open or close": (
        (pl.max_horizontal("open", "close") > _CEILING) | (pl.min_horizontal("open", "close") < _FLOOR)
    ).fill_null(False),
    "without a volume": pl.col("volume").is_null() | pl.col("volume").is_nan() | (pl.col("volume") == 0),
    "whose volume is not a positive number": ((pl.col("volume") < 0) | pl.col("volume").is_infinite()).fill_null(False),
}

# The same in one quick test for all reasons; a missing or endless value makes the sum missing or endless.
_IS_GOOD = pl.all_horizontal(
    pl.sum_horizontal(*PRICES, "volume", ignore_nulls=False).is_finite(),
    pl.col("low", "volume") > 0,
    pl.col("open", "close") <= _CEILING,
    pl.col("open", "close") >= _FLOOR,
).fill_null(False)


def drop_bad_rows(frame: pl.DataFrame) -> tuple[pl.DataFrame, list[Skipped]]:
    """The rows that can be believed, and one Skipped per symbol and reason for the others."""
    is_good = frame.select(_IS_GOOD).to_series()
    if is_good.all():
        return frame, []
    counts = (
        frame.filter(~is_good)
        .group_by("symbol", maintain_order=True)
        .agg(expr.sum().alias(reason) for reason, expr in BAD_ROWS.items())
    )
    skipped = [
        Skipped(symbol=counted["symbol"], reason=f"{counted[reason]} row{'s' * (counted[reason] > 1)} {reason}")
        for counted in counts.iter_rows(named=True)
        for reason in BAD_ROWS
        if counted[reason]
    ]
    return frame.filter(is_good), skipped
