"""A+: a daily parabolic move, stretched far above its means and still speeding up."""

from collections.abc import Mapping
from typing import Any, ClassVar

import polars as pl
from polars import col
from pydantic import Field

from app.scanners.params import MarketParams, Number
from app.scanners.registry import Prices, Scanner


class APlusParams(MarketParams):
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "relaxed": {
            "prev_close_min": 3.0,
            "adv20_min_usd": 5e6,
            "d1_range_atr_min": 1.0,
            "vol_ratio_min": 0.8,
            "d1_vol_ratio_min": 1.0,
            "slope3_min": 2.0,
            "slope5_min": 4.0,
            "slope15_min": 8.0,
            "high_over_ema9_atr_min": 1.5,
            "high_over_ema20_atr_min": 2.0,
            "low_pct7_min": 0.3,
            "low_pct14_min": 0.5,
            "gap_atr_min": 0.2,
            "open_over_ema9_min": 0.95,
            "atr_change_pct_min": 1.0,
            "prev_close_above": 3.0,
            "move2_atr_min": 0.5,
            "move3_atr_min": 0.8,
        }
    }

    prev_close_min: Number = Field(8.0, ge=0, le=1e6, description="yesterday's close, at least (price)")
    adv20_min_usd: Number = Field(30e6, ge=0, le=1e13, description="mean daily trading of 20 days, at least (USD)")
    d1_range_atr_min: Number = Field(2.5, ge=0, le=100, description="true range of D-1, at least (today's ATR)")
    vol_ratio_min: Number = Field(2.0, ge=0, le=1e6, description="volume over its 14-day mean, at least")
    d1_vol_ratio_min: Number = Field(2.0, ge=0, le=1e6, description="volume of D-1 over today's 14-day mean, at least")
    slope3_min: Number = Field(10.0, ge=-100, le=1e4, description="rise of EMA9 over 3 rows, at least (%)")
    slope5_min: Number = Field(20.0, ge=-100, le=1e4, description="rise of EMA9 over 5 rows, at least (%)")
    slope15_min: Number = Field(50.0, ge=-100, le=1e4, description="rise of EMA9 over 15 rows, at least (%)")
    high_over_ema9_atr_min: Number = Field(3.5, ge=-100, le=100, description="high minus EMA9, at least (ATR)")
    high_over_ema20_atr_min: Number = Field(5.0, ge=-100, le=100, description="high minus EMA20, at least (ATR)")
    low_pct7_min: Number = Field(0.5, ge=0, le=1e6, description="rise above the low of 7 rows, at least (% per ATR)")
    low_pct14_min: Number = Field(1.5, ge=0, le=1e6, description="rise above the low of 14 rows, at least (% per ATR)")
    gap_atr_min: Number = Field(0.5, ge=0, le=100, description="distance of the open from yesterday's close (ATR)")
    open_over_ema9_min: Number = Field(1.0, ge=0, le=100, description="open over EMA9, at least")
    atr_change_pct_min: Number = Field(9.0, ge=-100, le=1e6, description="rise of ATR since yesterday, at least (%)")
    prev_close_above: Number = Field(10.0, ge=0, le=1e6, description="yesterday's close, above (price)")
    move2_atr_min: Number = Field(2.0, ge=-100, le=100, description="rise of the close from D-3 to D-1, at least (ATR)")
    move3_atr_min: Number = Field(2.5, ge=-100, le=100, description="rise of the close from D-4 to D-1, at least (ATR)")
    require_green_d1: bool = Field(False, description="D-1 closed above its open")
    require_open_gt_prev_high: bool = Field(False, description="the open lies above the high of D-1")


_AT_LEAST = (
    "slope3",
    "slope5",
    "slope15",
    "high_over_ema9_atr",
    "high_over_ema20_atr",
    "low_pct7",
    "low_pct14",
    "gap_atr",
    "open_over_ema9",
    "atr_change_pct",
    "move2_atr",
    "move3_atr",
    "vol_ratio",
)  # each of these features has a parameter `<feature>_min`


def find_a_plus(prices: Prices, params: APlusParams) -> pl.DataFrame:
    """Days of a parabolic move that gap, on volume, far above EMA9 and EMA20."""
    d1_range_atr = col("tr[1]") / col("atr")
    d1_vol_ratio = col("volume[1]") / col("volavg14")
    rules = [
        col("prev_close") >= params.prev_close_min,
        col("prev_close") > params.prev_close_above,
        col("adv20_usd") >= params.adv20_min_usd,
        col("atr") > 0,
        d1_range_atr >= params.d1_range_atr_min,
        d1_vol_ratio >= params.d1_vol_ratio_min,
        *(col(name) >= getattr(params, f"{name}_min") for name in _AT_LEAST),
    ]
    if params.require_green_d1:
        rules.append(col("close[1]") > col("open[1]"))
    if params.require_open_gt_prev_high:
        rules.append(col("open") > col("high[1]"))
    own = {name: col(name) for name in _AT_LEAST if name != "gap_atr"}
    return prices.matching(rules, {"d1_range_atr": d1_range_atr, "d1_vol_ratio": d1_vol_ratio, **own})


SCANNERS = (
    Scanner(
        name="a-plus",
        title="A+ parabolic",
        summary="A daily parabolic move: stretched far above its means, on volume, and speeding up.",
        params=APlusParams,
        find=find_a_plus,
        columns={
            "d1_range_atr": "true range of D-1 in today's ATR",
            "d1_vol_ratio": "volume of D-1 over today's 14-day mean",
            "slope3": "rise of EMA9 over 3 rows in %",
            "slope5": "rise of EMA9 over 5 rows in %",
            "slope15": "rise of EMA9 over 15 rows in %",
            "high_over_ema9_atr": "high minus EMA9 in ATR",
            "high_over_ema20_atr": "high minus EMA20 in ATR",
            "low_pct7": "rise above the low of 7 rows in % per ATR",
            "low_pct14": "rise above the low of 14 rows in % per ATR",
            "open_over_ema9": "open over EMA9",
            "atr_change_pct": "rise of ATR since yesterday in %",
            "move2_atr": "rise of the close from D-3 to D-1 in ATR",
            "move3_atr": "rise of the close from D-4 to D-1 in ATR",
            "vol_ratio": "volume over its 14-day mean",
        },
    ),
)
