"""Command-line flags of a scanner, which nobody wrote down: they come from the JSON Schema of its parameters."""

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from app.commands.environment import CommandFailed


def read_flags(words: Sequence[str], schema: Mapping[str, Any], others: Iterable[str] = ()) -> dict[str, Any]:
    """Parameters from `--gap-pct-min 0.08`, `--gap-pct-min=0.08`, `--require-green-d1` and `--no-require-green-d1`.

    `others` are the command's own flags, named in suggestions. Raises CommandFailed.
    """
    known: Mapping[str, Any] = schema["properties"]
    params: dict[str, Any] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            raise CommandFailed(f"{word!r} is not expected here; parameters are written as --name VALUE.")
        flag, equals, text = word.partition("=")
        name = _to_name(flag)
        if name not in known and name.startswith("no_") and _is_boolean(known.get(name[3:], {})) and not equals:
            params[name[3:]] = False
            continue
        if name not in known:
            raise CommandFailed(_explain_unknown(flag, [*map(to_flag, known), *others]))
        if not equals:
            is_alone = not left or left[0].startswith("--")
            if is_alone and _is_boolean(known[name]):
                params[name] = True
                continue
            if is_alone:
                raise CommandFailed(f"{flag} needs a value: {describe_type(known[name])}.")
            text = left.pop(0)
        params[name] = read_value(name, known[name], text)
    return params


def read_assignments(texts: Iterable[str], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters from `gap_pct_min=0.08`. Raises CommandFailed."""
    known: Mapping[str, Any] = schema["properties"]
    params = {}
    for text in texts:
        key, equals, value = text.partition("=")
        name = _to_name(key)
        if not equals:
            raise CommandFailed(f"--param {text} has no value; write it as --param {name}=VALUE.")
        if name not in known:
            raise CommandFailed(_explain_unknown(name, known))
        params[name] = read_value(name, known[name], value)
    return params


def read_value(name: str, schema: Mapping[str, Any], text: str) -> Any:
    """The text as a JSON value of the type that the parameter has. Bounds are left to the server.

    Raises CommandFailed.
    """
    type_ = _find_type(schema)
    refusal = CommandFailed(f"{to_flag(name)} takes {describe_type(schema)}, not {text!r}.")
    try:
        match type_:
            case "integer":
                return int(text.replace("_", "").replace(",", ""))
            case "number":
                number = float(text.replace("_", "").replace(",", ""))
                if not math.isfinite(number):
                    raise refusal
                return number
            case "boolean":
                return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
            case "array":
                items = _resolve(schema).get("items", {})
                return [read_value(name, items, part.strip()) for part in text.split(",") if part.strip()]
            case "object":
                return json.loads(text)
    except (ValueError, KeyError, CommandFailed):
        raise refusal from None
    return text


def to_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def describe_type(schema: Mapping[str, Any]) -> str:
    """What may be given, with its bounds, in words."""
    schema = _resolve(schema)
    choices = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
    if choices:
        return " or ".join(map(str, choices))
    match _find_type(schema):
        case "array":
            each = describe_type(schema.get("items", {}))
            count = schema.get("minItems") if schema.get("minItems") == schema.get("maxItems") else None
            plural = {"a number": "numbers", "a whole number": "whole numbers", "text": "names"}.get(each, each)
            return f"{count} {plural} with commas" if count else f"{plural} with commas"
        case "number" | "integer" as type_:
            return ("a number" if type_ == "number" else "a whole number") + describe_bounds(schema)
        case "boolean":
            return "yes or no"
    return "a date, YYYY-MM-DD" if schema.get("format") == "date" else "text"


def describe_bounds(schema: Mapping[str, Any]) -> str:
    """` from LOW to HIGH`, or what there is of it."""
    low, high = schema.get("minimum"), schema.get("maximum")
    return "".join(f" {word} {bound:g}" for word, bound in (("from", low), ("to", high)) if bound is not None)


def _resolve(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of `X or null`, X."""
    for option in schema.get("anyOf", ()):
        if option.get("type") != "null":
            return {**option, **{key: value for key, value in schema.items() if key != "anyOf"}}
    return schema


def _find_type(schema: Mapping[str, Any]) -> str:
    return str(_resolve(schema).get("type", "string"))


def _is_boolean(schema: Mapping[str, Any]) -> bool:
    return _find_type(schema) == "boolean"


def _to_name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _explain_unknown(flag: str, known: Iterable[str]) -> str:
    choices = {choice.removeprefix("--"): choice for choice in sorted(known)}
    near = [choices[name] for name in difflib.get_close_matches(flag.removeprefix("--"), choices, n=3, cutoff=0.6)]
    advice = f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(choices.values())}."
    return f"This scanner has no parameter {flag}. {advice}"
