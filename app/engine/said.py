"""What is said about scans whose work is done elsewhere: by who submits one, and by its producer."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from app.core.errors import InvalidParams

TITLE = "External scan"
SUMMARY = "A scan whose work is done elsewhere: another program posts its progress and matches."
MAX_COUNT = 2**53 - 1  # what every JSON parser keeps exact
_MAX_INT = 2**63 - 1  # of a Parquet column, and of most databases


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ExternalParams(_Said):
    """What a scan is about whose work is done elsewhere."""

    title: Annotated[str, Field(min_length=1, max_length=200, description="what it is, for people")] = TITLE
    total: Annotated[int | None, Field(ge=0, le=MAX_COUNT, description="units of work; not known yet when null")] = None
    unit: Annotated[str, Field(min_length=1, max_length=40, description="what `total` and `done` count")] = "steps"


def check_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row, which has a column and holds plain values only. Raises ValueError."""
    if not row:
        raise ValueError("a match has at least one column")
    for name, value in row.items():
        match value:
            case str() | bool() | None:
                continue
            case int() if -_MAX_INT <= value <= _MAX_INT:
                continue
            case float() if math.isfinite(value):
                continue
        raise ValueError(f"{name[:40]!r} must be text, a finite number of up to 64 bits, a boolean or null")
    return row


PlainRow = Annotated[dict[str, Any], AfterValidator(check_row)]


class ProgressMade(_Said):
    """So much is done. Only the latest is shown."""

    type: Literal["progress"]
    done: Annotated[int, Field(ge=0, le=MAX_COUNT, description="never less than before, and never above the total")]
    total: Annotated[int | None, Field(ge=0, le=MAX_COUNT, description="from now on; as before when left out")] = None
    phase: Annotated[str | None, Field(min_length=1, max_length=100, description="what is being done")] = None


class MatchesFound(_Said):
    """Rows of one match each: any columns, with plain values."""

    type: Literal["matches"]
    rows: list[PlainRow]


class WorkEnded(_Said):
    """The last event of a scan."""

    type: Literal["end"]
    state: Literal["completed", "failed", "cancelled"]
    error: Annotated[str | None, Field(max_length=2000, description="why it failed, in a sentence")] = None


Said = ProgressMade | MatchesFound | WorkEnded


def normalise_external(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with every default filled in. Raises InvalidParams."""
    try:
        return ExternalParams.model_validate(dict(raw)).model_dump(mode="json")
    except ValidationError as error:
        names = ", ".join(ExternalParams.model_fields)
        words = {"extra_forbidden": f"is not a parameter of an external scan; there are: {names}"}
        raise InvalidParams.explain(error, words) from None
