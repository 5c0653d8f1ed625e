"""Features: worked out by hand where the rules are tricky, and never touched by another symbol's rows."""

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.worker import ChunkPrices
from app.market.features import (
    BASE_COLUMNS,
    FEATURE_NAMES,
    FEATURES,
    add_features,
    add_features_at,
    is_known,
)
from app.market.store import SCHEMA, open_store, read_rows
from app.scanners.backside import BacksideParams, mold
from tests.naive import Bar, History, UndefinedError

FLAT = (10.0, 11.0, 9.0, 10.0, 100.0)  # a true range of 2, and every mean of the close is 10
START = date(2020, 1, 1)


def table(*bars: tuple[float, float, float, float, float], symbol: str = "A") -> pl.DataFrame:
    """One symbol, a row a day."""
    rows = [(symbol, START + timedelta(days=number), *bar) for number, bar in enumerate(bars)]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def last(frame: pl.DataFrame, name: str) -> Any:
    return add_features(frame, [name])[name].last()


@pytest.fixture(scope="module")
def prices(sample_prices: Path) -> pl.DataFrame:
    return read_rows(sample_prices, [(0, open_store(sample_prices).rows)])[0]


def test_the_atr_of_a_day_leaves_that_day_out() -> None:
    frame = table(*[FLAT] * 14, (10, 30, 10, 20, 100))
    assert last(frame, "atr") == 2
    assert last(frame, "atr_raw") == pytest.approx((13 * 2 + 20) / 14)
    assert last(frame.head(14), "atr") is None


def test_the_true_range_counts_the_close_before_except_on_the_first_row() -> None:
    frame = add_features(table(FLAT, (20, 21, 20, 20.5, 100)), ["tr"])
    assert frame["tr"].to_list() == [2, 11]


def test_an_exponential_mean_starts_at_the_first_close_and_includes_today() -> None:
    assert last(table(FLAT), "ema9") == 10
    assert last(table(FLAT, (10, 20, 10, 20, 100)), "ema9") == pytest.approx(0.2 * 20 + 0.8 * 10)


def test_breakouts_measure_from_the_twenty_day_high_of_one_and_two_days_ago() -> None:
    frame = table(*[FLAT] * 25, (10, 13, 9, 10, 100), (10, 16, 9, 10, 100))
    atr = (13 * 2 + 4) / 14
    assert last(frame, "breakout1_atr") == pytest.approx((16 - 13) / atr)
    assert last(frame, "breakout2_atr") == pytest.approx((16 - 11) / atr)
    assert last(table(FLAT, FLAT), "high20") == 11  # a shorter window is allowed at the start


def test_the_long_range_leaves_out_its_first_day_and_includes_its_last() -> None:
    judged = date(2020, 1, 1)
    rows = [
        (judged - timedelta(days=1010), 90.0, 100.0, 1.0, 90.0),  # just before the window
        (judged - timedelta(days=1009), 45.0, 50.0, 40.0, 45.0),
        (judged - timedelta(days=10), 15.0, 20.0, 10.0, 15.0),
        (judged - timedelta(days=9), 20.0, 200.0, 5.0, 20.0),  # among the days kept out
        (judged, 20.0, 20.0, 20.0, 20.0),
    ]
    frame = pl.DataFrame([("A", *row, 100.0) for row in rows], schema=SCHEMA, orient="row")
    assert (last(frame, "abs_low"), last(frame, "abs_high")) == (10, 50)
    assert last(frame, "pos_abs") == pytest.approx((20 - 10) / (50 - 10))
    assert last(frame, "pos_abs_1001_10") == pytest.approx((20 - 1) / (100 - 1))
    assert last(frame, "pos_abs_1000_9") == pytest.approx((20 - 5) / (200 - 5))
    assert last(frame.tail(2), "pos_abs") is None  # no row in the window
    assert last(frame.filter(pl.col("high") != 50), "pos_abs") == 1  # clamped: (20 - 10) / (20 - 10)


