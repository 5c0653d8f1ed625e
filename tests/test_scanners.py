"""Every setup agrees with a second, naive implementation; parameters are checked and put in one canonical form."""

import random
from collections import defaultdict
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.core.errors import InvalidParams
from app.engine.worker import COMMON_COLUMNS, find_rows, normalise_params
from app.market.dirt import drop_bad_rows
from app.market.store import SCHEMA, open_store, read_rows
from app.scanners.params import MarketParams
from app.scanners.registry import get_scanner, list_scanners, validate_params
from tests import naive

SETUPS = tuple(naive.SETUPS)
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "backside-b": [
        {"preset": "relaxed", "trigger_mode": "D1_only", "require_open_gt_prev_high": True, "prior_high_lag": 2},
        {"preset": "relaxed", "abs_lookback_days": 200, "abs_exclude_days": 0, "d1_vol_mult_min": 1.2},
        {"preset": "relaxed", "enforce_d1_above_d2": False, "pos_abs_max": 0.5},
    ],
    "a-plus": [{"preset": "relaxed", "require_green_d1": True, "require_open_gt_prev_high": True}],
    "momentum-breakout": [{"preset": "relaxed", "require_open_above_ema9": False}],
    "lc-d2": [{"preset": "relaxed", "low_over_ema9_atr_min": None}],
}


def histories_of(frame: pl.DataFrame) -> dict[str, naive.History]:
    bars = defaultdict(list)
    for row in frame.select(SCHEMA.names()).iter_rows():
        bars[row[0]].append(naive.Bar(*row))
    return {symbol: naive.History(days) for symbol, days in bars.items()}


def check_agreement(
    setup: str, raw: dict[str, Any], frame: pl.DataFrame, histories: dict[str, naive.History] | None = None
) -> int:
    """Asserts that both find the same rows and say the same of each; the number of rows."""
    scanner = get_scanner(setup)
    params = validate_params(scanner, raw)
    rows = {(row["symbol"], row["date"]): row for row in find_rows(scanner, params, frame)}
    expected = naive.find(setup, histories_of(frame) if histories is None else histories, params)
    differ = rows.keys() ^ expected.rows.keys()
    assert differ <= expected.undecided, f"{setup} {raw}: {sorted(differ - expected.undecided)[:5]}"
    for key in rows.keys() & expected.rows.keys():
        row, wanted = rows[key], expected.rows[key]
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            if name == "trigger" and key in expected.undecided:
                continue
            if name == "parabolic_score" and key in expected.undecided_scores:
                continue
            if isinstance(value, float):
                assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-6), (key, name)
            else:
                assert row[name] == value, (key, name)
    return len(rows)


@pytest.fixture(scope="module")
def real(real_prices: Path) -> pl.DataFrame:
    store = open_store(real_prices)
    return read_rows(real_prices, [(0, store.rows)])[0]


@pytest.fixture(scope="module")
def subset(real: pl.DataFrame) -> pl.DataFrame:
    """120 symbols, the same in each run, those that jump most among them."""
    jump = (pl.col("close") / pl.col("close").shift(5)).max()
    wild = real.group_by("symbol").agg(jump.alias("jump")).sort("jump", "symbol")["symbol"].tail(40).to_list()
    others = random.Random(7).sample(sorted(set(real["symbol"].unique()) - set(wild)), 80)
    return real.filter(pl.col("symbol").is_in([*wild, *others]))


@pytest.fixture(scope="module")
def subset_histories(subset: pl.DataFrame) -> dict[str, naive.History]:
    return histories_of(subset)


@pytest.mark.parametrize("setup", SETUPS)
def test_a_setup_finds_what_the_naive_implementation_finds_on_real_prices(
    setup: str, subset: pl.DataFrame, subset_histories: dict[str, naive.History]
) -> None:
    check_agreement(setup, {}, subset, subset_histories)
    assert check_agreement(setup, {"preset": "relaxed"}, subset, subset_histories) > 100
    for raw in VARIANTS.get(setup, []):
        assert check_agreement(setup, raw, subset, subset_histories) > 10, raw


def test_gap_up_agrees_with_the_naive_implementation_on_every_real_symbol(real: pl.DataFrame) -> None:
    histories = histories_of(real)
    assert check_agreement("gap-up", {}, real, histories) > 300


