"""The parameters that every market scanner takes, in one canonical form: equal meaning gives equal JSON."""

import math
import re
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

MAX_SYMBOLS = 10_000
MAX_WHERE_CHARS = 1_000
_SYMBOL = re.compile(r"[A-Z0-9][A-Z0-9.\-^=/_]{0,19}")


def _read_number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value + 0.0 if isinstance(value, float) else value  # -0.0 becomes 0.0


def _read_count(value: object) -> object:
    value = _read_number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 5.0 is an integer in JSON Schema


def _read_date(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d{2}-\d{2}", value, re.ASCII):
        return date.fromisoformat(value)
    if value is None or type(value) is date:
        return value
    raise ValueError("must be a date written as YYYY-MM-DD")


Number = Annotated[float, BeforeValidator(_read_number)]
Count = Annotated[int, BeforeValidator(_read_count)]
Day = Annotated[date, BeforeValidator(_read_date)]


# As people in the field write them; every other word is one.
_TERMS = {"d1": "D-1", "d2": "D-2", "vol": "volume", "prev": "previous", "gt": "above"}
_ACRONYM = re.compile(r"(atr|adv|ema|usd)\d*")


def make_title(name: str, _: object = None) -> str:
    """A parameter's name as the label of its field: `adv20_min_usd` is "ADV20 min USD"."""
    words = [word.upper() if _ACRONYM.fullmatch(word) else _TERMS.get(word, word) for word in name.split("_")]
    title = " ".join(words)
    return title[0].upper() + title[1:]


class MarketParams(BaseModel):
    """What every market scanner takes. Days, symbols and `where` choose among matches; history is never cut."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, strict=True, field_title_generator=make_title
    )

    # Named sets of values; what is given beside `preset` overrides them.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    start: Day | None = Field(None, description="first day of matches, YYYY-MM-DD")
    end: Day | None = Field(None, description="last day of matches, included, YYYY-MM-DD")
    symbols: Annotated[list[str], Field(min_length=1, max_length=MAX_SYMBOLS)] | None = Field(
        None, description="only these symbols; all when left out"
    )
    where: Annotated[str, Field(max_length=MAX_WHERE_CHARS)] | None = Field(
        None, description="SQL condition on price columns and features, such as: close > 20 AND vol_ratio > 3"
    )
    # Resolved into the values that it stands for, and so never part of the canonical form.
    preset: Literal["relaxed"] | None = Field(None, exclude=True, description="values to start from")

    @model_validator(mode="before")
    @classmethod
    def _resolve_preset(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and (name := values.get("preset")) is not None:
            if not isinstance(name, str) or name not in cls.presets:
                return values  # the field's own check refuses it
            given = {key: value for key, value in values.items() if key != "preset"}
            return {**cls.presets[name], **given}
        return values

    @field_validator("symbols")
    @classmethod
    def _normalise_symbols(cls, value: list[str] | None) -> list[str] | None:
        if value is None:
            return None
        symbols = sorted({symbol.strip().upper() for symbol in value})
        for symbol in symbols:
            if not _SYMBOL.fullmatch(symbol):
                raise ValueError(f"{symbol[:24]!r} is not a symbol such as AAPL or BRK.B")
        return symbols

    @field_validator("where")
    @classmethod
    def _normalise_where(cls, value: str | None) -> str | None:
        return (value.strip() or None) if value is not None else None

    @model_validator(mode="after")
    def _check_range(self) -> "MarketParams":
        if self.start and self.end and self.start > self.end:
            raise ValueError(f"start: {self.start} is after end, {self.end}")
        return self
