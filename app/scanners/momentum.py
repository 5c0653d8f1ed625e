"""Gap-up, momentum breakout and volume surge: liquid stocks that move today, with volume behind it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import polars as pl
from polars import col
from pydantic import Field, model_validator

from app.scanners.params import MarketParams, Number
from app.scanners.registry import Prices, Scanner


class LiquidParams(MarketParams):
    """Price, trading and day's range that make a stock worth looking at."""

    prev_close_min: Number = Field(8.0, ge=0, le=1e6, description="yesterday's close, at least (price)")
    adv20_min_usd: Number = Field(30e6, ge=0, le=1e13, description="mean daily trading of 20 days, at least (USD)")
    volume_min: Number = Field(1e6, ge=0, le=1e12, description="volume today, at least (shares)")
    range_min: Number = Field(0.5, ge=0, le=1e6, description="high minus low, at least (price)")

    def common_rules(self) -> list[pl.Expr]:
        return [
            col("prev_close") >= self.prev_close_min,
            col("adv20_usd") >= self.adv20_min_usd,
            col("volume") >= self.volume_min,
            col("range") >= self.range_min,
        ]


_RELAXED_LIQUID = {"prev_close_min": 3.0, "adv20_min_usd": 5e6, "volume_min": 500_000, "range_min": 0.1}


class GapUpParams(LiquidParams):
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "relaxed": {
            **_RELAXED_LIQUID,
            "gap_pct_min": 0.02,
            "gap_atr_min": 0.3,
            "vol_ratio_min": 1.0,
            "close_range_min": 0.4,
        }
    }

    gap_pct_min: Number = Field(0.05, ge=-1, le=100, description="open over yesterday's close minus 1, at least")
    gap_pct_max: Number = Field(0.30, ge=-1, le=100, description="open over yesterday's close minus 1, at most")
    gap_atr_min: Number = Field(0.5, ge=-100, le=100, description="open minus yesterday's close, at least (ATR)")
    vol_ratio_min: Number = Field(1.5, ge=0, le=1e6, description="volume over its 14-day mean, at least")
    close_range_min: Number = Field(0.6, ge=0, le=1, description="where the close lies in the day's range, at least")

    @model_validator(mode="after")
    def _check_gap(self) -> "GapUpParams":
        if self.gap_pct_min > self.gap_pct_max:
            raise ValueError(f"gap_pct_min: must not be above gap_pct_max, {self.gap_pct_max:g}")
        return self


def find_gap_up(prices: Prices, params: GapUpParams) -> pl.DataFrame:
    """Days that open well above yesterday's close, on volume, and close in the upper part of their range."""
    return prices.matching(
        [
            *params.common_rules(),
            col("gap_pct").is_between(params.gap_pct_min, params.gap_pct_max),
            col("open_gap_atr") >= params.gap_atr_min,
            col("vol_ratio") >= params.vol_ratio_min,
            col("close_range") >= params.close_range_min,
        ],
        {"vol_ratio": col("vol_ratio"), "close_range": col("close_range")},
    )


class BreakoutParams(LiquidParams):
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "relaxed": {
            **_RELAXED_LIQUID,
            "slope5_min": 5.0,
            "slope15_min": 10.0,
            "high_over_ema9_atr_min": 1.0,
            "range_atr_min": 0.8,
            "vol_ratio_min": 1.0,
            "close_range_min": 0.5,
        }
    }

    slope5_min: Number = Field(10.0, ge=-100, le=1e4, description="rise of EMA9 over 5 rows, at least (%)")
    slope15_min: Number = Field(20.0, ge=-100, le=1e4, description="rise of EMA9 over 15 rows, at least (%)")
    high_over_ema9_atr_min: Number = Field(1.5, ge=-100, le=100, description="high minus EMA9, at least (ATR)")
    range_atr_min: Number = Field(1.0, ge=0, le=100, description="true range, at least (ATR)")
    vol_ratio_min: Number = Field(1.5, ge=0, le=1e6, description="volume over its 14-day mean, at least")
    close_range_min: Number = Field(0.7, ge=0, le=1, description="where the close lies in the day's range, at least")
    require_open_above_ema9: bool = Field(True, description="the open lies above EMA9")