@pytest.mark.parametrize(
    ("d2", "d1", "score"),
    [
        # ATR 33/14. Up 5/ATR = 2.12: 18. Above EMA9 by 6.28/ATR = 2.66: 20. Two days up, widening, gap 0.42: 20.
        # Volume 300 to a mean of 140: 10. Gap 0.42: 10, and no gap the day before.
        ((10, 13, 10, 12, 100), (13, 18, 13, 17, 300), 18 + 20 + 20 + 10 + 10),
        # D-2 gapped as well: 1/ATR[1] = 0.48, so 5 more.
        ((11, 13, 10, 12, 100), (13, 18, 13, 17, 300), 18 + 20 + 20 + 10 + 10 + 5),
        # No gap on D-1: burst 17.5, and nothing for gaps. Up 6/ATR = 2.55: 18.
        ((10, 13, 10, 12, 100), (12, 18, 13, 17, 300), 18 + 20 + 17.5 + 10),
        # D-2 stood still: burst 10. Its true range is 1 and that of D-1 is 8, so ATR is 33/14 again: 18. Above
        # EMA9 by 6.6/ATR = 2.8: 20. Volume as ever: 5. Gap 3/ATR = 1.27: 15.
        ((10, 10, 9, 10, 100), (13, 18, 13, 17, 100), 18 + 20 + 10 + 5 + 15),
    ],
)
def test_the_parabolic_score_adds_up_as_worked_out_by_hand(d2: Any, d1: Any, score: float) -> None:
    frame = table(*[FLAT] * 21, d2, d1, FLAT)
    assert last(frame, "parabolic_score") == score


def test_the_mold_takes_the_larger_of_two_volumes_and_the_values_of_its_own_day() -> None:
    rows = [(*FLAT[:4], 4e6)] * 25
    push = (10, 15, 10, 14)
    params = BacksideParams(vol_mult=1.86, slope5d_min=7.9, high_ema9_mult=2.09, atr_mult=2.49)

    def is_mold(frame: pl.DataFrame, params: BacksideParams, lag: int = 0) -> bool:
        rule = mold(params, lag)
        return bool(ChunkPrices(frame).with_features(rule.meta.root_names()).select(rule).to_series().last())

    frame = table(*rows, (*FLAT[:4], 8e6), (*push, 1.0))
    # True range 5 / 2; volume 8 M over (13 * 4 M + 8 M) / 14; EMA9 10.8, up 8 % in 5 rows; high over it 4.2 / 2.
    assert is_mold(frame, params)
    for change in ({"vol_mult": 1.87}, {"slope5d_min": 8.1}, {"high_ema9_mult": 2.11}, {"atr_mult": 2.51}):
        assert not is_mold(frame, params.model_copy(update=change))
    assert not is_mold(frame, params, lag=1)
    later = table(*rows, (*FLAT[:4], 8e6), (*push, 1.0), FLAT)
    assert is_mold(later, params, lag=1)
    assert not is_mold(later, params)


def test_a_zero_below_the_line_and_too_little_history_give_null() -> None:
    still = table(*[(10.0, 10.0, 10.0, 10.0, 100.0)] * 30)
    for name in ("gap_atr", "body_atr", "close_range", "parabolic_score", "atr_change_pct", "pos_abs", "low_pct7"):
        assert last(still, name) is None
    short = add_features(table(*[FLAT] * 5), list(FEATURES))
    nulls = {name for name in FEATURES if short[name].last() is None}
    assert {"atr", "adv20_usd", "slope5", "volavg5", "low7", "pos_abs"} <= nulls
    assert not {"tr", "ema50", "high20", "slope3", "gap_pct"} & nulls


def test_a_lag_is_the_value_of_earlier_rows_of_the_same_symbol() -> None:
    two = pl.concat([table(FLAT, (1, 2, 1, 1.5, 7), FLAT), table(FLAT, FLAT, symbol="B")])
    made = add_features(two, ["close[1]", "volume[2]", "date[1]", "range[1]"])
    assert made["close[1]"].to_list() == [None, 10, 1.5, None, 10]
    assert made["volume[2]"].to_list() == [None, None, 100, None, None]
    assert made["date[1]"].to_list() == [None, START, START + timedelta(days=1), None, START]


