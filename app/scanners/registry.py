"""Which scanners there are, and how their parameters are checked."""

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol

import polars as pl
from pydantic import ValidationError

from app.core.errors import InvalidParams
from app.scanners.params import MarketParams

ENTRY_POINT_GROUP = "scanwire.scanners"
EXTERNAL = "external"  # names the scans whose work is done elsewhere; no scanner can have this name
logger = logging.getLogger("scanwire.scanners")


class Prices(Protocol):
    """One chunk of the price table, whole symbols sorted by symbol and date, as a scanner sees it."""

    def with_features(self, names: Iterable[str]) -> pl.DataFrame:
        """All rows, with a column for each price and feature named: `atr`, `close[1]` for yesterday's close."""
        ...

    def matching(self, rules: Sequence[pl.Expr], measures: Mapping[str, pl.Expr] | None = None) -> pl.DataFrame:
        """Symbol, date and the measures of the rows on which every rule holds; a rule on null does not hold.

        Rules and measures name prices and features by `pl.col`; only those that they name are computed.
        """
        ...


Find = Callable[[Prices, Any], pl.DataFrame]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scanner:
    """A named kind of scan: what it takes, and a pure function that finds the matches in one chunk.

    `find(prices, params)` returns a frame with `symbol`, `date` and the setup's own columns, one row per match. It
    sees whole symbols with their whole history; days, `where` and the columns common to all setups are added later.
    """

    name: str
    title: str
    summary: str  # one sentence for people
    params: type[MarketParams]
    find: Find
    unit: str = "symbols"
    columns: Mapping[str, str]  # the setup's own columns and what they mean

    @property
    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        return self.params.presets


@cache
def _load() -> dict[str, Scanner]:
    from app.scanners import backside, largecap, legacy, momentum, parabolic

    modules = (momentum, backside, parabolic, largecap, legacy)
    scanners = {scanner.name: scanner for module in modules for scanner in module.SCANNERS}
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        try:
            scanner = entry.load()
            if not isinstance(scanner, Scanner):
                raise TypeError(f"it is a {type(scanner).__name__}, not a Scanner")
            if scanner.name in (*scanners, EXTERNAL):
                raise ValueError(f"there is a scanner {scanner.name!r} already")
        except Exception as error:  # the code of others: it must not keep the service from starting
            logger.warning("The scanner %s is left out: %s", entry.name, error, extra={"action": "scanner_left_out"})
        else:
            scanners[scanner.name] = scanner
    return scanners


def list_scanners() -> tuple[Scanner, ...]:
    """Every scanner that can be run, the built-in ones first. Entry points are loaded once per process."""
    return tuple(_load().values())


def get_scanner(name: str) -> Scanner:
    """The scanner of this name. Raises InvalidParams, which names those there are and the nearest."""
    scanners = _load()
    if name in scanners:
        return scanners[name]
    raise InvalidParams.of(
        "scanner",
        f"{name[:64]!r} is not a scanner; {_suggest(name, (*scanners, EXTERNAL))}"
        f"there are: {', '.join((*scanners, EXTERNAL))}",
    )


def validate_params(scanner: Scanner, raw: Mapping[str, Any]) -> MarketParams:
    """The parameters with every default and preset filled in; equal meaning gives an equal `model_dump(mode="json")`.

    Raises InvalidParams, which names each field that is wrong and says what would be right.
    """
    try:
        return scanner.params.model_validate(dict(raw))
    except ValidationError as error:
        raise InvalidParams([_explain(scanner, dict(problem)) for problem in error.errors(include_url=False)]) from None


def _explain(scanner: Scanner, problem: dict[str, Any]) -> dict[str, str]:
    """One of pydantic's errors in plain words."""
    path = [str(part) for part in problem["loc"]]
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not path:  # a check on the whole: its message starts with the field
        field, _, rest = message.partition(": ")
        return {"field": field, "message": rest} if rest else {"field": "params", "message": message}
    if problem["type"] == "extra_forbidden":
        names = list(scanner.params.model_fields)
        message = f"is not a parameter of {scanner.name}; {_suggest(path[0], names)}there are: {', '.join(names)}"
    elif problem["type"] == "literal_error" and path[0] == "preset":
        message = f"must be one of: {', '.join(scanner.presets) or 'none, this scanner has no presets'}"
    else:
        message = message[:1].lower() + message[1:]
    return {"field": ".".join(path)[:64], "message": message}


def _suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:64].lower(), list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""