def find_momentum_breakout(prices: Prices, params: BreakoutParams) -> pl.DataFrame:
    """Days of a steep rise that reach far above EMA9 on volume and close near their high."""
    rules = [
        *params.common_rules(),
        col("slope5") >= params.slope5_min,
        col("slope15") >= params.slope15_min,
        col("high_over_ema9_atr") >= params.high_over_ema9_atr_min,
        col("range_atr") >= params.range_atr_min,
        col("vol_ratio") >= params.vol_ratio_min,
        col("close_range") >= params.close_range_min,
    ]
    if params.require_open_above_ema9:
        rules.append(col("open") > col("ema9"))
    names = ("slope5", "slope15", "high_over_ema9_atr", "vol_ratio", "close_range", "range_atr")
    return prices.matching(rules, {name: col(name) for name in names})


class SurgeParams(LiquidParams):
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "relaxed": {
            **_RELAXED_LIQUID,
            "change_pct_min": -0.05,
            "change_pct_max": 0.2,
            "range_atr_min": 0.5,
            "vol_ratio_min": 1.5,
            "vol_ratio_max": 20.0,
            "close_range_min": 0.3,
        }
    }

    change_pct_min: Number = Field(-0.02, ge=-1, le=100, description="close over yesterday's close minus 1, at least")
    change_pct_max: Number = Field(0.10, ge=-1, le=100, description="close over yesterday's close minus 1, at most")
    range_atr_min: Number = Field(0.8, ge=0, le=100, description="true range, at least (ATR)")
    vol_ratio_min: Number = Field(2.0, ge=0, le=1e6, description="volume over its 14-day mean, at least")
    vol_ratio_max: Number = Field(10.0, ge=0, le=1e6, description="volume over its 14-day mean, at most")
    close_range_min: Number = Field(0.5, ge=0, le=1, description="where the close lies in the day's range, at least")

    @model_validator(mode="after")
    def _check_bounds(self) -> "SurgeParams":
        if self.change_pct_min > self.change_pct_max:
            raise ValueError(f"change_pct_min: must not be above change_pct_max, {self.change_pct_max:g}")
        if self.vol_ratio_min > self.vol_ratio_max:
            raise ValueError(f"vol_ratio_min: must not be above vol_ratio_max, {self.vol_ratio_max:g}")
        return self


def find_volume_surge(prices: Prices, params: SurgeParams) -> pl.DataFrame:
    """Days whose volume is several times its mean while the price moves little."""
    return prices.matching(
        [
            *params.common_rules(),
            col("change_pct").is_between(params.change_pct_min, params.change_pct_max),
            col("range_atr") >= params.range_atr_min,
            col("vol_ratio").is_between(params.vol_ratio_min, params.vol_ratio_max),
            col("close_range") >= params.close_range_min,
        ],
        {name: col(name) for name in ("change_pct", "vol_ratio", "close_range", "range_atr")},
    )


_MEANS = {
    "vol_ratio": "volume over its 14-day mean",
    "close_range": "where the close lies in the day's range, 0..1",
    "range_atr": "true range in ATR",
}

SCANNERS = (
    Scanner(
        name="gap-up",
        title="Gap up",
        summary="Opens 5 to 30 % above yesterday's close, on volume, and holds it.",
        params=GapUpParams,
        find=find_gap_up,
        columns={name: _MEANS[name] for name in ("vol_ratio", "close_range")},
    ),
    Scanner(
        name="momentum-breakout",
        title="Momentum breakout",
        summary="A steep rise that reaches far above its 9-day mean, on volume, and closes near the high.",
        params=BreakoutParams,
        find=find_momentum_breakout,
        columns={
            "slope5": "rise of EMA9 over 5 rows in %",
            "slope15": "rise of EMA9 over 15 rows in %",
            "high_over_ema9_atr": "high minus EMA9 in ATR",
            **_MEANS,
        },
    ),
    Scanner(
        name="volume-surge",
        title="Volume surge",
        summary="Two to ten times the usual volume while the price moves little.",
        params=SurgeParams,
        find=find_volume_surge,
        columns={"change_pct": "close over yesterday's close, minus 1", **_MEANS},
    ),
)
