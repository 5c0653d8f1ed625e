"""What terminals show, and what logs say."""

import io
import json
import logging
from typing import Any

import pytest
from rich.console import Console

from app.commands.listings import print_scans
from app.commands.terminal import (
    LiveDisplay,
    PlainDisplay,
    ScanView,
    choose_columns,
    make_table,
    show_large,
    show_number,
    show_percent,
)
from app.observe.logs import ConsoleFormatter, JsonFormatter
from tests.scripted import SCAN, make_event, make_events, make_reset
from tests.test_eventstream import parse

ROW = {
    "symbol": "AAPL",
    "date": "2005-02-14",
    "setup": "gap-up",
    "close": 5.438067,
    "volume": 145409400,
    "gap_pct": 0.024012,
    "gap_atr": 0.851794,
    "adv20_usd": 161754344.757753,
    "parabolic_score": None,
    "vol_ratio": 1.414833,
    "some_new_column": 3,
}


def read_lines(width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(make_table(choose_columns([ROW], width), [ROW]))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_rows_are_shown_in_units_that_people_read() -> None:
    assert read_lines(120)[1].split("  ")[0] == "AAPL"
    assert read_lines(120)[1].split() == [
        *("AAPL", "2005-02-14", "5.44", "145,409,400", "+2.4%", "0.85", "161.8", "M", "–", "1.41", "3")
    ]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100])
def test_columns_that_do_not_fit_are_left_out_and_no_line_wraps(width: int) -> None:
    lines = read_lines(width)
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("symbol")


def test_rows_of_other_programs_may_hold_anything_under_any_name() -> None:
    """They can neither break the display nor command the terminal."""
    rows: list[dict[str, object]] = [
        {"symbol": None, "close": "n/a", "volume": True, "gap_pct": "[/x]", "adv20_usd": "\x1b[2J", "[red]\n": 1},
        {"close": 2, "[red]\n": "[bold]"},
    ]
    columns = choose_columns(rows)
    console = Console(file=io.StringIO(), width=200)
    console.print(make_table(columns, rows))
    assert isinstance(console.file, io.StringIO)
    out = io.StringIO()
    PlainDisplay(out, io.StringIO()).take(parse(make_event(1, "matches", {"chunk": 0, "rows": rows})))
    for shown in (console.file.getvalue(), out.getvalue()):
        assert len(shown.splitlines()) == 3
        assert "\x1b" not in shown
        for text in ("n/a", "yes", "[/x]", "[2J", "[red]", "[bold]"):
            assert text in shown


def test_without_a_total_only_what_is_done_is_shown() -> None:
    view = ScanView(SCAN)
    started = {"scanner": "external", "total": None, "unit": "pages\x07"}
    view.take(parse(make_event(1, "started", started)))
    progress = {"done": 7, "total": None, "rate": None, "eta_s": None}
    view.take(parse({**make_event(1, "progress", progress), "id": None}))
    console = Console(file=io.StringIO(), width=100)
    console.print(view.render())
    assert isinstance(console.file, io.StringIO)
    assert " 7 pages\N{REPLACEMENT CHARACTER}" in console.file.getvalue()


def test_numbers() -> None:
    assert [show_number(value) for value in (None, True, 1234567, 0.456, 1234567.8, "D1")] == [
        *("–", "yes", "1,234,567", "0.46", "1,234,568", "D1")
    ]
    assert [show_percent(value) for value in (None, 0.0512, -0.3)] == ["–", "+5.1%", "-30.0%"]
    assert [show_large(value) for value in (None, 12, 1500, -2.5e6, 3e9)] == ["–", "12", "1.5 k", "-2.5 M", "3.0 B"]


def test_a_view_sums_up_what_the_events_told() -> None:
    view = ScanView(SCAN, "gap-up")
    events = make_events(3)
    started = make_event(2, "started", {"scanner": "gap-up", "total": 5, "unit": "symbols"})
    for event in [events[0], started, *events[2:]]:
        view.take(parse(event))
    assert view.is_proved
    assert view.summarise().splitlines()[0] == "gap-up completed: 3 matches in 1.00 s over 5 symbols"


SYNTHETIC: dict[str, Any] = {
    "scanner": "gap-up",
    "total": 5,
    "unit": "symbols",
    "data_version": "synthetic-0123456789abcdef",
}


