"""`where`: a useful condition works, anything else is refused in words, and no text at all gets past that."""

from datetime import date
from typing import Any

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.core.errors import InvalidParams
from app.market.features import BASE_COLUMNS, FEATURES, add_features
from app.market.store import SCHEMA
from app.market.where import MAX_CHARS, parse_where

ROWS = pl.DataFrame(
    [
        ("AAPL", date(2012, 1, 3), 10.0, 12.0, 9.0, 11.0, 5e6),
        ("AAPL", date(2012, 1, 4), 13.0, 14.0, 12.0, 13.5, 9e6),
        ("MSFT", date(2013, 6, 3), 30.0, 31.0, 29.0, 29.5, 4e6),
    ],
    schema=SCHEMA,
    orient="row",
)


def kept(text: str) -> list[int]:
    """The rows, by number, that a condition lets through."""
    condition = parse_where(text)
    frame = add_features(ROWS, condition.meta.root_names())
    return frame.with_row_index().filter(condition)["index"].to_list()


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("close > 12", [1, 2]),
        ("close > 12 AND volume >= 9000000", [1]),
        ("NOT (close > 12) OR symbol = 'MSFT'", [0, 2]),
        ("symbol IN ('MSFT', 'IBM')", [2]),
        ("symbol NOT IN ('MSFT')", [0, 1]),
        ("symbol LIKE 'A%'", [0, 1]),
        ("close BETWEEN 11 AND 13.5", [0, 1]),
        ("date >= DATE '2012-01-04'", [1, 2]),
        ("date >= '2012-01-04'", [1, 2]),
        ("date BETWEEN '2012-01-01' AND '2012-12-31'", [0, 1]),
        ("date IN ('2012-01-04', '2013-06-03')", [1, 2]),
        ("YEAR(date) = 2013", [2]),
        ("close[1] > 5", [1]),
        ('"close[1]" > 5', [1]),
        ("gap_pct > 0.05", [1]),
        ("abs(close - open) / range < 0.3", [1, 2]),
        ("prev_close IS NULL", [0, 2]),
        ("COALESCE(gap_pct, 0) = 0", [0, 2]),
        ("CASE WHEN symbol = 'AAPL' THEN close > 12 ELSE false END", [1]),
        ("close / 0 > 1e300", [0, 1, 2]),  # as floating-point numbers have it
        ("true", [0, 1, 2]),
        ("atr > 0", []),
    ],
)
def test_a_condition_keeps_the_rows_that_it_names(text: str, rows: list[int]) -> None:
    assert kept(text) == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("close >", "cannot be read"),
        ("close > 1; SELECT 1", "cannot be read"),
        ("Close > 1", "near it: close"),
        ("volum > 1", "near it: volume"),
        ("qqqqq > 1", "GET /v1/scanners"),
        ("close[900] > 1", "not a column"),
        ('"#row" > 1', "not a column"),
        ("close", "true or false"),
        ("close + 1", "true or false"),
        ("NULL", "true or false"),
        ("sum(close) > 1", "uses sum(…), which is not allowed"),
        ("count(*) > 1", "not allowed"),
        ("max(close) OVER (PARTITION BY symbol) > 1", "not allowed"),
        ("row_number() OVER () > 1", "not allowed"),
        ("close > (SELECT 1)", "SELECT, which is not allowed"),
        ("close IN (SELECT close FROM self)", "SELECT, which is not allowed"),
        ("CAST(symbol AS INT) > 1", "CAST, which is not allowed"),
        ("symbol::boolean", "has no place"),
        ("columns('^c') > 1", "not allowed"),
        ("unnest(close) > 1", "not allowed"),
        ("read_csv('/etc/passwd') > 1", "not allowed; there are: abs"),
        ("random() > 0.5", "not allowed"),
        ("date > now()", "tomorrow"),
        ("date > current_date", "tomorrow"),
        ("date > DATE '2012-13-45'", "cannot be read"),
        ("symbol > 5", "cannot be computed"),
        ("symbol ~ '('", "cannot be computed"),
        ("close > 1\0", "has no place"),
        ("(" * 400 + "close > 1" + ")" * 400, "at most 8 inside each other"),
        ("close > 1)", "open each bracket and CASE"),
        ("(close > 1", "not closed"),
        ("greatest() > 1", "empty brackets"),  # the SQL parser panics on it
        ("close > 1 -- all", "comments"),
        ("close > 'a", "has no place"),
        ("close > 1 AND " * 80, "at most"),
        ("+".join(["1"] * 490) + " > 1", "nested too deeply"),
        ("- " * 450 + "close > 1", "cannot be read"),
    ],
)
def test_anything_else_is_refused_with_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        parse_where(text)
    (error,) = caught.value.errors
    assert error["field"] == "where"
    assert words in error["message"]
    assert len(error["message"]) < 500


