"""Several setups in one pass over the prices, as the scan clients of old ask for.

One such request means up to five setups whose matches are merged. It is one scanner, rather than five scans that are
merged somewhere behind, because everything that Scanwire promises is promised of one scan: one id that the client can
poll, one slot, one progress that never runs backwards, checkpoints and a restart from them, one cancel, one end, and
joining by everyone who asks the same. It also reads the prices once. It is listed like any other scanner, as what it
is; the setups run with their defaults.
"""

from typing import Annotated, Literal, get_args

import polars as pl
from polars import col
from pydantic import Field, field_validator

from app.scanners import backside, largecap, momentum, parabolic
from app.scanners.params import MarketParams
from app.scanners.registry import Prices, Scanner

NAME = "legacy"
Setup = Literal["gap-up", "momentum-breakout", "volume-surge", "backside-b", "a-plus", "lc-d2", "lc-d2-1", "lc-d3-1"]
LARGE_CAP: tuple[Setup, ...] = ("gap-up", "volume-surge", "lc-d2", "lc-d2-1", "lc-d3-1")
# Told of each match, whether it was asked for or not: the same day must not have two answers.
MARKED: Setup = "lc-d2"
MARK = "lc_frontside_d2_extended"

_BY_NAME: dict[str, Scanner] = {
    scanner.name: scanner for module in (momentum, backside, parabolic, largecap) for scanner in module.SCANNERS
}


class LegacyParams(MarketParams):
    setups: Annotated[list[Setup], Field(min_length=1, max_length=len(_BY_NAME))] = Field(
        list(LARGE_CAP), description="a day is a match when one of these holds, with its defaults"
    )

    @field_validator("setups")
    @classmethod
    def _normalise_setups(cls, value: list[Setup]) -> list[Setup]:
        return [name for name in get_args(Setup) if name in value]


def find_any(prices: Prices, params: LegacyParams) -> pl.DataFrame:
    """The days on which any of the setups holds, each once."""
    wanted = dict.fromkeys((*params.setups, MARKED))
    found = [
        _BY_NAME[name].find(prices, _BY_NAME[name].params()).select("symbol", "date", setup=pl.lit(name))
        for name in wanted
    ]
    is_wanted = col("setup").is_in(params.setups)
    return (
        pl.concat(found)
        .group_by("symbol", "date", maintain_order=True)
        .agg(
            col("setup").filter(is_wanted).str.join(",").alias("setups"),
            (col("setup") == MARKED).any().alias(MARK),
            is_wanted.any().alias("is_wanted"),
        )
        .filter("is_wanted")
        .drop("is_wanted")
    )


SCANNERS = (
    Scanner(
        name=NAME,
        title="Legacy: several setups in one",
        summary="Days on which any of several setups holds, each once; what the scan clients of old ask for.",
        params=LegacyParams,
        find=find_any,
        columns={
            "setups": "those of the setups asked for that hold, with commas",
            MARK: f"whether {MARKED} holds, asked for or not",
        },
    ),
)
