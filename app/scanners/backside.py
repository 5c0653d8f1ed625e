"""Backside B: a gap after a parabolic push, while the price is still in the lower part of a three-year range."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import polars as pl
from pydantic import Field

from app.scanners.params import Count, MarketParams, Number
from app.scanners.registry import Prices, Scanner


class BacksideParams(MarketParams):
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "relaxed": {
            "price_min": 3.0,
            "adv20_min_usd": 5e6,
            "pos_abs_max": 0.85,
            "d1_green_atr_min": 0.15,
            "d1_volume_min": 1e6,
            "gap_div_atr_min": 0.3,
            "require_open_gt_prev_high": False,
            "open_over_ema9_min": 0.85,
            "atr_mult": 0.6,
            "vol_mult": 0.6,
            "slope5d_min": 1.5,
            "high_ema9_mult": 1.02,
        }
    }

    price_min: Number = Field(8.0, ge=0, le=1e6, description="close of D-2 and before the push, at least (price)")
    adv20_min_usd: Number = Field(30e6, ge=0, le=1e13, description="mean daily trading of 20 days, at least (USD)")
    pos_abs_max: Number = Field(0.75, ge=0, le=1, description="place in the long range, 0 low to 1 high, at most")
    abs_lookback_days: Count = Field(1000, ge=1, le=10_000, description="length of the long range (calendar days)")
    abs_exclude_days: Count = Field(10, ge=0, le=10_000, description="latest days kept out of it (calendar days)")
    trigger_mode: Literal["D1_only", "D1_or_D2"] = Field("D1_or_D2", description="the day or days the push may be on")
    d1_green_atr_min: Number = Field(0.30, ge=-100, le=100, description="close minus open of D-1, at least (ATR)")
    d1_volume_min: Number = Field(15e6, ge=0, le=1e12, description="volume of D-1, at least (shares)")
    d1_vol_mult_min: Number | None = Field(None, ge=0, le=1e6, description="volume of D-1 over its mean, at least")
    enforce_d1_above_d2: bool = Field(True, description="high and close of D-1 lie above those of D-2")
    gap_div_atr_min: Number = Field(0.75, ge=0, le=100, description="distance of the open from yesterday's close (ATR)")
    require_open_gt_prev_high: bool = Field(True, description="the open lies above the high of an earlier day")
    prior_high_lag: Count = Field(1, ge=1, le=2, description="which day's high that is: 1 is D-1, 2 is D-2")
    open_over_ema9_min: Number = Field(0.9, ge=0, le=100, description="open over EMA9, at least")
    atr_mult: Number = Field(0.9, ge=0, le=100, description="push: true range, at least (ATR)")
    vol_mult: Number = Field(0.9, ge=0, le=1e6, description="push: larger of two days' volumes over the mean, at least")
    slope5d_min: Number = Field(3.0, ge=-100, le=1e4, description="push: rise of EMA9 over 5 rows, at least (%)")
    high_ema9_mult: Number = Field(1.05, ge=-100, le=100, description="push: high minus EMA9, at least (ATR)")


def col(name: str, lag: int = 0) -> pl.Expr:
    return pl.col(f"{name}[{lag}]" if lag else name)


def mold(params: BacksideParams, lag: int) -> pl.Expr:
    """The push itself, on the day `lag` rows before the day judged."""
    return pl.all_horizontal(
        col("prev_close", lag) >= params.price_min,
        col("adv20_usd", lag) >= params.adv20_min_usd,
        col("range_atr", lag) >= params.atr_mult,
        pl.max_horizontal(col("volume", lag), col("volume", lag + 1)) / col("volavg14", lag) >= params.vol_mult,
        col("slope5", lag) >= params.slope5d_min,
        col("high_over_ema9_atr", lag) >= params.high_ema9_mult,
    ).fill_null(False)


def find_backside_b(prices: Prices, params: BacksideParams) -> pl.DataFrame:
    """Days that gap, a day or two after the push, while price is low in its long range."""
    pos_abs = col(f"pos_abs_{params.abs_lookback_days}_{params.abs_exclude_days}")
    pushed = mold(params, 1)
    if params.trigger_mode == "D1_or_D2":
        pushed = pushed | mold(params, 2)
    rules = [
        col("close", 2) >= params.price_min,
        col("adv20_usd", 1) >= params.adv20_min_usd,
        pos_abs <= params.pos_abs_max,
        pushed,
        col("body_atr", 1) >= params.d1_green_atr_min,
        col("volume", 1) >= params.d1_volume_min,
        col("gap_atr") >= params.gap_div_atr_min,
        col("open_over_ema9") >= params.open_over_ema9_min,
    ]
    if params.d1_vol_mult_min is not None:
        rules.append(col("vol_ratio", 1) >= params.d1_vol_mult_min)
    if params.enforce_d1_above_d2:
        rules += [col("high", 1) > col("high", 2), col("close", 1) > col("close", 2)]
    if params.require_open_gt_prev_high:
        rules.append(col("open") > col("high", params.prior_high_lag))
    return prices.matching(
        rules,
        {
            "trigger": pl.when(mold(params, 1)).then(pl.lit("D-1")).otherwise(pl.lit("D-2")),
            "pos_abs": pos_abs,
            "d1_body_atr": col("body_atr", 1),
            "d1_volume": col("volume", 1).round().cast(pl.Int64),
            "d1_vol_ratio": col("vol_ratio", 1),
            "open_over_ema9": col("open_over_ema9"),
        },
    )


SCANNERS = (
    Scanner(
        name="backside-b",
        title="Backside B",
        summary="A gap after a parabolic push, still in the lower three quarters of a three-year range.",
        params=BacksideParams,
        find=find_backside_b,
        columns={
            "trigger": "the day of the push: D-1 or D-2",
            "pos_abs": "place in the long range, 0 low to 1 high",
            "d1_body_atr": "close minus open of D-1 in ATR",
            "d1_volume": "volume of D-1 in shares",
            "d1_vol_ratio": "volume of D-1 over its 14-day mean",
            "open_over_ema9": "open over EMA9",
        },
    ),
)
