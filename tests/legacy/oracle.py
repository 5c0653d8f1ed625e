"""What clients of old must be shown, from the second implementation of the setups."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from app.market.store import open_store, read_rows
from app.scanners.registry import get_scanner
from tests import naive
from tests.test_scanners import histories_of

LARGE_CAP = ("gap-up", "volume-surge", "lc-d2", "lc-d2-1", "lc-d3-1")


class Oracle(NamedTuple):
    """The matches of each setup over a whole price table, with its defaults."""

    found: Mapping[str, naive.Found]

    def list_rows(
        self, start: str, end: str, setups: Sequence[str] = LARGE_CAP, **least: float
    ) -> dict[tuple[str, str], dict[str, Any]]:
        """The merged rows by ticker and date; `least` are bounds on columns."""
        merged = {}
        for setup in setups:
            for key, row in self.found[setup].rows.items():
                if start <= key[1] <= end and all(row[name] >= bound for name, bound in least.items()):
                    merged[key] = {
                        "ticker": key[0],
                        "date": key[1],
                        "gap_pct": row["gap_pct"],
                        "parabolic_score": row["parabolic_score"],
                        "lc_frontside_d2_extended": int(key in self.found["lc-d2"].rows),
                        "volume": round(row["volume"]),
                        "close": row["close"],
                        "confidence_score": row["parabolic_score"] / 100,
                    }
        return merged

    def check(self, rows: list[dict[str, Any]], start: str, end: str, *setups: str, **least: float) -> None:
        """Asserts that these are all rows, once each and best score first."""
        wanted = self.list_rows(start, end, setups or LARGE_CAP, **least)
        shown = {(row["ticker"], row["date"]): row for row in rows}
        assert len(shown) == len(rows)
        undecided = {key for setup in setups or LARGE_CAP for key in self.found[setup].undecided}
        assert (shown.keys() ^ wanted.keys()) <= undecided
        for key in shown.keys() & wanted.keys():
            assert shown[key].keys() == wanted[key].keys()
            assert shown[key] == {
                name: pytest.approx(value, rel=1e-6, abs=1e-6) if isinstance(value, float) else value
                for name, value in wanted[key].items()
            }
        scores = [row["parabolic_score"] for row in rows]
        assert scores == sorted(scores, reverse=True)


def ask_oracle(prices: Path, setups: Sequence[str]) -> Oracle:
    frame = read_rows(prices, [(0, open_store(prices).rows)])[0]
    histories = histories_of(frame)
    return Oracle({name: naive.find(name, histories, get_scanner(name).params()) for name in setups})