def test_only_what_is_needed_is_computed() -> None:
    made = add_features(table(*[FLAT] * 30), ["gap_pct"])
    assert set(made.columns) == {*BASE_COLUMNS, "#symbol", "#row", "close[1]", "prev_close", "gap_pct"}
    assert add_features(made, ["gap_pct"]) is made


@pytest.mark.parametrize(
    "name", ["clos", "close[0]", "close[1][2]", "close[9999]", "#row", "pos_abs_0_5", "", "atr[-1]"]
)
def test_an_unknown_name_is_known_to_be_unknown(name: str) -> None:
    assert not is_known(name)
    if not name.startswith("#"):
        with pytest.raises(KeyError):
            add_features(table(FLAT), [name])


def test_every_feature_has_a_meaning_and_a_unit() -> None:
    for meaning in FEATURE_NAMES.values():
        text, _, unit = meaning.rpartition(" [")
        assert text
        assert unit.rstrip("]")


def test_a_feature_of_one_symbol_is_the_same_to_the_last_bit_whatever_lies_beside_it(prices: pl.DataFrame) -> None:
    # A running sum would carry the rounding of huge values into the tiny ones that follow.
    huge = prices.filter(pl.col("symbol") == "AAPL").with_columns(pl.col(c) * 1e9 for c in BASE_COLUMNS[2:])
    tiny = prices.filter(pl.col("symbol") == "IBM").with_columns(pl.col(c) * 1e-6 for c in BASE_COLUMNS[2:6])
    together = add_features(pl.concat([huge, tiny]), list(FEATURES)).filter(pl.col("symbol") == "IBM")
    alone = add_features(tiny, list(FEATURES))
    assert together.select(*FEATURES).equals(alone.select(*FEATURES))


@settings(max_examples=20, deadline=None)
@given(
    wanted=st.lists(st.integers(0, 12_000), min_size=1, max_size=30),
    names=st.lists(st.sampled_from([*FEATURES, "close[200]", "parabolic_score[5]", "pos_abs_90_3"]), min_size=1),
)
def test_features_at_some_rows_are_those_of_all_rows(prices: pl.DataFrame, wanted: list[int], names: list[str]) -> None:
    is_wanted = pl.int_range(prices.height, eager=True).is_in(wanted)
    some = add_features_at(prices, is_wanted, names)
    every = add_features(prices, names).filter(is_wanted)
    assert some.select("symbol", "date", *dict.fromkeys(names)).equals(
        every.select("symbol", "date", *dict.fromkeys(names))
    )


def test_means_and_windows_agree_with_plain_loops_on_real_prices(prices: pl.DataFrame) -> None:
    frame = prices.filter(pl.col("symbol") == "MSFT").head(900)
    history = History([Bar(*row) for row in frame.iter_rows()])
    plain = {
        "atr_raw": history.atr_raw,
        "atr": history.atr,
        "volavg5": lambda i: history.volavg(i, 5),
        "volavg14": history.volavg,
        "adv20_usd": history.adv20,
        "ema50": lambda i: history.ema(i, 50),
        "slope15": lambda i: history.slope(i, 15),
        "low_pct14": lambda i: history.low_pct(i, 14),
        "pos_abs_300_20": lambda i: history.pos_abs(i, 300, 20),
        "atr_change_pct": history.atr_change,
        "parabolic_score": history.score,
    }
    made = add_features(frame, list(plain))
    for name, compute in plain.items():
        for i, value in enumerate(made[name]):
            try:
                expected = compute(i)
            except UndefinedError:
                assert value is None, (name, i)
            else:
                assert value == pytest.approx(expected, rel=1e-9, abs=1e-9), (name, i)
