"""GET /v1/prices/{symbol}: the rows around a day or between two, bounded, and clear refusals."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from datetime import date
from pathlib import Path

import polars as pl
import pytest

from app.market.store import write_store
from tests.serving import Serving, serve


@pytest.fixture
async def serving(tmp_path: Path, sample_prices: Path) -> AsyncIterator[Serving]:
    async with serve(tmp_path, sample_prices) as running:
        yield running


def read_file(path: Path, symbol: str) -> pl.DataFrame:
    return pl.read_parquet(path).filter(pl.col("symbol") == symbol).sort("date")


async def test_the_rows_around_a_day_are_those_of_the_file_with_the_day_in_the_middle(
    serving: Serving, sample_prices: Path
) -> None:
    frame = read_file(sample_prices, "AAPL")
    day = frame["date"][500]
    answer = (await serving.http.get(f"/v1/prices/AAPL?around={day}")).json()
    expected = frame[470:530]
    assert answer["symbol"] == "AAPL"
    assert not answer["is_synthetic"]
    assert answer["data_version"] == serving.service.store.data_version
    assert [date.fromisoformat(text) for text in answer["columns"]["date"]] == expected["date"].to_list()
    for name in ("open", "high", "low", "close", "volume"):
        assert answer["columns"][name] == pytest.approx(expected[name].to_list(), abs=0.5 * (name == "volume"))
    assert answer["columns"]["date"][30] == day.isoformat()
    assert answer["next"] is None
    assert answer["left_out"] == []


@pytest.mark.parametrize(("place", "rows"), [(0, 30), (29, 59), (30, 60), (-1, 31)])
async def test_at_the_ends_of_the_history_fewer_rows_come(
    serving: Serving, sample_prices: Path, place: int, rows: int
) -> None:
    day = read_file(sample_prices, "IBM")["date"][place]
    answer = (await serving.http.get(f"/v1/prices/ibm?around={day}&days=60")).json()
    assert len(answer["columns"]["date"]) == rows
    assert day.isoformat() in answer["columns"]["date"]


async def test_a_day_without_trading_is_answered_by_the_days_about_it(serving: Serving) -> None:
    answer = (await serving.http.get("/v1/prices/IBM?around=2010-07-04&days=2")).json()  # a Sunday
    assert answer["columns"]["date"] == ["2010-07-02", "2010-07-06"]


async def test_from_one_day_to_another_all_rows_come_in_pages_of_a_bounded_size(
    tmp_path: Path, sample_prices: Path
) -> None:
    frame = read_file(sample_prices, "MSFT").filter(pl.col("date").is_between(date(2005, 1, 3), date(2006, 12, 29)))
    days, start = [], "2005-01-03"
    async with serve(tmp_path, sample_prices, max_price_rows=200) as serving:
        while start:
            answer = (await serving.http.get(f"/v1/prices/MSFT?start={start}&end=2006-12-29")).json()
            assert len(answer["columns"]["date"]) <= 200
            days += answer["columns"]["date"]
            start = answer["next"]
    assert days == [day.isoformat() for day in frame["date"]]


async def test_the_same_answer_is_not_sent_twice_and_the_read_bucket_pays(serving: Serving) -> None:
    address = "/v1/prices/AAPL?around=2010-01-04&days=10"
    first = await serving.http.get(address)
    again = await serving.http.get(address, headers={"If-None-Match": first.headers["ETag"]})
    assert again.status_code == 304
    assert again.content == b""
    assert first.headers["RateLimit"].startswith('"read";')


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("around=yesterday", "around"),
        ("around=20100104", "around"),
        ("around=2010-W01-1", "around"),
        ("around=2010-01-04&start=2010-01-04", "around"),
        ("around=2010-01-04&days=0", "days"),
        ("around=2010-01-04&days=2001", "days"),
        ("around=2010-01-04&days=ten", "days"),
        ("days=5", "days"),
        ("start=2010-02-30", "start"),
        ("start=2010-02-02&end=2010-02-01", "start"),
    ],
)
async def test_what_cannot_be_meant_is_refused_by_name(serving: Serving, query: str, field: str) -> None:
    answer = await serving.http.get(f"/v1/prices/AAPL?{query}")
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]


async def test_an_unknown_symbol_is_refused_with_what_there_is(serving: Serving) -> None:
    answer = await serving.http.get("/v1/prices/NONE")
    assert answer.status_code == 404
    assert answer.json()["type"] == "urn:scanwire:problem:unknown-symbol"
    assert "AAPL, FB, GOOG, IBM, MSFT" in answer.json()["detail"]


async def test_rows_that_cannot_be_believed_are_left_out_and_said_so(tmp_path: Path) -> None:
    days = pl.date_range(date(2020, 1, 1), date(2020, 1, 10), eager=True)
    close = [10.0, None, *[10.0] * 8]
    columns = dict.fromkeys(("open", "high", "low", "close"), close)
    frame = pl.DataFrame({"symbol": ["BRK/B"] * 10, "date": days, **columns, "volume": [1000.0] * 10})
    write_store(frame, tmp_path / "prices.parquet", source="made up", is_synthetic=True)
    async with serve(tmp_path / "state", tmp_path / "prices.parquet") as serving:
        answer = (await serving.http.get("/v1/prices/BRK%2FB")).json()
        assert len(answer["columns"]["date"]) == 9
        assert answer["left_out"] == ["1 row without a price"]
        assert answer["is_synthetic"]
        later = (await serving.http.get("/v1/prices/BRK%2FB?start=2020-01-03")).json()
        assert later["left_out"] == []


async def test_a_file_that_was_replaced_is_not_read(tmp_path: Path, sample_prices: Path) -> None:
    path = Path(shutil.copy(sample_prices, tmp_path / "prices.parquet"))
    async with serve(tmp_path / "state", path) as serving:
        os.truncate(path, 100)
        answer = await serving.http.get("/v1/prices/AAPL")
    assert answer.status_code == 500
    assert answer.json()["type"] == "urn:scanwire:problem:prices"
    assert "restarted" in answer.json()["detail"]


async def test_while_all_workers_are_busy_a_read_waits_for_so_long_and_is_then_refused(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with serve(tmp_path, sample_prices, price_wait_s=0.1) as serving:
        pool = serving.service.runner.pool
        async with pool._calls:
            answer = await asyncio.wait_for(serving.http.get("/v1/prices/AAPL"), 5)
        assert answer.status_code == 503
        assert answer.json()["retry_after_s"] == 0.1
        assert (await serving.http.get("/v1/prices/AAPL")).status_code == 200
