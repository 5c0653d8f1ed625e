"""Rules of the price store: what is refused at the door, what is left out of a scan, and chunks of whole symbols."""

from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import PricesChanged, PricesError
from app.market.sample import make_sample, make_synthetic
from app.market.store import COLUMNS, Store, SymbolRows, open_store, plan_chunks, read_rows, write_store

GOOD: dict[str, list[Any]] = {
    "symbol": ["A", "A", "B"],
    "date": [date(2020, 1, 1), date(2020, 1, 2), date(2020, 1, 1)],
    "open": [10.0, 11.0, 20.0],
    "high": [12.0, 12.0, 21.0],
    "low": [9.0, 10.0, 19.0],
    "close": [11.0, 11.5, 20.5],
    "volume": [100, 200, 300],
}


def write_raw(path: Path, **columns: object) -> Path:
    """A Parquet file as somebody else might have made it."""
    pl.DataFrame({**GOOD, **columns}, strict=False).write_parquet(path)
    return path


def test_a_good_file_is_indexed_by_symbol(tmp_path: Path) -> None:
    store = open_store(write_raw(tmp_path / "good.parquet"))
    assert store.symbols == (
        SymbolRows("A", 0, 2, date(2020, 1, 1), date(2020, 1, 2)),
        SymbolRows("B", 2, 1, date(2020, 1, 1), date(2020, 1, 1)),
    )
    assert (store.rows, store.first, store.last) == (3, date(2020, 1, 1), date(2020, 1, 2))


def test_the_data_version_follows_the_content(tmp_path: Path) -> None:
    one, same = write_raw(tmp_path / "one.parquet"), write_raw(tmp_path / "same.parquet")
    other = write_raw(tmp_path / "other.parquet", volume=[100, 200, 301])
    assert open_store(one).data_version == open_store(same).data_version != open_store(other).data_version


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "There is no price file prices.parquet"),
        (b"", "is empty"),
        (b"symbol,date\nA,2020-01-01\n", "it is CSV. Run `scanwire data import prices.parquet`, and serve"),
        (b"PAR1,", "cannot be read as Parquet: it is damaged"),
        (b"no prices", "cannot be read as Parquet: it is damaged"),
    ],
)
def test_a_file_that_is_missing_empty_or_not_parquet_is_refused(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "prices.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PricesError, match=said) as refusal:
        open_store(path)
    assert "scanwire data import" in refusal.value.detail
    assert str(tmp_path) not in refusal.value.detail


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    content = write_raw(tmp_path / "whole.parquet").read_bytes()
    for length in range(1, len(content), 97):
        (tmp_path / "cut.parquet").write_bytes(content[:length])
        with pytest.raises(PricesError):
            open_store(tmp_path / "cut.parquet")


@pytest.mark.parametrize("column", COLUMNS)
def test_a_file_without_a_column_is_refused_and_the_column_named(tmp_path: Path, column: str) -> None:
    path = tmp_path / "lacking.parquet"
    pl.DataFrame(GOOD).drop(column).write_parquet(path)
    with pytest.raises(PricesError, match=f"no column '{column}'"):
        open_store(path)


@pytest.mark.parametrize(
    ("column", "values"),
    [("open", ["a", "b", "c"]), ("date", ["2020-01-01"] * 3), ("symbol", [1, 2, 3]), ("volume", [True, False, True])],
)
def test_a_column_of_a_wrong_type_is_refused_and_named(tmp_path: Path, column: str, values: list[object]) -> None:
    with pytest.raises(PricesError, match=f"column '{column}'"):
        open_store(write_raw(tmp_path / "typed.parquet", **{column: values}))


@pytest.mark.parametrize(
    "columns",
    [
        {"symbol": ["B", "A", "A"]},
        {"symbol": ["A", "B", "A"]},
        {"date": [date(2020, 1, 2), date(2020, 1, 1), date(2020, 1, 1)]},
        {"date": [date(2020, 1, 1)] * 3},
    ],
)
def test_rows_out_of_order_or_there_twice_are_refused(tmp_path: Path, columns: dict[str, object]) -> None:
    with pytest.raises(PricesError, match="sorted by symbol and date"):
        open_store(write_raw(tmp_path / "unsorted.parquet", **columns))


def test_a_file_with_no_rows_is_refused(tmp_path: Path) -> None:
    pl.DataFrame(GOOD).head(0).write_parquet(tmp_path / "none.parquet")
    with pytest.raises(PricesError, match="no rows"):
        open_store(tmp_path / "none.parquet")


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("open", None, "without a price"),
        ("close", float("nan"), "without a price"),
        ("low", 0.0, "not a positive number"),
        ("close", -1.0, "not a positive number"),
        ("high", float("inf"), "not a positive number"),
        ("high", 10.5, "contradicts"),
        ("low", 11.8, "contradicts"),
        ("volume", None, "without a volume"),
        ("volume", 0, "without a volume"),
        ("volume", -5, "not a positive number"),
    ],
)
def test_a_bad_row_is_left_out_and_said_and_the_others_stay(
    tmp_path: Path, column: str, value: object, reason: str
) -> None:
    values = [GOOD[column][0], value, GOOD[column][2]]
    path = write_raw(tmp_path / "dirty.parquet", **{column: values})
    frame, skipped = read_rows(path, [(0, 3)])
    assert frame["symbol"].to_list() == ["A", "B"]
    assert {one.symbol for one in skipped} == {"A"}
    assert any(reason in one.reason for one in skipped)


