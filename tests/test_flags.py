"""Flags made from the JSON Schema of a scanner's parameters."""

from typing import Any

import pytest

from app.commands.environment import CommandFailed
from app.commands.flags import describe_type, read_assignments, read_flags
from app.scanners.registry import get_scanner, list_scanners, validate_params


def get_schema(name: str) -> dict[str, Any]:
    return get_scanner(name).params.model_json_schema()


@pytest.mark.parametrize(
    ("scanner", "words", "params"),
    [
        ("gap-up", "--gap-pct-min 0.08", {"gap_pct_min": 0.08}),
        ("gap-up", "--gap-pct-min=-0.08", {"gap_pct_min": -0.08}),
        ("gap-up", "--gap-pct-min -0.08 --volume-min 2,000_000", {"gap_pct_min": -0.08, "volume_min": 2e6}),
        ("gap-up", "--gap_pct_min 0", {"gap_pct_min": 0.0}),
        ("gap-up", "--symbols A,B,", {"symbols": ["A", "B"]}),
        ("a-plus", "--require-green-d1", {"require_green_d1": True}),
        ("a-plus", "--no-require-green-d1", {"require_green_d1": False}),
        ("a-plus", "--require-green-d1 no --slope3-min 1", {"require_green_d1": False, "slope3_min": 1.0}),
        ("backside-b", "--prior-high-lag 2 --trigger-mode D1_only", {"prior_high_lag": 2, "trigger_mode": "D1_only"}),
        ("lc-d2", "--high-pct-min 0.5,0.4,0.3,0.2,0.1", {"high_pct_min": [0.5, 0.4, 0.3, 0.2, 0.1]}),
    ],
)
def test_flags_become_parameters_of_the_right_type(scanner: str, words: str, params: dict[str, Any]) -> None:
    read = read_flags(words.split(), get_schema(scanner))
    assert read == params
    assert [type(value) for value in read.values()] == [type(value) for value in params.values()]
    validate_params(get_scanner(scanner), read)


@pytest.mark.parametrize(
    ("scanner", "words", "says"),
    [
        ("gap-up", "--gap-pct-mn 0.1", "Did you mean --gap-pct-min"),
        ("gap-up", "--gap-pct-min much", "takes a number from -1 to 100, not 'much'"),
        ("gap-up", "--gap-pct-min nan", "takes a number from -1 to 100, not 'nan'"),
        ("gap-up", "--gap-pct-min", "needs a value: a number from -1 to 100"),
        ("gap-up", "--gap-pct-min --jsn", "needs a value"),
        ("gap-up", "--jsn", "Did you mean --json"),
        ("gap-up", "--nope 3", "no parameter --nope. There are --adv20-min-usd, --close-range-min, --end,"),
        ("gap-up", "--presett 3", "Did you mean --preset?"),
        ("gap-up", "stray", "'stray' is not expected here"),
        ("gap-up", "-x", "'-x' is not expected here"),
        ("gap-up", "--no-gap-pct-min", "no parameter --no-gap-pct-min"),
        ("a-plus", "--require-green-d1=perhaps", "takes yes or no, not 'perhaps'"),
        ("backside-b", "--prior-high-lag 1.5", "takes a whole number from 1 to 2"),
        ("lc-d2", "--high-pct-min 1,x", "takes 5 numbers with commas"),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(scanner: str, words: str, says: str) -> None:
    with pytest.raises(CommandFailed) as caught:
        read_flags(words.split(), get_schema(scanner), ["--json", "--url", "--preset", "--end"])
    assert says in str(caught.value)


def test_assignments_are_read_by_the_same_types() -> None:
    schema = get_schema("gap-up")
    assert read_assignments(["gap_pct_min=0.1", "where=close > 5 = true"], schema) == {
        "gap_pct_min": 0.1,
        "where": "close > 5 = true",
    }
    with pytest.raises(CommandFailed, match="write it as --param gap_pct_min=VALUE"):
        read_assignments(["gap_pct_min"], schema)
    with pytest.raises(CommandFailed, match="Did you mean gap_pct_min"):
        read_assignments(["gap_pct_mi=1"], schema)


def test_every_parameter_of_every_scanner_can_be_described() -> None:
    for scanner in list_scanners():
        for name, schema in scanner.params.model_json_schema()["properties"].items():
            assert describe_type(schema), name
