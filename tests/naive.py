"""Every setup once more, in plain lists and loops, written from the formulas alone: what the fast code must agree with.

Nothing here is meant to be fast, and nothing is taken from `app.market.features`. A comparison that is decided by
less than CLOSE is noted: the two may differ there, since they add up in another order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, timedelta
from typing import Any, NamedTuple

CLOSE = 1e-9  # relative

Row = dict[str, Any]


class Bar(NamedTuple):
    symbol: str
    date: date
    open: float
    high: float
    low: float
    close: float
    volume: float


class UndefinedError(Exception):
    """A value that does not exist: too little history, or a zero below the line."""


class Found(NamedTuple):
    rows: dict[tuple[str, str], Row]  # by symbol and date
    undecided: set[tuple[str, str]]  # days where a rule hangs on the last bits
    undecided_scores: set[tuple[str, str]]


def divide(above: float, below: float) -> float:
    if below == 0:
        raise UndefinedError
    return above / below


class History:
    """All days of one symbol; every method takes the index of the day judged."""

    def __init__(self, bars: Sequence[Bar]) -> None:
        self.bars = bars
        self.is_close = False  # some comparison since it was last cleared hung on the last bits
        self.true_ranges = [self._true_range(i) for i in range(len(bars))]
        self.emas = {rows: self._ema(rows) for rows in (9, 20, 50)}

    def _true_range(self, i: int) -> float:
        bar = self.bars[i]
        if i == 0:
            return bar.high - bar.low
        before = self.bars[i - 1].close
        return max(bar.high - bar.low, abs(bar.high - before), abs(bar.low - before))

    def _ema(self, rows: int) -> list[float]:
        alpha = 2 / (rows + 1)
        values: list[float] = []
        for bar in self.bars:
            values.append(bar.close if not values else alpha * bar.close + (1 - alpha) * values[-1])
        return values

    def reaches(self, value: float, bound: float) -> bool:
        """value >= bound."""
        if abs(value - bound) <= CLOSE * max(1.0, abs(bound)):
            self.is_close = True
        return value >= bound

    def exceeds(self, value: float, bound: float) -> bool:
        """value > bound."""
        if abs(value - bound) <= CLOSE * max(1.0, abs(bound)) and value != bound:
            self.is_close = True
        return value > bound

    def bar(self, i: int) -> Bar:
        if i < 0:
            raise UndefinedError
        return self.bars[i]

    def mean(self, values: Callable[[int], float], last: int, rows: int) -> float:
        if last - rows + 1 < 0:
            raise UndefinedError
        return sum(values(k) for k in range(last - rows + 1, last + 1)) / rows

    def true_range(self, i: int) -> float:
        if i < 0:
            raise UndefinedError
        return self.true_ranges[i]

    def ema(self, i: int, rows: int) -> float:
        if i < 0:
            raise UndefinedError
        return self.emas[rows][i]

    def atr_raw(self, i: int) -> float:
        return self.mean(self.true_range, i, 14)

    def atr(self, i: int) -> float:
        return self.atr_raw(i - 1)

    def volavg(self, i: int, rows: int = 14) -> float:
        return self.mean(lambda k: self.bars[k].volume, i - 1, rows)

    def dollars(self, i: int) -> float:
        return self.bar(i).close * self.bar(i).volume

    def adv20(self, i: int) -> float:
        return self.mean(self.dollars, i - 1, 20)

    def slope(self, i: int, rows: int) -> float:
        return (self.ema(i, 9) / self.ema(i - rows, 9) - 1) * 100

    def gap_pct(self, i: int) -> float:
        return self.bar(i).open / self.bar(i - 1).close - 1

    def signed_gap_atr(self, i: int) -> float:
        return divide(self.bar(i).open - self.bar(i - 1).close, self.atr(i))

    def over_ema(self, i: int, price: float, rows: int) -> float:
        return divide(price - self.ema(i, rows), self.atr(i))

    def high_over_ema(self, i: int, rows: int) -> float:
        return self.over_ema(i, self.bar(i).high, rows)

    def body_atr(self, i: int) -> float:
        return divide(self.bar(i).close - self.bar(i).open, self.atr(i))

    def range_atr(self, i: int) -> float:
        return divide(self.true_range(i), self.atr(i))

    def vol_ratio(self, i: int) -> float:
        return divide(self.bar(i).volume, self.volavg(i))

    def close_range(self, i: int) -> float:
        bar = self.bar(i)
        return divide(bar.close - bar.low, bar.high - bar.low)

    def low_pct(self, i: int, rows: int) -> float:
        if i - rows + 1 < 0:
            raise UndefinedError
        lowest = min(bar.low for bar in self.bars[i - rows + 1 : i + 1])
        return divide((self.bar(i).close - lowest) / lowest, self.atr(i)) * 100

    def move(self, i: int, rows: int) -> float:
        return divide(self.bar(i - 1).close - self.bar(i - 1 - rows).close, self.atr(i))

    def atr_change(self, i: int) -> float:
        return (divide(self.atr_raw(i - 1), self.atr_raw(i - 2)) - 1) * 100

    def pos_abs(self, i: int, lookback_days: int, exclude_days: int) -> float:
        last = self.bar(i).date - timedelta(days=exclude_days)
        first = last - timedelta(days=lookback_days)
        window = [bar for bar in self.bars if first < bar.date <= last]
        if not window:
            raise UndefinedError
        low, high = min(bar.low for bar in window), max(bar.high for bar in window)
        if high <= low:
            raise UndefinedError
        return min(1.0, max(0.0, (self.bar(i - 1).close - low) / (high - low)))

    def highest(self, i: int, rows: int) -> float:
        self.bar(i)
        return max(bar.high for bar in self.bars[max(0, i - rows + 1) : i + 1])

    def lowest(self, i: int, rows: int) -> float:
        self.bar(i)
        return min(bar.low for bar in self.bars[max(0, i - rows + 1) : i + 1])

    def score(self, i: int) -> float:
        atr = self.atr(i)
        if atr == 0:
            raise UndefinedError
        d1, d2, d3 = self.bar(i - 1), self.bar(i - 2), self.bar(i - 3)

        def grade(value: float, *steps: tuple[float, float]) -> float:
            return next((points for bound, points in steps if self.reaches(value, bound)), 0.0)

        def is_up(day: Bar, before: Bar) -> bool:
            return day.close > before.close and day.close > day.open and day.high > before.high

        total = grade((d1.high - d1.open) / atr, (3, 20), (2, 18), (1, 15), (0.5, 12))
        total += grade((d1.high - self.ema(i - 1, 9)) / atr, (4, 30), (3, 25), (2, 20), (1, 15))
        streak = is_up(d1, d2) + is_up(d2, d3)
        expanding = self.exceeds(d1.high - d1.low, d2.high - d2.low) and self.reaches((d2.high - d2.open) / atr, 0.5)
        gap = (d1.open - d2.close) / atr
        gapped = self.reaches(gap, 0.3)
        if streak == 2:
            total += 20 if expanding and gapped else 17.5 if expanding else 15
        else:
            total += 12.5 if streak == 1 and expanding and gapped else 10
        total += grade(divide(d1.volume, self.volavg(i, 5)), (2, 10), (1.5, 8), (1, 5), (0.5, 2))
        total += grade(gap, (0.5, 15), (0.3, 10), (0.1, 5))
        try:
            earlier = divide(d2.open - d3.close, self.atr(i - 1))
        except UndefinedError:
            return total
        return total + (5 if gapped and self.reaches(earlier, 0.3) else 0)


def liquid_rules(h: History, i: int, p: Any) -> Iterator[bool]:
    yield h.reaches(h.bar(i).volume, p.volume_min)
    yield h.reaches(h.bar(i - 1).close, p.prev_close_min)
    yield h.reaches(h.bar(i).high - h.bar(i).low, p.range_min)


def gap_up(h: History, i: int, p: Any) -> Iterator[bool]:
    yield from liquid_rules(h, i, p)
    yield h.reaches(h.gap_pct(i), p.gap_pct_min)
    yield h.reaches(-h.gap_pct(i), -p.gap_pct_max)
    yield h.reaches(h.signed_gap_atr(i), p.gap_atr_min)
    yield h.reaches(h.vol_ratio(i), p.vol_ratio_min)
    yield h.reaches(h.close_range(i), p.close_range_min)
    yield h.reaches(h.adv20(i), p.adv20_min_usd)


def momentum_breakout(h: History, i: int, p: Any) -> Iterator[bool]:
    yield from liquid_rules(h, i, p)
    yield h.reaches(h.slope(i, 5), p.slope5_min)
    yield h.reaches(h.slope(i, 15), p.slope15_min)
    yield h.reaches(h.high_over_ema(i, 9), p.high_over_ema9_atr_min)
    yield h.reaches(h.range_atr(i), p.range_atr_min)
    yield h.reaches(h.vol_ratio(i), p.vol_ratio_min)
    yield h.reaches(h.close_range(i), p.close_range_min)
    yield not p.require_open_above_ema9 or h.exceeds(h.bar(i).open, h.ema(i, 9))
    yield h.reaches(h.adv20(i), p.adv20_min_usd)


def volume_surge(h: History, i: int, p: Any) -> Iterator[bool]:
    yield from liquid_rules(h, i, p)
    change = h.bar(i).close / h.bar(i - 1).close - 1
    yield h.reaches(change, p.change_pct_min)
    yield h.reaches(-change, -p.change_pct_max)
    yield h.reaches(h.vol_ratio(i), p.vol_ratio_min)
    yield h.reaches(-h.vol_ratio(i), -p.vol_ratio_max)
    yield h.reaches(h.range_atr(i), p.range_atr_min)
    yield h.reaches(h.close_range(i), p.close_range_min)
    yield h.reaches(h.adv20(i), p.adv20_min_usd)


def is_mold(h: History, i: int, p: Any) -> bool:
    try:
        return (
            h.reaches(h.bar(i - 1).close, p.price_min)
            and h.reaches(h.adv20(i), p.adv20_min_usd)
            and h.reaches(h.range_atr(i), p.atr_mult)
            and h.reaches(divide(max(h.bar(i).volume, h.bar(i - 1).volume), h.volavg(i)), p.vol_mult)
            and h.reaches(h.slope(i, 5), p.slope5d_min)
            and h.reaches(h.high_over_ema(i, 9), p.high_ema9_mult)
        )
    except UndefinedError:
        return False


def backside_b(h: History, i: int, p: Any) -> Iterator[bool]:
    d1, d2 = h.bar(i - 1), h.bar(i - 2)
    yield h.reaches(d2.close, p.price_min)
    yield h.reaches(d1.volume, p.d1_volume_min)
    yield not p.enforce_d1_above_d2 or (d1.high > d2.high and d1.close > d2.close)
    yield not p.require_open_gt_prev_high or h.bar(i).open > h.bar(i - p.prior_high_lag).high
    yield h.reaches(abs(h.signed_gap_atr(i)), p.gap_div_atr_min)
    yield h.reaches(h.bar(i).open / h.ema(i, 9), p.open_over_ema9_min)
    yield h.reaches(h.body_atr(i - 1), p.d1_green_atr_min)
    yield h.reaches(h.adv20(i - 1), p.adv20_min_usd)
    yield p.d1_vol_mult_min is None or h.reaches(h.vol_ratio(i - 1), p.d1_vol_mult_min)
    yield is_mold(h, i - 1, p) or (p.trigger_mode == "D1_or_D2" and is_mold(h, i - 2, p))
    yield h.reaches(-h.pos_abs(i, p.abs_lookback_days, p.abs_exclude_days), -p.pos_abs_max)


def a_plus(h: History, i: int, p: Any) -> Iterator[bool]:
    d1 = h.bar(i - 1)
    yield h.reaches(d1.close, p.prev_close_min)
    yield d1.close > p.prev_close_above
    yield h.reaches(h.slope(i, 3), p.slope3_min)
    yield h.reaches(h.slope(i, 5), p.slope5_min)
    yield h.reaches(h.slope(i, 15), p.slope15_min)
    yield h.reaches(divide(h.true_range(i - 1), h.atr(i)), p.d1_range_atr_min)
    yield h.reaches(h.vol_ratio(i), p.vol_ratio_min)
    yield h.reaches(divide(d1.volume, h.volavg(i)), p.d1_vol_ratio_min)
    yield h.reaches(h.high_over_ema(i, 9), p.high_over_ema9_atr_min)
    yield h.reaches(h.high_over_ema(i, 20), p.high_over_ema20_atr_min)
    yield h.reaches(h.low_pct(i, 7), p.low_pct7_min)
    yield h.reaches(h.low_pct(i, 14), p.low_pct14_min)
    yield h.reaches(abs(h.signed_gap_atr(i)), p.gap_atr_min)
    yield h.reaches(h.bar(i).open / h.ema(i, 9), p.open_over_ema9_min)
    yield h.reaches(h.atr_change(i), p.atr_change_pct_min)
    yield h.reaches(h.move(i, 2), p.move2_atr_min)
    yield h.reaches(h.move(i, 3), p.move3_atr_min)
    yield not p.require_green_d1 or d1.close > d1.open
    yield not p.require_open_gt_prev_high or h.bar(i).open > d1.high
    yield h.reaches(h.adv20(i), p.adv20_min_usd)


def tier(close: float) -> int:
    if close < 5:
        raise UndefinedError
    return 0 if close < 15 else 1 if close < 25 else 2 if close < 50 else 3 if close < 90 else 4


def frontside_rules(h: History, i: int, p: Any) -> Iterator[bool]:
    bar, d1 = h.bar(i), h.bar(i - 1)
    yield bar.close >= p.close_min
    yield bar.volume >= p.volume_min
    yield bar.high >= d1.high
    yield bar.low >= d1.low
    yield bar.close >= bar.open
    yield h.reaches(h.dollars(i), p.dollar_volume_min)
    yield bar.high >= h.highest(i, 20)
    yield h.reaches(h.ema(i, 9), h.ema(i, 20))
    yield h.reaches(h.ema(i, 20), h.ema(i, 50))


def high_pct(h: History, i: int) -> float:
    return h.bar(i).high / h.bar(i - 1).close - 1


def high_change(h: History, i: int) -> float:
    return divide(h.bar(i).high - h.bar(i).open, h.atr(i))


def lc_d2(h: History, i: int, p: Any) -> Iterator[bool]:
    yield from frontside_rules(h, i, p)
    t = tier(h.bar(i).close)
    yield h.reaches(high_pct(h, i), p.high_pct_min[t])
    yield h.reaches(h.highest(i - 1, 5) / h.lowest(i - 1, 20) - 1, p.extension_min[t])
    yield h.reaches(high_change(h, i), p.high_change_atr_min)
    yield h.reaches(h.high_over_ema(i, 9), p.high_over_ema9_atr_min)
    yield h.reaches(h.high_over_ema(i, 20), p.high_over_ema20_atr_min)
    if p.low_over_ema9_atr_min is not None:
        yield h.reaches(h.over_ema(i, h.bar(i).low, 9), p.low_over_ema9_atr_min)
    yield h.reaches(sum(h.dollars(i - k) for k in range(1, 6)), p.dollar_volume5_min)
    yield h.reaches(divide(h.bar(i).high - h.highest(i - 1, 20), h.atr(i)), p.breakout_atr_min)


def lc_d3_1(h: History, i: int, p: Any) -> Iterator[bool]:
    yield from frontside_rules(h, i, p)
    d1, d2 = h.bar(i - 1), h.bar(i - 2)
    yield d1.high >= d2.high
    yield d1.low >= d2.low
    yield d1.close >= d1.open
    yield d1.volume >= p.d1_volume_min
    yield h.reaches(h.dollars(i - 1), p.d1_dollar_volume_min)
    t = tier(h.bar(i).close)
    for k in (i, i - 1):
        yield h.reaches(high_pct(h, k), p.high_pct_min[t])
        yield h.reaches(h.high_over_ema(k, 9), p.high_over_ema9_atr_min)
        yield h.reaches(h.high_over_ema(k, 20), p.high_over_ema20_atr_min)
    yield h.reaches(h.bar(i).high / h.lowest(i, 20) - 1, p.extension_min[t])
    yield h.reaches(high_change(h, i), p.high_change_atr_min)
    yield h.reaches(high_change(h, i - 1), p.d1_high_change_atr_min)
    yield h.reaches(divide(h.bar(i).high - h.highest(i - 2, 20), h.atr(i)), p.breakout_atr_min)


Measure = Callable[[History, int, Any], Any]

_OVER_EMAS: dict[str, Measure] = {
    "high_over_ema9_atr": lambda h, i, p: h.high_over_ema(i, 9),
    "high_over_ema20_atr": lambda h, i, p: h.high_over_ema(i, 20),
}
_DAY: dict[str, Measure] = {
    "vol_ratio": lambda h, i, p: h.vol_ratio(i),
    "close_range": lambda h, i, p: h.close_range(i),
    "range_atr": lambda h, i, p: h.range_atr(i),
}
_SLOPES: dict[str, Measure] = {
    "slope3": lambda h, i, p: h.slope(i, 3),
    "slope5": lambda h, i, p: h.slope(i, 5),
    "slope15": lambda h, i, p: h.slope(i, 15),
}
_FRONTSIDE: dict[str, Measure] = {
    **_OVER_EMAS,
    "high_pct": lambda h, i, p: high_pct(h, i),
    "high_change_atr": lambda h, i, p: high_change(h, i),
    "dollar_volume": lambda h, i, p: h.dollars(i),
}
_D2: dict[str, Measure] = {
    **_FRONTSIDE,
    "ext2": lambda h, i, p: h.highest(i - 1, 5) / h.lowest(i - 1, 20) - 1,
    "low_over_ema9_atr": lambda h, i, p: h.over_ema(i, h.bar(i).low, 9),
    "breakout1_atr": lambda h, i, p: divide(h.bar(i).high - h.highest(i - 1, 20), h.atr(i)),
}

SETUPS: dict[str, tuple[Callable[[History, int, Any], Iterator[bool]], dict[str, Measure]]] = {
    "gap-up": (gap_up, {name: _DAY[name] for name in ("vol_ratio", "close_range")}),
    "momentum-breakout": (
        momentum_breakout,
        {**_DAY, "slope5": _SLOPES["slope5"], "slope15": _SLOPES["slope15"]}
        | {"high_over_ema9_atr": _OVER_EMAS["high_over_ema9_atr"]},
    ),
    "volume-surge": (
        volume_surge,
        {**_DAY, "change_pct": lambda h, i, p: h.bar(i).close / h.bar(i - 1).close - 1},
    ),
    "backside-b": (
        backside_b,
        {
            "trigger": lambda h, i, p: "D-1" if is_mold(h, i - 1, p) else "D-2",
            "pos_abs": lambda h, i, p: h.pos_abs(i, p.abs_lookback_days, p.abs_exclude_days),
            "d1_body_atr": lambda h, i, p: h.body_atr(i - 1),
            "d1_volume": lambda h, i, p: h.bar(i - 1).volume,
            "d1_vol_ratio": lambda h, i, p: h.vol_ratio(i - 1),
            "open_over_ema9": lambda h, i, p: h.bar(i).open / h.ema(i, 9),
        },
    ),
    "a-plus": (
        a_plus,
        {
            **_SLOPES,
            **_OVER_EMAS,
            "vol_ratio": _DAY["vol_ratio"],
            "d1_range_atr": lambda h, i, p: divide(h.true_range(i - 1), h.atr(i)),
            "d1_vol_ratio": lambda h, i, p: divide(h.bar(i - 1).volume, h.volavg(i)),
            "low_pct7": lambda h, i, p: h.low_pct(i, 7),
            "low_pct14": lambda h, i, p: h.low_pct(i, 14),
            "open_over_ema9": lambda h, i, p: h.bar(i).open / h.ema(i, 9),
            "atr_change_pct": lambda h, i, p: h.atr_change(i),
            "move2_atr": lambda h, i, p: h.move(i, 2),
            "move3_atr": lambda h, i, p: h.move(i, 3),
        },
    ),
    "lc-d2": (lc_d2, _D2),
    "lc-d2-1": (lc_d2, _D2),
    "lc-d3-1": (
        lc_d3_1,
        {
            **_FRONTSIDE,
            "ext3": lambda h, i, p: h.bar(i).high / h.lowest(i, 20) - 1,
            "breakout2_atr": lambda h, i, p: divide(h.bar(i).high - h.highest(i - 2, 20), h.atr(i)),
            "d1_high_pct": lambda h, i, p: high_pct(h, i - 1),
            "d1_high_change_atr": lambda h, i, p: high_change(h, i - 1),
        },
    ),
}
_COMMON: dict[str, Measure] = {
    "close": lambda h, i, p: h.bar(i).close,
    "volume": lambda h, i, p: h.bar(i).volume,
    "gap_pct": lambda h, i, p: h.gap_pct(i),
    "gap_atr": lambda h, i, p: abs(h.signed_gap_atr(i)),
    "adv20_usd": lambda h, i, p: h.adv20(i),
}


def evaluate(measure: Measure, h: History, i: int, p: Any) -> Any:
    try:
        return measure(h, i, p)
    except UndefinedError:
        return None


def find(setup: str, histories: Mapping[str, History], params: Any) -> Found:
    """Every match of a setup, with all that its row should say."""
    rules, measures = SETUPS[setup]
    found = Found({}, set(), set())
    for symbol, history in histories.items():
        for i, bar in enumerate(history.bars):
            key = (symbol, bar.date.isoformat())
            history.is_close = False
            try:
                is_match = all(rules(history, i, params))
            except UndefinedError:
                is_match = False
            if history.is_close:
                found.undecided.add(key)
            if not is_match:
                continue
            row = {"symbol": symbol, "date": key[1], "setup": setup}
            row |= {name: evaluate(measure, history, i, params) for name, measure in (_COMMON | measures).items()}
            history.is_close = False
            row["parabolic_score"] = evaluate(lambda h, i, p: h.score(i), history, i, params)
            if history.is_close:
                found.undecided_scores.add(key)
            found.rows[key] = row
    return found