def test_the_dirt_of_the_real_table_is_found_to_the_row(real_prices: Path) -> None:
    store = open_store(real_prices)
    assert (len(store.symbols), store.rows) == (505, 619_040)
    frame, skipped = read_rows(real_prices, [(0, store.rows)])
    counted: dict[str, int] = {}
    for one in skipped:
        number, _, reason = one.reason.partition(" row")
        counted[reason.removeprefix("s ").strip()] = counted.get(reason.removeprefix("s ").strip(), 0) + int(number)
    assert counted["without a price"] == 11
    assert counted["whose high or low contradicts open or close"] == 12
    assert counted["without a volume"] == 4
    assert store.rows - frame.height <= 27


def test_a_file_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "prices.parquet")
    stamp = open_store(path).stamp
    read_rows(path, [(0, 3)], stamp)
    write_store(pl.DataFrame(GOOD), path, source="another")
    with pytest.raises(PricesChanged):
        read_rows(path, [(0, 3)], stamp)


def test_a_written_store_reads_back_sorted_each_day_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "prices.parquet"
    rows = pl.concat([pl.DataFrame(GOOD).reverse(), pl.DataFrame(GOOD).with_columns(volume=pl.lit(7, pl.Int64))])
    write_store(rows.select(COLUMNS), path, source="a test", is_synthetic=True)
    store = open_store(path)
    assert (store.rows, store.source, store.is_synthetic) == (3, "a test", True)
    assert store.data_version.startswith("synthetic-")
    assert read_rows(path, [(0, 3)])[0]["volume"].to_list() == [7.0, 7.0, 7.0]
    assert [entry.name for entry in path.parent.iterdir()] == ["prices.parquet"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("many") / "many.parquet"
    make_synthetic(path, symbols=40, days=25, seed=3)
    return open_store(path)


@settings(deadline=None)
@given(st.integers(1, 2000), st.none() | st.lists(st.integers(0, 45), min_size=1))
def test_chunks_are_whole_symbols_each_once_in_the_order_of_the_file(
    many: Store, chunk_rows: int, picked: list[int] | None
) -> None:
    names = [entry.symbol for entry in many.symbols] + ["NOSUCH1", "NOSUCH2"] * 3
    wanted = None if picked is None else [names[place] for place in picked]
    plan = plan_chunks(many, wanted, chunk_rows)
    rows = [row for chunk in plan.chunks for offset, count in chunk.slices for row in range(offset, offset + count)]
    expected = [entry for entry in many.symbols if wanted is None or entry.symbol in wanted]
    assert rows == [row for entry in expected for row in range(entry.offset, entry.offset + entry.rows)]
    assert (plan.symbols, plan.rows) == (len(expected), len(rows))
    assert set(plan.missing) == {name for name in wanted or [] if name.startswith("NOSUCH")}


def test_the_same_synthetic_universe_comes_from_the_same_seed(tmp_path: Path) -> None:
    versions = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_synthetic(tmp_path / name, symbols=5, days=30, seed=seed)
        versions.append(open_store(tmp_path / name).data_version)
    assert versions[0] == versions[1] != versions[2]


def test_the_sample_is_real_and_adjusted_for_splits(tmp_path: Path) -> None:
    make_sample(tmp_path / "sample.parquet")
    store = open_store(tmp_path / "sample.parquet")
    assert [entry.symbol for entry in store.symbols] == ["AAPL", "FB", "GOOG", "IBM", "MSFT"]
    assert not store.is_synthetic
    frame, skipped = read_rows(store.path, [(0, store.rows)])
    assert not skipped
    # Apple split 2:1 on 2005-02-28; unadjusted, its close halves overnight and its volume doubles.
    apple = frame.filter(pl.col("symbol") == "AAPL")
    change = apple.select(pl.col("close") / pl.col("close").shift(1)).to_series().drop_nulls()
    assert change.min() > 0.45  # type: ignore[operator]
    assert apple.filter(pl.col("date") < date(2005, 2, 28))["volume"].median() > 10_000_000  # type: ignore[operator]
