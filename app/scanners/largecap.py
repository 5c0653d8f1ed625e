"""Large-cap frontside, extended: a strong stock making new highs for two or three days, far above its means."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import polars as pl
from pydantic import Field

from app.scanners.params import MarketParams, Number
from app.scanners.registry import Prices, Scanner

TIERS = (5.0, 15.0, 25.0, 50.0, 90.0)  # the lowest close of T1 to T5; T5 has no upper end

Tiered = Annotated[list[Annotated[Number, Field(ge=-1, le=1000)]], Field(min_length=5, max_length=5)]


def col(name: str, lag: int = 0) -> pl.Expr:
    return pl.col(f"{name}[{lag}]" if lag else name)


def by_tier(values: Sequence[float]) -> pl.Expr:
    """The value of today's price tier; null below the lowest tier, so that no rule holds there."""
    chosen: pl.Expr = pl.lit(None, pl.Float64)
    for bound, value in zip(TIERS, values, strict=True):
        chosen = pl.when(col("close") >= bound).then(pl.lit(value, pl.Float64)).otherwise(chosen)
    return chosen


class FrontsideParams(MarketParams):
    """Thresholds that all three setups have."""

    close_min: Number = Field(5.0, ge=0, le=1e6, description="close, at least (price)")
    volume_min: Number = Field(10e6, ge=0, le=1e12, description="volume, at least (shares)")
    dollar_volume_min: Number = Field(500e6, ge=0, le=1e13, description="close times volume, at least (USD)")

    def common_rules(self) -> list[pl.Expr]:
        return [
            col("close") >= self.close_min,
            col("volume") >= self.volume_min,
            col("dollar_volume") >= self.dollar_volume_min,
            col("high") >= col("high", 1),
            col("low") >= col("low", 1),
            col("close") >= col("open"),
            col("high") >= col("high20"),
            col("ema9") >= col("ema20"),
            col("ema20") >= col("ema50"),
        ]


_RELAXED_D2: dict[str, Any] = {
    "volume_min": 1e6,
    "dollar_volume_min": 20e6,
    "dollar_volume5_min": 50e6,
    "high_pct_min": [0.10, 0.08, 0.06, 0.05, 0.04],
    "extension_min": [0.5, 0.4, 0.3, 0.2, 0.1],
    "high_change_atr_min": 0.8,
    "high_over_ema9_atr_min": 1.0,
    "high_over_ema20_atr_min": 1.5,
    "breakout_atr_min": 0.3,
}


class D2Params(FrontsideParams):
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"relaxed": {**_RELAXED_D2, "low_over_ema9_atr_min": 0.0}}

    high_pct_min: Tiered = Field(
        [0.50, 0.30, 0.20, 0.15, 0.10], description="high over yesterday's close minus 1, at least, for tiers T1 to T5"
    )
    extension_min: Tiered = Field(
        [2.5, 2.0, 1.5, 1.0, 0.75], description="yesterday's 5-day high over its 20-day low minus 1, for T1 to T5"
    )
    high_change_atr_min: Number = Field(1.5, ge=-100, le=100, description="high minus open, at least (ATR)")
    high_over_ema9_atr_min: Number = Field(2.0, ge=-100, le=100, description="high minus EMA9, at least (ATR)")
    high_over_ema20_atr_min: Number = Field(3.0, ge=-100, le=100, description="high minus EMA20, at least (ATR)")
    low_over_ema9_atr_min: Number | None = Field(
        1.0, ge=-100, le=100, description="low minus EMA9, at least (ATR); null for no such rule"
    )
    dollar_volume5_min: Number = Field(500e6, ge=0, le=1e13, description="trading of the 5 days before, at least (USD)")
    breakout_atr_min: Number = Field(1.0, ge=-100, le=100, description="high minus yesterday's 20-day high (ATR)")


class D21Params(D2Params):
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"relaxed": {**_RELAXED_D2}}

    high_pct_min: Tiered = Field(
        [1.0, 0.50, 0.30, 0.20, 0.15], description="high over yesterday's close minus 1, at least, for tiers T1 to T5"
    )
    low_over_ema9_atr_min: Number | None = Field(
        None, ge=-100, le=100, description="low minus EMA9, at least (ATR); null for no such rule"
    )


def find_d2(prices: Prices, params: D2Params) -> pl.DataFrame:
    """Days of a new 20-day high, far above yesterday's close and the means, in a stock already extended."""
    rules = [
        *params.common_rules(),
        col("high_pct") >= by_tier(params.high_pct_min),
        col("ext2") >= by_tier(params.extension_min),
        col("high_change_atr") >= params.high_change_atr_min,
        col("high_over_ema9_atr") >= params.high_over_ema9_atr_min,
        col("high_over_ema20_atr") >= params.high_over_ema20_atr_min,
        col("dollar_volume5") >= params.dollar_volume5_min,
        col("breakout1_atr") >= params.breakout_atr_min,
    ]
    if params.low_over_ema9_atr_min is not None:
        rules.append(col("low_over_ema9_atr") >= params.low_over_ema9_atr_min)
    return prices.matching(rules, {name: col(name) for name in _D2_COLUMNS})