def test_invented_prices_are_marked_while_a_scan_is_shown_and_when_it_is_summed_up() -> None:
    view = ScanView(SCAN, "gap-up")
    console = Console(file=io.StringIO(), width=80)
    display = LiveDisplay([view], console)
    for event in [make_event(2, "started", SYNTHETIC), make_event(3, "matches", {"chunk": 0, "rows": [ROW]})]:
        view.take(parse(event))
        display.take(parse(event))
    console.print(display._render())
    assert isinstance(console.file, io.StringIO)
    assert "1 matches  SYNTHETIC, not real prices" in console.file.getvalue()
    view.take(parse(make_events(1)[-1]))
    assert "\nSYNTHETIC, not real prices." in view.summarise()


def test_among_several_scans_the_ones_over_invented_prices_are_named() -> None:
    views = [ScanView("s_1", "gap-up", data_version=SYNTHETIC["data_version"]), ScanView("s_2", "a-plus")]
    assert LiveDisplay(views, Console())._mark_synthetic() == "  SYNTHETIC, not real prices (gap-up)"


def test_invented_prices_are_still_marked_when_only_the_end_is_kept() -> None:
    view = ScanView(SCAN, "gap-up")
    view.take(parse(make_reset({"data_version": SYNTHETIC["data_version"]})))
    assert view.is_synthetic


def test_lines_of_invented_prices_are_announced_beside_them() -> None:
    out, aside = io.StringIO(), io.StringIO()
    PlainDisplay(out, aside).take(parse(make_event(2, "started", SYNTHETIC)))
    assert (out.getvalue(), aside.getvalue()) == ("", "SYNTHETIC, not real prices:\n")


@pytest.mark.parametrize(("data_version", "count"), [("synthetic-0123456789abcdef", 1), ("0123456789abcdef", 0)])
def test_a_list_of_scans_marks_those_over_invented_prices(
    data_version: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"id": "s_1", "scanner": "gap-up", "state": "completed", "matches": 3, "created_ts": 0}
    print_scans([{**one, "data_version": data_version}, {**one, "data_version": "00"}])
    assert capsys.readouterr().out.count("SYNTHETIC") == count


def test_rows_that_differ_from_those_found_are_said_to() -> None:
    view = ScanView(SCAN, "gap-up")
    for event in make_events(3)[2:-1] * 2 + make_events(3)[-1:]:
        view.take(parse(event))
    assert "NOT the ones" in view.summarise()


def test_a_reset_forgets_what_was_shown() -> None:
    view = ScanView(SCAN, "gap-up")
    for event in [*make_events(3)[2:4], make_reset({}), *make_events(3)[2:]]:
        view.take(parse(event))
    assert view.is_proved
    view.take(parse(make_reset(None)))
    assert (view.state, view.summarise()) == ("lost", f"gap-up {SCAN}: not kept by the server any more")


def test_an_end_with_an_error_and_skipped_rows_says_both() -> None:
    view = ScanView(SCAN, "gap-up")
    skipped = [{"symbol": "DHR", "reason": "2 rows without a price"}]
    end = {"state": "failed", "matches": 0, "digest": "", "elapsed_s": 2, "error": {"detail": "It broke."}}
    view.take(parse(make_event(9, "end", {**end, "skipped": skipped, "skipped_symbols": 7})))
    assert "Bad rows were left out of 7 symbols, such as DHR: 2 rows without a price\nIt broke." in view.summarise()


def test_plain_lines_have_one_header_and_stay_in_columns() -> None:
    out = io.StringIO()
    display = PlainDisplay(out, io.StringIO())
    for seq in (3, 4):
        display.take(parse(make_event(seq, "matches", {"chunk": 0, "rows": [ROW, {**ROW, "symbol": "FB"}]})))
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["symbol", "AAPL", "FB", "AAPL", "FB"]
    assert len(set(map(len, lines))) == 1


# Logs


def make_record(**extra: object) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"name": "app.x", "levelno": logging.INFO, "levelname": "INFO", "msg": "%d done", "args": (3,), **extra}
    )


def test_a_json_log_line_holds_the_extra_fields_and_no_secrets() -> None:
    line = json.loads(JsonFormatter().format(make_record(action="reaped", api_key="k1", scan="s_1")))
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "app.x",
        "message": "3 done",
        "action": "reaped",
        "api_key": "[hidden]",
        "scan": "s_1",
    }


def test_a_traceback_stays_within_the_json_line() -> None:
    try:
        raise ValueError("no")
    except ValueError as error:
        text = JsonFormatter().format(make_record(exc_info=(ValueError, error, error.__traceback__)))
    assert "\n" not in text
    assert "ValueError: no" in json.loads(text)["exception"]


def test_a_console_log_line_reads_as_a_sentence() -> None:
    assert (
        ConsoleFormatter()
        .format(make_record(action="reaped", token="t"))
        .endswith(" INFO    3 done  [action=reaped token=[hidden]]")
    )