def loosest(setup: str) -> dict[str, Any]:
    """Bounds so wide that nearly every day with enough history matches."""
    loose: dict[str, Any] = {}
    for name, field in get_scanner(setup).params.model_fields.items():
        bounds = {type(mark).__name__: mark for mark in field.metadata}
        if name in MarketParams.model_fields or field.annotation is bool or name.startswith(("abs_", "prior_")):
            continue
        if isinstance(field.default, list):
            loose[name] = [-1.0] * 5
        elif name.endswith("_max") and "Le" in bounds:
            loose[name] = bounds["Le"].le
        elif "Ge" in bounds:
            loose[name] = bounds["Ge"].ge
    return loose


Day = tuple[float, float, float, float, int, int, str]
days = st.tuples(
    st.floats(-0.1, 0.15),  # gap
    st.floats(-0.1, 0.2),  # move
    st.floats(0, 0.05),  # above
    st.floats(0, 0.05),  # below
    st.sampled_from([1, 100, 250_000, 3_000_000, 40_000_000]),
    st.sampled_from([1, 1, 1, 3, 4, 12, 400]),  # days since the row before
    st.sampled_from(["good"] * 12 + ["null", "nan", "crossed", "no volume"]),
)


def make_table(symbols: list[list[Day]]) -> pl.DataFrame:
    rows: list[tuple[Any, ...]] = []
    for number, history in enumerate(symbols):
        close, day = 20.0 * (number + 1), date(2015, 1, 2)
        for gap, move, above, below, volume, step, kind in history:
            open_ = close * (1 + gap)
            close = min(max(open_ * (1 + move), 1.0), 1e5)
            high, low = max(open_, close) * (1 + above), min(open_, close) * (1 - below)
            day += timedelta(days=step)
            first: float | None = open_
            if kind == "crossed":
                high, low = low * 0.5, high
            elif kind in ("null", "nan"):
                first = None if kind == "null" else float("nan")
            rows.append((f"S{number}", day, first, high, low, close, 0.0 if kind == "no volume" else float(volume)))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