class D3Params(FrontsideParams):
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "relaxed": {
            "volume_min": 1e6,
            "dollar_volume_min": 20e6,
            "d1_volume_min": 1e6,
            "d1_dollar_volume_min": 10e6,
            "high_pct_min": [0.06, 0.05, 0.04, 0.03, 0.02],
            "extension_min": [0.5, 0.4, 0.3, 0.2, 0.1],
            "high_change_atr_min": 0.5,
            "d1_high_change_atr_min": 0.3,
            "high_over_ema9_atr_min": 1.0,
            "high_over_ema20_atr_min": 1.2,
            "breakout_atr_min": 0.8,
        }
    }

    high_pct_min: Tiered = Field(
        [0.30, 0.20, 0.10, 0.07, 0.05],
        description="high over the close before minus 1, on D0 and D-1, at least, for tiers T1 to T5 of today's close",
    )
    extension_min: Tiered = Field(
        [2.5, 2.0, 1.5, 1.0, 0.75], description="high over the 20-day low minus 1, at least, for T1 to T5"
    )
    high_change_atr_min: Number = Field(1.0, ge=-100, le=100, description="high minus open, at least (ATR)")
    d1_high_change_atr_min: Number = Field(0.7, ge=-100, le=100, description="the same on D-1 (ATR of D-1)")
    high_over_ema9_atr_min: Number = Field(1.5, ge=-100, le=100, description="high minus EMA9, D0 and D-1 (ATR)")
    high_over_ema20_atr_min: Number = Field(2.0, ge=-100, le=100, description="high minus EMA20, D0 and D-1 (ATR)")
    d1_volume_min: Number = Field(10e6, ge=0, le=1e12, description="volume of D-1, at least (shares)")
    d1_dollar_volume_min: Number = Field(100e6, ge=0, le=1e13, description="close times volume of D-1 (USD)")
    breakout_atr_min: Number = Field(2.5, ge=-100, le=100, description="high minus the 20-day high of D-2 (ATR)")


def find_d3(prices: Prices, params: D3Params) -> pl.DataFrame:
    """Days that are the second in a row of rising highs and lows, far above the means on both."""
    rules = [
        *params.common_rules(),
        col("high", 1) >= col("high", 2),
        col("low", 1) >= col("low", 2),
        col("close", 1) >= col("open", 1),
        col("volume", 1) >= params.d1_volume_min,
        col("dollar_volume", 1) >= params.d1_dollar_volume_min,
        col("ext3") >= by_tier(params.extension_min),
        col("high_change_atr") >= params.high_change_atr_min,
        col("high_change_atr", 1) >= params.d1_high_change_atr_min,
        col("breakout2_atr") >= params.breakout_atr_min,
    ]
    for lag in (0, 1):
        rules += [
            col("high_pct", lag) >= by_tier(params.high_pct_min),
            col("high_over_ema9_atr", lag) >= params.high_over_ema9_atr_min,
            col("high_over_ema20_atr", lag) >= params.high_over_ema20_atr_min,
        ]
    d1 = {"d1_high_pct": col("high_pct", 1), "d1_high_change_atr": col("high_change_atr", 1)}
    return prices.matching(rules, {name: col(name) for name in _D3_COLUMNS if name not in d1} | d1)


_MEANS = {
    "high_pct": "high over yesterday's close, minus 1",
    "high_change_atr": "high minus open in ATR",
    "high_over_ema9_atr": "high minus EMA9 in ATR",
    "high_over_ema20_atr": "high minus EMA20 in ATR",
    "dollar_volume": "close times volume in USD",
}
_D2_COLUMNS = {
    **_MEANS,
    "ext2": "yesterday's 5-day high over its 20-day low, minus 1",
    "low_over_ema9_atr": "low minus EMA9 in ATR",
    "breakout1_atr": "high minus yesterday's 20-day high in ATR",
}
_D3_COLUMNS = {
    **_MEANS,
    "ext3": "high over the 20-day low, minus 1",
    "breakout2_atr": "high minus the 20-day high of D-2 in ATR",
    "d1_high_pct": "high of D-1 over the close before it, minus 1",
    "d1_high_change_atr": "high minus open of D-1 in its ATR",
}

SCANNERS = (
    Scanner(
        name="lc-d2",
        title="Large cap frontside D2 extended",
        summary="A new high far above a stock's means, whose low stays above EMA9.",
        params=D2Params,
        find=find_d2,
        columns=_D2_COLUMNS,
    ),
    Scanner(
        name="lc-d2-1",
        title="Large cap frontside D2 extended 1",
        summary="As lc-d2, with a larger jump today and no rule for the low.",
        params=D21Params,
        find=find_d2,
        columns=_D2_COLUMNS,
    ),
    Scanner(
        name="lc-d3-1",
        title="Large cap frontside D3 extended 1",
        summary="A second day in a row of higher highs and lows, far above the means on both days.",
        params=D3Params,
        find=find_d3,
        columns=_D3_COLUMNS,
    ),
)
