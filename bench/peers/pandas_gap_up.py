"""gap-up as it is usually written: pandas, one symbol after the other, with the columns that a match has."""

import numpy as np
import pandas as pd


def scan_symbol(bars: pd.DataFrame) -> pd.DataFrame:
    """The gap-up matches of one symbol; `bars` is sorted by date."""
    frame = bars.copy()
    frame["prev_close"] = frame["close"].shift(1)
    true_range = pd.concat(
        [
            frame["high"] - frame["low"],
            (frame["high"] - frame["prev_close"]).abs(),
            (frame["low"] - frame["prev_close"]).abs(),
        ],
        axis=1,
    ).max(axis=1)
    frame["atr"] = true_range.rolling(14).mean().shift(1)
    frame["volavg"] = frame["volume"].rolling(14).mean().shift(1)
    frame["adv20_usd"] = (frame["close"] * frame["volume"]).rolling(20).mean().shift(1)
    frame["gap_pct"] = frame["open"] / frame["prev_close"] - 1
    frame["gap_atr"] = (frame["open"] - frame["prev_close"]) / frame["atr"]
    frame["vol_ratio"] = frame["volume"] / frame["volavg"]
    frame["close_range"] = (frame["close"] - frame["low"]) / (frame["high"] - frame["low"])
    frame["parabolic_score"] = score(frame)
    matches = frame[
        (frame["prev_close"] >= 8)
        & (frame["adv20_usd"] >= 30_000_000)
        & (frame["volume"] >= 1_000_000)
        & (frame["high"] - frame["low"] >= 0.5)
        & frame["gap_pct"].between(0.05, 0.30)
        & (frame["gap_atr"] >= 0.5)
        & (frame["vol_ratio"] >= 1.5)
        & (frame["close_range"] >= 0.6)
    ]
    columns = ["symbol", "date", "close", "volume", "gap_pct", "gap_atr", "adv20_usd", "parabolic_score"]
    return matches[[*columns, "vol_ratio", "close_range"]]


def score(frame: pd.DataFrame) -> pd.Series:
    """The parabolic score of each day, from the day before."""
    yesterday, before, atr = frame.shift(1), frame.shift(2), frame["atr"]
    ema9 = frame["close"].ewm(span=9, adjust=False).mean().shift(1)
    stretch = (yesterday["high"] - yesterday["open"]) / atr
    above = (yesterday["high"] - ema9) / atr
    up = (
        (frame["close"] > frame["close"].shift(1))
        & (frame["close"] > frame["open"])
        & (frame["high"] > frame["high"].shift(1))
    ).astype(int)
    streak = up.shift(1) + up.shift(2)
    days_range = frame["high"] - frame["low"]
    expands = (days_range.shift(1) > days_range.shift(2)) & ((before["high"] - before["open"]) / atr >= 0.5)
    gap = (yesterday["open"] - before["close"]) / atr
    gap_before = gap.shift(1)
    volume = yesterday["volume"] / frame["volume"].rolling(5).mean().shift(1)
    points = (
        np.select([stretch >= 3, stretch >= 2, stretch >= 1, stretch >= 0.5], [20.0, 18.0, 15.0, 12.0], 0.0)
        + np.select([above >= 4, above >= 3, above >= 2, above >= 1], [30.0, 25.0, 20.0, 15.0], 0.0)
        + np.select(
            [
                (streak == 2) & expands & (gap >= 0.3),
                (streak == 2) & expands,
                streak == 2,
                (streak == 1) & expands & (gap >= 0.3),
            ],
            [20.0, 17.5, 15.0, 12.5],
            10.0,
        )
        + np.select([volume >= 2, volume >= 1.5, volume >= 1, volume >= 0.5], [10.0, 8.0, 5.0, 2.0], 0.0)
        + np.select([gap >= 0.5, gap >= 0.3, gap >= 0.1], [15.0, 10.0, 5.0], 0.0)
        + np.where((gap >= 0.3) & (gap_before >= 0.3), 5.0, 0.0)
    )
    return pd.Series(points, frame.index)


def scan(table: pd.DataFrame) -> pd.DataFrame:
    """The gap-up matches of all symbols in the table."""
    return pd.concat([scan_symbol(bars) for _, bars in table.groupby("symbol", sort=True)])