@pytest.mark.parametrize("setup", SETUPS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(symbols=st.lists(st.lists(days, min_size=0, max_size=45), min_size=1, max_size=4), relaxed=st.booleans())
def test_a_setup_agrees_with_the_naive_implementation_on_any_table(
    setup: str, symbols: list[list[Day]], relaxed: bool
) -> None:
    table, _ = drop_bad_rows(make_table(symbols))
    check_agreement(setup, {"preset": "relaxed"} if relaxed else loosest(setup), table)


@pytest.mark.parametrize("setup", SETUPS)
def test_a_symbol_has_the_same_matches_whatever_lies_beside_it_in_the_table(setup: str, sample_prices: Path) -> None:
    store = open_store(sample_prices)
    frame, _ = read_rows(sample_prices, [(0, store.rows)])
    scanner = get_scanner(setup)
    params = validate_params(scanner, {"preset": "relaxed"})
    alone = [
        row
        for entry in store.symbols
        for row in find_rows(scanner, params, frame.filter(pl.col("symbol") == entry.symbol))
    ]
    assert find_rows(scanner, params, frame) == alone


@pytest.mark.parametrize("setup", SETUPS)
def test_days_and_where_choose_among_matches_and_never_cut_history(setup: str, sample_prices: Path) -> None:
    frame, _ = read_rows(sample_prices, [(0, open_store(sample_prices).rows)])
    scanner = get_scanner(setup)
    every = find_rows(scanner, validate_params(scanner, loosest(setup)), frame)
    assert len(every) > 50
    start, end = every[len(every) // 3]["date"], every[len(every) // 2]["date"]
    start, end = min(start, end), max(start, end)
    where = "parabolic_score >= 40 AND close[1] > 10 AND date <> '2005-03-01'"
    raw = {**loosest(setup), "start": start, "end": end, "where": where}
    some = find_rows(scanner, validate_params(scanner, raw), frame)
    days_before = {
        (s, d): c
        for s, d, c in frame.select(
            "symbol", pl.col("date").dt.to_string("iso"), pl.col("close").shift(1).over("symbol")
        ).iter_rows()
    }
    assert some == [
        row
        for row in every
        if start <= row["date"] <= end
        and (row["parabolic_score"] or 0) >= 40
        and (days_before[row["symbol"], row["date"]] or 0) > 10
        and row["date"] != "2005-03-01"
    ]


@pytest.mark.parametrize("scanner", [s for s in list_scanners() if s.name in SETUPS], ids=lambda s: s.name)
def test_a_row_holds_the_columns_that_its_scanner_names(scanner: Any, sample_prices: Path) -> None:
    frame, _ = read_rows(sample_prices, [(0, open_store(sample_prices).rows)])
    rows = find_rows(scanner, validate_params(scanner, loosest(scanner.name)), frame)
    assert rows
    assert list(rows[0]) == [*COMMON_COLUMNS, *scanner.columns]
    orjson.dumps(rows)


def test_every_threshold_of_the_domain_has_its_default_in_the_parameters() -> None:
    backside = normalise_params("backside-b", {})
    assert backside | {"d1_volume_min": 1e6} != backside
    assert (backside["price_min"], backside["pos_abs_max"], backside["trigger_mode"]) == (8.0, 0.75, "D1_or_D2")
    assert normalise_params("lc-d2-1", {})["high_pct_min"] == [1.0, 0.5, 0.3, 0.2, 0.15]
    assert normalise_params("lc-d2", {})["low_over_ema9_atr_min"] == 1.0
    assert normalise_params("lc-d2-1", {})["low_over_ema9_atr_min"] is None
    assert normalise_params("lc-d3-1", {})["extension_min"] == [2.5, 2.0, 1.5, 1.0, 0.75]


def test_equal_meaning_gives_equal_parameters() -> None:
    plain = normalise_params("gap-up", {"symbols": ["MSFT", "AAPL"], "where": "close > 5"})
    assert normalise_params("gap-up", {"where": " close > 5 ", "symbols": ["aapl", " msft", "MSFT"]}) == plain
    assert normalise_params("gap-up", {"gap_pct_min": 0.05, "start": None, "preset": None}) == normalise_params(
        "gap-up", {}
    )
    relaxed = normalise_params("gap-up", {"preset": "relaxed"})
    assert "preset" not in relaxed
    assert normalise_params("gap-up", relaxed) == relaxed
    assert normalise_params("gap-up", {"preset": "relaxed", "gap_pct_min": 0.2}) == relaxed | {"gap_pct_min": 0.2}


@pytest.mark.parametrize(
    ("raw", "field", "words"),
    [
        ({"gap_pct_mim": 1}, "gap_pct_mim", "did you mean 'gap_pct_min'"),
        ({"preset": "lax"}, "preset", "relaxed"),
        ({"preset": ["relaxed"]}, "preset", "relaxed"),
        ({"start": "2012-02-30"}, "start", "day"),
        ({"start": 0}, "start", "YYYY-MM-DD"),
        ({"start": True}, "start", "YYYY-MM-DD"),
        ({"start": "2013-01-01", "end": "2012-01-01"}, "start", "after end"),
        ({"gap_pct_min": float("nan")}, "gap_pct_min", "finite"),
        ({"gap_pct_min": float("inf")}, "gap_pct_min", "finite"),
        ({"gap_pct_min": True}, "gap_pct_min", "number"),
        ({"gap_pct_min": 0.4}, "gap_pct_min", "must not be above gap_pct_max, 0.3"),
        ({"close_range_min": 7}, "close_range_min", "less than or equal to 1"),
        ({"symbols": []}, "symbols", "at least 1"),
        ({"symbols": ["A" * 30]}, "symbols", "not a symbol"),
        ({"symbols": "AAPL"}, "symbols", "list"),
        ({"symbols": ["A; DROP"]}, "symbols", "not a symbol"),
        ({"symbols": ["A"] * 10_001}, "symbols", "10000"),
        ({"where": "x" * 1001}, "where", "1000"),
        ({"where": "volum > 1"}, "where", "volume"),
    ],
)
def test_a_wrong_parameter_is_refused_by_its_name_and_in_plain_words(
    raw: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(InvalidParams) as caught:
        normalise_params("gap-up", raw)
    errors = {error["field"].partition(".")[0]: error["message"] for error in caught.value.errors}
    assert field in errors
    assert words in errors[field]


def test_an_unknown_scanner_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidParams, match=r"did you mean 'gap-up'.*backside-b"):
        get_scanner("gapup")


def test_all_setups_of_the_domain_are_there() -> None:
    assert {scanner.name for scanner in list_scanners()} >= set(SETUPS)
    for scanner in list_scanners():
        assert scanner.params.model_json_schema()["properties"]
