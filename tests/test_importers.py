"""Rules of importing: common shapes are understood, each row is checked, what was dropped is told, the rest refused."""

import gzip
from datetime import date
from pathlib import Path

import polars as pl
import pytest

from app.core.errors import PricesError
from app.market.importers import MAX_REJECTED, import_files
from app.market.store import open_store, write_store

HEADER = "date,open,high,low,close,volume,Name"
ROW = "2020-01-02,10,12,9,11,1000,AAL"


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    "header",
    [
        "date,open,high,low,close,volume,Name",
        "Date,Open,High,Low,Close,Volume,Ticker",
        "TIMESTAMP,O,H,L,C,VOL,SYMBOL",
        " date , open , high , low , close , volume , symbol ",
    ],
)
def test_header_names_count_in_any_case_and_by_their_common_aliases(tmp_path: Path, header: str) -> None:
    imported = import_files([write(tmp_path / "a.csv", header, ROW)])
    assert imported.frame.row(0) == ("AAL", date(2020, 1, 2), 10.0, 12.0, 9.0, 11.0, 1000)


@pytest.mark.parametrize("day", ["2020-01-02", "20200102", "01/02/2020", "2020/01/02", "2-Jan-2020", "Jan 2, 2020"])
def test_days_are_read_in_the_common_forms(tmp_path: Path, day: str) -> None:
    quoted = f'"{day}"'
    imported = import_files([write(tmp_path / "a.csv", HEADER, ROW.replace("2020-01-02", quoted))])
    assert imported.frame["date"].to_list() == [date(2020, 1, 2)]


def test_gzip_and_parquet_and_csv_of_the_same_rows_are_the_same(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.csv", HEADER, ROW, ROW.replace("AAL", "BBB"))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    frame = import_files([plain]).frame
    frame.write_parquet(tmp_path / "a.parquet")
    assert import_files([tmp_path / "a.csv.gz"]).frame.equals(frame)
    assert import_files([tmp_path / "a.parquet"]).frame.equals(frame)


def test_a_file_without_a_symbol_column_is_one_symbol_named_by_the_file(tmp_path: Path) -> None:
    imported = import_files([write(tmp_path / "msft.csv", HEADER.removesuffix(",Name"), ROW.removesuffix(",AAL"))])
    assert imported.frame["symbol"].to_list() == ["MSFT"]


@pytest.mark.parametrize(
    "row",
    [
        "not a day,10,12,9,11,1000,AAL",
        "2020-02-30,10,12,9,11,1000,AAL",
        "2020-01-03,,12,9,11,1000,AAL",
        "2020-01-03,ten,12,9,11,1000,AAL",
        "2020-01-03,10,12,9,-11,1000,AAL",
        "2020-01-03,10,12,9,inf,1000,AAL",
        "2020-01-03,10,8,9,11,1000,AAL",
        "2020-01-03,10,12,11,11,1000,AAL",
        "2020-01-03,10,12,9,11,,AAL",
        "2020-01-03,10,12,9,11,-1,AAL",
        "2020-01-03,10,12,9,11,1000,",
        "2020-01-02,10,12,9,11,1000,AAL",
    ],
)
def test_a_bad_row_is_rejected_with_its_place_and_reason_and_the_others_are_taken(tmp_path: Path, row: str) -> None:
    imported = import_files([write(tmp_path / "a.csv", HEADER, ROW, row, ROW.replace("AAL", "BBB"))])
    assert imported.frame["symbol"].to_list() == ["AAL", "BBB"]
    (rejected,) = imported.rejected
    assert (rejected.file, rejected.row) in {("a.csv", 2), ("a.csv", 1)}  # of two of the same day either may go
    assert imported.counts == {rejected.reason: 1}
    assert (imported.rows, len(rejected.reason) > 5) == (3, True)


def test_rejected_rows_are_all_counted_and_the_first_thousand_told(tmp_path: Path) -> None:
    bad = [f"2020-01-03,10,8,9,11,1000,S{number}" for number in range(MAX_REJECTED + 500)]
    imported = import_files([write(tmp_path / "a.csv", HEADER, ROW, *bad)])
    assert len(imported.rejected) == MAX_REJECTED
    assert sum(imported.counts.values()) == MAX_REJECTED + 500


def test_later_files_win_on_the_same_day(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", HEADER, ROW)
    second = write(tmp_path / "b.csv", HEADER, ROW.replace("1000", "2000"))
    imported = import_files([first, second])
    assert (imported.frame["volume"].to_list(), imported.replaced) == ([2000], 1)


def test_prices_are_adjusted_and_volume_for_splits_alone(tmp_path: Path) -> None:
    rows = [
        "2020-01-01,100,110,90,100,1000,A,49.5",  # before a dividend of 1 % and a split of 2:1
        "2020-01-02,100,110,90,100,1000,A,50",
        "2020-01-03,50,55,45,50,2000,A,50",
    ]
    frame = import_files([write(tmp_path / "a.csv", HEADER + ",Adj Close", *rows)]).frame
    assert frame["close"].to_list() == pytest.approx([49.5, 50, 50])
    assert frame["open"].to_list() == pytest.approx([49.5, 50, 50])
    assert frame["volume"].to_list() == [2000, 2000, 2000]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "There is no file prices.csv"),
        (b"", "empty"),
        (b"\x00\x01\x02\xff\xfe" * 50, "prices.csv"),
        (b"PAR1 is not all of it", "prices.csv"),
        (gzip.compress(HEADER.encode())[:-9], "prices.csv"),
        (b"date,open,high,low,volume,Name\n2020-01-02,1,1,1,1,A\n", "close"),
        (HEADER.encode() + b"\n", "no rows"),
        (HEADER.encode() + b"\n2020-01-02,10,8,9,11,1000,A\n", "Not one row could be taken: 1 whose"),
    ],
    ids=["missing", "empty", "binary", "cut parquet", "cut gzip", "no close", "no rows", "no good row"],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "prices.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PricesError, match=said) as refusal:
        import_files([path])
    assert str(tmp_path) not in refusal.value.detail


def test_a_directory_is_refused_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PricesError, match=r"^\. is a directory; name the files"):
        import_files([Path(".")])


def test_the_real_table_survives_csv_and_import_but_for_its_dirt(real_prices: Path, tmp_path: Path) -> None:
    pl.read_parquet(real_prices).rename({"symbol": "Name"}).write_csv(tmp_path / "all.csv")
    imported = import_files([tmp_path / "all.csv"])
    assert imported.rows == 619_040
    assert imported.frame.height + sum(imported.counts.values()) == 619_040
    assert sum(imported.counts.values()) <= 27
    write_store(imported.frame, tmp_path / "prices.parquet", source="all.csv")
    assert len(open_store(tmp_path / "prices.parquet").symbols) == 505
