"""What can be known of one day of one symbol: every feature as an expression over prices and other features.

A feature has a name, so that rules, `where` filters and other features speak of it without knowing how it is made.
`name[k]` is its value k rows earlier in the same symbol: `close[1]` is yesterday's close. A feature that is not
defined on a row (too little history, a zero denominator) is null there, and a rule on null does not hold.

Two habits keep one symbol out of the next one's values. A shift is masked by the row's number within its symbol, and
a mean over n rows is made of doubled partial sums, where a running sum would carry its rounding error onwards: so a
value depends on its own n rows and on nothing else, to the last bit, however the table is cut into chunks.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

import polars as pl

BASE_COLUMNS = ("symbol", "date", "open", "high", "low", "close", "volume")
MAX_LAG = 250  # rows
DAYS_APART = 1_000_000  # between two symbols on the axis `#day`: more than any date or window can bridge

_LAGGED = re.compile(r"(.+)\[(\d{1,4})\]")
_WINDOWED = re.compile(r"(abs_low|abs_high|pos_abs)_(\d{1,5})_(\d{1,5})")
_PARTIAL = re.compile(r"#sum(2|4|8|16) (.+)")


@dataclass(frozen=True, slots=True)
class Feature:
    """One named feature: how it is made, its unit, and what it means in one line."""

    expr: pl.Expr
    unit: str
    meaning: str
    back: int = 0  # rows before this one that the expression itself looks at
    runs: bool = False  # it looks at every row before this one, or at a window of days


def col(name: str, lag: int = 0) -> pl.Expr:
    """The column `name`, or its value `lag` rows earlier."""
    return pl.col(f"{name}[{lag}]" if lag else name)


def _per(value: pl.Expr, unit: pl.Expr) -> pl.Expr:
    """value / unit, and null where the unit is zero."""
    return value / pl.when(unit != 0).then(unit)


def _per_atr(value: pl.Expr) -> pl.Expr:
    return _per(value, col("atr"))


def _sum(name: str, rows: int, lag: int = 0) -> pl.Expr:
    """The sum over `rows` rows, the last of them `lag` rows ago; null where there are fewer.

    It adds the partial sums `#sum2 name`, `#sum4 name` ... that the bits of `rows` ask for.
    """
    total, taken = None, 0
    for width in (16, 8, 4, 2, 1):
        if rows & width:
            piece = pl.col(f"#sum{width} {name}" if width > 1 else name).shift(lag + taken)
            total = piece if total is None else total + piece
            taken += width
    return pl.when(pl.col("#row") >= rows - 1 + lag).then(total)


def _partial_sum(width: int, name: str) -> pl.Expr:
    """The sum over `width` rows, a power of two. On a symbol's first rows it is nonsense, which `_sum` masks."""
    half = pl.col(f"#sum{width // 2} {name}" if width > 2 else name)
    return half + half.shift(width // 2)


def _summed(name: str, rows: int, lag: int, unit: str, meaning: str) -> Feature:
    return Feature(_sum(name, rows, lag), unit, meaning, back=rows + lag)


def _meaned(name: str, rows: int, lag: int, unit: str, meaning: str) -> Feature:
    return Feature(_sum(name, rows, lag) / rows, unit, meaning, back=rows + lag)


def _ema(rows: int) -> pl.Expr:
    return col("close").ewm_mean(alpha=2 / (rows + 1), adjust=False).over("#symbol")


def _highest(rows: int, at_least: int = 1) -> pl.Expr:
    return col("high").rolling_max(rows, min_samples=at_least).over("#symbol")


def _lowest(rows: int, at_least: int = 1) -> pl.Expr:
    return col("low").rolling_min(rows, min_samples=at_least).over("#symbol")


def _low_pct(rows: int) -> pl.Expr:
    return _per_atr((col("close") - col(f"low{rows}")) / col(f"low{rows}")) * 100


def _slope(rows: int) -> pl.Expr:
    return (col("ema9") / col("ema9", rows) - 1) * 100


def _abs_window(expr: pl.Expr, lookback_days: int, exclude_days: int) -> pl.Expr:
    """Over the rows dated in (D0 - exclude - lookback, D0 - exclude], in calendar days."""
    return expr.rolling(
        index_column="#day",
        period=f"{lookback_days}i",
        offset=f"-{lookback_days + exclude_days}i",
        closed="right",
    )


def _windowed(kind: str, lookback_days: int, exclude_days: int) -> pl.Expr:
    if kind == "abs_low":
        return _abs_window(col("low").min(), lookback_days, exclude_days)
    if kind == "abs_high":
        return _abs_window(col("high").max(), lookback_days, exclude_days)
    low, high = (col(f"{bound}_{lookback_days}_{exclude_days}") for bound in ("abs_low", "abs_high"))
    return pl.when(high > low).then(((col("close", 1) - low) / (high - low)).clip(0, 1))


def _points(value: pl.Expr, *steps: tuple[float, float]) -> pl.Expr:
    """The points of the highest bound that the value reaches, else 0. Steps rise; so do their points."""
    before = 0.0
    total: pl.Expr = pl.lit(0.0)
    for bound, points in steps:
        total = total + (value >= bound) * (points - before)
        before = points
    return total


def _rising(lag: int) -> pl.Expr:
    """The day `lag` rows ago closed above the day before it and above its own open, with a higher high."""
    highest_bar = pl.max_horizontal(col("close", lag + 1), col("open", lag))
    return (col("close", lag) > highest_bar) & (col("high", lag) > col("high", lag + 1))


def _score() -> pl.Expr:
    atr, gap = col("atr"), (col("open", 1) - col("close", 2)) / col("atr")
    up1, up2 = _rising(1), _rising(2)
    is_expanding = (col("range", 1) > col("range", 2)) & ((col("high", 2) - col("open", 2)) / atr >= 0.5)
    is_gapped = gap >= 0.3
    burst = (
        pl.when(up1 & up2)
        .then(15 + is_expanding * 2.5 + (is_expanding & is_gapped) * 2.5)
        .otherwise(10 + ((up1 | up2) & is_expanding & is_gapped) * 2.5)
    )
    # "The same a day earlier" is the gap of D-2 in yesterday's ATR; on the first row that has an ATR there is none.
    earlier = _per(col("open", 2) - col("close", 3), col("atr", 1))
    gapped_twice = is_gapped & (earlier >= 0.3).fill_null(False)
    total = (
        _points((col("high", 1) - col("open", 1)) / atr, (0.5, 12), (1, 15), (2, 18), (3, 20))
        + _points((col("high", 1) - col("ema9", 1)) / atr, (1, 15), (2, 20), (3, 25), (4, 30))
        + burst
        + _points(col("volume", 1) / col("volavg5"), (0.5, 2), (1, 5), (1.5, 8), (2, 10))
        + _points(gap, (0.1, 5), (0.3, 10), (0.5, 15))
        + gapped_twice * 5.0
    )
    return pl.when(atr > 0).then(total)


_TR = pl.max_horizontal(
    col("range"), (col("high") - col("prev_close")).abs(), (col("low") - col("prev_close")).abs()
)  # on a symbol's first row the null terms fall away, and the range is left

FEATURES: dict[str, Feature] = {
    "prev_close": Feature(col("close", 1), "price", "yesterday's close"),
    "range": Feature(col("high") - col("low"), "price", "high minus low"),
    "tr": Feature(_TR, "price", "true range: yesterday's close counts"),
    "atr_raw": _meaned("tr", 14, 0, "price", "mean true range of 14 rows, today included"),
    "atr": _meaned("tr", 14, 1, "price", "mean true range of the 14 rows before today"),
    "ema9": Feature(_ema(9), "price", "exponential mean of the close over 9 rows, today included", runs=True),
    "ema20": Feature(_ema(20), "price", "exponential mean of the close over 20 rows, today included", runs=True),
    "ema50": Feature(_ema(50), "price", "exponential mean of the close over 50 rows, today included", runs=True),
    "volavg5": _meaned("volume", 5, 1, "shares", "mean volume of the 5 rows before today"),
    "volavg14": _meaned("volume", 14, 1, "shares", "mean volume of the 14 rows before today"),
    "dollar_volume": Feature(col("close") * col("volume"), "USD", "close times volume"),
    "dollar_volume5": _summed("dollar_volume", 5, 1, "USD", "dollar_volume summed over the 5 rows before today"),
    "adv20_usd": _meaned("dollar_volume", 20, 1, "USD", "mean dollar_volume of the 20 rows before today"),
    "slope3": Feature(_slope(3), "%", "rise of ema9 over 3 rows"),
    "slope5": Feature(_slope(5), "%", "rise of ema9 over 5 rows"),
    "slope15": Feature(_slope(15), "%", "rise of ema9 over 15 rows"),
    "gap_pct": Feature(
        col("open") / col("prev_close") - 1, "ratio", "open over yesterday's close, minus 1: 0.05 is 5 %"
    ),
    "change_pct": Feature(col("close") / col("prev_close") - 1, "ratio", "close over yesterday's close, minus 1"),
    "high_pct": Feature(col("high") / col("prev_close") - 1, "ratio", "high over yesterday's close, minus 1"),
    "gap_atr": Feature(col("open_gap_atr").abs(), "ATR", "distance of the open from yesterday's close, up or down"),
    "open_gap_atr": Feature(_per_atr(col("open") - col("prev_close")), "ATR", "open minus yesterday's close, signed"),
    "open_over_ema9": Feature(col("open") / col("ema9"), "ratio", "open over ema9"),
    "body_atr": Feature(_per_atr(col("close") - col("open")), "ATR", "close minus open"),
    "high_change_atr": Feature(_per_atr(col("high") - col("open")), "ATR", "high minus open"),
    "high_over_ema9_atr": Feature(_per_atr(col("high") - col("ema9")), "ATR", "high minus ema9"),
    "high_over_ema20_atr": Feature(_per_atr(col("high") - col("ema20")), "ATR", "high minus ema20"),
    "low_over_ema9_atr": Feature(_per_atr(col("low") - col("ema9")), "ATR", "low minus ema9"),
    "low7": Feature(_lowest(7, 7), "price", "lowest low of 7 rows, today included", runs=True),
    "low14": Feature(_lowest(14, 14), "price", "lowest low of 14 rows, today included", runs=True),
    "low_pct7": Feature(_low_pct(7), "% per ATR", "rise of the close above low7"),
    "low_pct14": Feature(_low_pct(14), "% per ATR", "rise of the close above low14"),
    "move2_atr": Feature(_per_atr(col("close", 1) - col("close", 3)), "ATR", "rise of the close from D-3 to D-1"),
    "move3_atr": Feature(_per_atr(col("close", 1) - col("close", 4)), "ATR", "rise of the close from D-4 to D-1"),
    "atr_change_pct": Feature((_per(col("atr"), col("atr", 1)) - 1) * 100, "%", "rise of atr since yesterday"),
    "abs_low": Feature(col("abs_low_1000_10"), "price", "lowest low of 1000 days up to 10 days ago (calendar days)"),
    "abs_high": Feature(col("abs_high_1000_10"), "price", "highest high of 1000 days up to 10 days ago"),
    "pos_abs": Feature(col("pos_abs_1000_10"), "0..1", "where yesterday's close lies between abs_low and abs_high"),
    "vol_ratio": Feature(_per(col("volume"), col("volavg14")), "ratio", "volume over volavg14"),
    "close_range": Feature(_per(col("close") - col("low"), col("range")), "0..1", "where the close lies in the day"),
    "range_atr": Feature(_per_atr(col("tr")), "ATR", "true range"),
    "high5": Feature(_highest(5), "price", "highest high of 5 rows, today included; fewer at the start", runs=True),
    "high20": Feature(_highest(20), "price", "highest high of 20 rows, today included; fewer at the start", runs=True),
    "low20": Feature(_lowest(20), "price", "lowest low of 20 rows, today included; fewer at the start", runs=True),
    "ext2": Feature(
        col("high5", 1) / col("low20", 1) - 1, "ratio", "yesterday's high5 over yesterday's low20, minus 1"
    ),
    "ext3": Feature(col("high") / col("low20") - 1, "ratio", "high over low20, minus 1"),
    "breakout1_atr": Feature(_per_atr(col("high") - col("high20", 1)), "ATR", "high minus yesterday's high20"),
    "breakout2_atr": Feature(_per_atr(col("high") - col("high20", 2)), "ATR", "high minus high20 of D-2"),
    "parabolic_score": Feature(_score(), "0..100", "how parabolic the push up to yesterday was"),
}

FEATURE_NAMES: dict[str, str] = {name: f"{made.meaning} [{made.unit}]" for name, made in FEATURES.items()}

_AXES = {
    "#symbol": Feature(pl.col("symbol").rle_id(), "", "the symbol's number in the frame", runs=True),
    "#row": Feature(pl.int_range(pl.len(), dtype=pl.Int32).over("#symbol"), "", "the row's number in it", runs=True),
    "#day": Feature(
        (pl.col("#symbol").cast(pl.Int64) * DAYS_APART + pl.col("date").cast(pl.Int32)).set_sorted(),
        "days",
        "one axis of days for all symbols",
        runs=True,
    ),
}


@lru_cache(maxsize=4096)
def find_feature(name: str) -> Feature | None:
    """What a name stands for, in terms of other names; None when no feature has it.

    Beside the names of FEATURES these are known: `name[k]`, and `pos_abs_<lookback>_<exclude>`, `abs_low_…`,
    `abs_high_…` over windows of other lengths in calendar days.
    """
    if named := _AXES.get(name) or FEATURES.get(name):
        return named
    if lagged := _LAGGED.fullmatch(name):
        lag = int(lagged[2])
        if not is_known(lagged[1]) or not 0 < lag <= MAX_LAG or _LAGGED.fullmatch(lagged[1]):
            return None
        return Feature(pl.when(pl.col("#row") >= lag).then(pl.col(lagged[1]).shift(lag)), "", "", back=lag)
    if window := _WINDOWED.fullmatch(name):
        kind, lookback_days, exclude_days = window[1], int(window[2]), int(window[3])
        if not lookback_days:
            return None
        return Feature(_windowed(kind, lookback_days, exclude_days), "", "", runs=kind != "pos_abs")
    if partial := _PARTIAL.fullmatch(name):
        return Feature(_partial_sum(int(partial[1]), partial[2]), "", "", back=int(partial[1]))
    return None


def is_known(name: str) -> bool:
    """True for a price column, a feature, and either of them some rows earlier."""
    return name in BASE_COLUMNS or (not name.startswith("#") and find_feature(name) is not None)


@lru_cache(maxsize=4096)
def _needs(name: str) -> tuple[str, ...]:
    """The names that a feature is directly made of. Raises KeyError when there is no such feature."""
    made = find_feature(name)
    if made is None:
        raise KeyError(f"There is no feature {name!r}.")
    return tuple(dict.fromkeys(made.expr.meta.root_names()))


def _layers(present: Collection[str], names: Iterable[str]) -> list[list[str]]:
    """The features to make, each in a layer after those that it needs."""
    level: dict[str, int] = dict.fromkeys(present, 0)

    def settle(name: str) -> int:
        if name not in level:
            level[name] = 1 + max(map(settle, _needs(name)), default=0)
        return level[name]

    for name in names:
        settle(name)
    layers: list[list[str]] = [[] for _ in range(max(level.values(), default=0))]
    for name, depth in level.items():
        if depth:
            layers[depth - 1].append(name)
    return layers


def _expr(name: str) -> pl.Expr:
    made = find_feature(name)
    assert made is not None  # _needs has raised
    return made.expr.alias(name)


def add_features(frame: pl.DataFrame, names: Iterable[str]) -> pl.DataFrame:
    """The frame with a column for each name, and for what these are made of; nothing else is computed.

    `frame` holds whole symbols, sorted by symbol and date, with the BASE_COLUMNS (prices and volume as Float64);
    rows and their order stay. Raises KeyError for a name that `is_known` does not know.
    """
    layers = _layers(frame.columns, names)
    if not layers:
        return frame
    lazy = frame.lazy()
    for layer in layers:
        lazy = lazy.with_columns(map(_expr, layer))
    kept = [name for layer in layers for name in layer if not _PARTIAL.fullmatch(name)]
    # One query for all layers: the parts they share are computed once. The streaming engine is slower on one thread.
    return lazy.select(*frame.columns, *kept).collect(engine="in-memory")


def add_features_at(frame: pl.DataFrame, wanted: pl.Series, names: Iterable[str]) -> pl.DataFrame:
    """The wanted rows alone, with the features named: the same values as `add_features` gives, for less work.

    What looks back a known number of rows is computed on the wanted rows and those just before them; only what
    needs all history is computed on the whole frame. `wanted` is a boolean for each row.
    """
    names = list(names)
    every = [name for layer in _layers(BASE_COLUMNS, names) for name in layer]
    running = [name for name in every if (made := find_feature(name)) and made.runs]
    frame = add_features(frame, ["#row", *running])
    back = max((_reach(name, frozenset(frame.columns)) for name in names), default=0)
    seen = wanted.cast(pl.Int32).cum_sum()
    is_near = seen.shift(-back, fill_value=seen.last()) > seen.shift(1, fill_value=0)
    near = frame.with_columns(wanted.alias("#wanted")).filter(is_near)
    return add_features(near, names).filter("#wanted").drop("#wanted")


@lru_cache(maxsize=4096)
def _reach(name: str, present: frozenset[str]) -> int:
    """How many rows back a feature looks, through all that it is made of."""
    if name in present:
        return 0
    made = find_feature(name)
    return (made.back if made else 0) + max((_reach(need, present) for need in _needs(name)), default=0)


def is_quick(expr: pl.Expr) -> bool:
    """True when the expression looks at its row and the one before it, and no further."""
    names = expr.meta.root_names()
    layers = _layers(BASE_COLUMNS, names)
    made = [find_feature(name) for layer in layers for name in layer if name not in _AXES]
    return not any(feature and feature.runs for feature in made) and all(
        _reach(name, frozenset(BASE_COLUMNS)) <= 1 for name in names
    )


def is_costly(expr: pl.Expr) -> bool:
    """True when the expression needs a window of days, which costs as much as all other features together."""
    return any("#day" in layer for layer in _layers(BASE_COLUMNS, expr.meta.root_names()))