def never_crashes(text: str) -> None:
    try:
        condition = parse_where(text)
    except InvalidParams:
        return
    # What was let through must run on real columns as well.
    add_features(ROWS, condition.meta.root_names()).filter(condition)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
@example("cast(" * 120 + "close > 1")  # each bracket doubled the time that the SQL parser took
@example("1 = position(" * 60 + "close")
@example("sum(close) over (order by " * 30)
@example("case - " * 60)
@example("floor(" * 30 + "close")
@example("(" * 990)
@example("NOT " * 249)
@example("-" * 1000)
@example("close" + "[1]" * 300)
@example("'" * 999)
@example("close in (" * 99)
@example("case when " * 99)
@example("1" + "::int" * 190 + " > 0")
def test_no_text_crashes_the_reader(text: str) -> None:
    never_crashes(text)


WORDS = """
    close volume symbol date atr gap_pct vol_ratio parabolic_score pos_abs close[1] close[ ] 1 2.5 -3
    1e308 'A' '%' '' '2012-01-01' DATE true false NULL > < >= <= = <> + - * / % || ( ) , [ ] ; : . AND OR
    NOT IN IS LIKE ~ BETWEEN CASE WHEN THEN ELSE END EXISTS SELECT FROM self OVER PARTITION BY ANY ALL
    INTERVAL '1 day' :: abs( round( pow( exp( ln( sqrt( year( upper( length( coalesce( greatest( least(
    nullif( sum( first( lag( if( sign( cast( concat( substr( left( strpos( mod( log( degrees( cbrt(
    atan2( date_part( replace( split_part( array[
""".split()


@settings(max_examples=1500, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=14))
def test_no_jumble_of_sql_words_crashes_the_reader(words: list[str]) -> None:
    never_crashes(" ".join(words))


numbers = st.one_of(
    st.sampled_from(["close", "volume", "gap_pct", "close[1]", "0", "1", "2.5", "1e300", "99999999999999999999"])
)


def operations(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, st.sampled_from("+-*/%"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(st.sampled_from(["abs", "sqrt", "exp", "ln", "floor", "ceil", "sign", "round"]), inner).map(
            lambda t: f"{t[0]}({t[1]})"
        ),
        st.tuples(st.sampled_from(["pow", "greatest", "least", "coalesce", "nullif"]), inner, inner).map(
            lambda t: f"{t[0]}({t[1]}, {t[2]})"
        ),
        st.tuples(inner, inner, inner).map(lambda t: f"CASE WHEN {t[0]} > {t[1]} THEN {t[2]} ELSE 0 END"),
    )


@settings(max_examples=200, deadline=None)
@given(
    left=st.recursive(numbers, operations, max_leaves=8),
    compare=st.sampled_from([">", "<=", "=", "<>", "IS DISTINCT FROM"]),
    right=st.recursive(numbers, operations, max_leaves=8),
)
def test_any_arithmetic_is_read_and_runs(left: str, compare: str, right: str) -> None:
    text = f"{left} {compare} {right}"
    if len(text) <= MAX_CHARS:
        never_crashes(text)


def test_every_column_and_feature_can_be_named() -> None:
    for name in (*BASE_COLUMNS[2:], *FEATURES):
        parse_where(f"{name} > 0 OR {name}[3] < 1")


def test_a_condition_means_the_same_each_time_it_is_read() -> None:
    text: Any = "close > 12 AND date >= '2012-01-01'"
    assert parse_where(text).meta.eq(parse_where(text))


@pytest.mark.parametrize(
    "expr",
    [
        pl.col("close").sum() > 1,
        pl.col("close").shift(1) > 1,
        pl.col("close").max().over("symbol") > 1,
        pl.col("close").cast(pl.Int64) > 1,
        pl.col("symbol").str.to_integer() > 1,
        pl.col("close").map_batches(lambda values: values) > 1,
        pl.col("close").sort() > 1,
        pl.len() > 1,
        pl.all().is_null(),
    ],
    ids=str,
)
def test_what_is_not_elementwise_is_refused_even_if_the_words_were_let_through(
    expr: pl.Expr, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl, "sql_expr", lambda sql: expr)
    with pytest.raises(InvalidParams, match=r"not allowed|cannot be read"):
        parse_where("close > 1")
