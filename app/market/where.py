"""`where`: a filter that a client writes as an SQL condition, checked before anything runs on it."""

import json
from datetime import date
from typing import Any

import polars as pl

from app.core.errors import InvalidParams
from app.market.features import is_known
from app.market.sqltext import explain_unknown, rewrite

MAX_CHARS = 1_000
MAX_DEPTH = 200  # of nested operators; a chain of ANDs nests once for each
MAX_NODES = 2_000

_OPERATORS = frozenset(
    {"Eq", "NotEq", "Lt", "LtEq", "Gt", "GtEq", "EqValidity", "NotEqValidity"}
    | {"And", "Or", "LogicalAnd", "LogicalOr", "Xor"}
    | {"Plus", "Minus", "Multiply", "Divide", "TrueDivide", "FloorDivide", "Modulus"}
)
# Every function that works row by row, as polars names it. What is not here is refused.
_FUNCTIONS = frozenset(
    {"Abs", "Floor", "Ceil", "Round", "Sign", "Negate", "Exp", "Log", "Log1p", "Pow", "Coalesce"}
    | {"MaxHorizontal", "MinHorizontal", "Boolean", "Sql", "StringExpr", "TemporalExpr"}
)
_MEMBERS = {
    "Boolean": frozenset({"Not", "IsNull", "IsNotNull", "IsFinite", "IsNan", "IsNotNan", "IsBetween", "IsIn"}),
    "StringExpr": frozenset({"StartsWith", "EndsWith", "Uppercase", "Lowercase", "Contains", "LenChars"}),
    "TemporalExpr": frozenset({"Year", "Month", "Day", "Quarter", "WeekDay", "Week", "OrdinalDay", "IsoYear"}),
}
_LITERALS = frozenset(
    {"Int", "Float", "Boolean", "String", "Str", "Date", "Decimal", "Int64", "Int32", "Float64", "Null"}
)

# A few rows on which a condition is tried, so that what fails on any value fails at once.
_TRIAL = pl.DataFrame(
    {"symbol": ["A", "BRK.B", None], "date": [date(2012, 1, 3), date(2020, 2, 29), None]},
    schema={"symbol": pl.String, "date": pl.Date},
)
_NUMBERS = (1.5, -0.0, None)


def _refuse(message: str) -> InvalidParams:
    return InvalidParams.of("where", message)


def parse_where(text: str) -> pl.Expr:
    """A condition on one row that is safe to run: boolean, elementwise, on known names.

    `text` is an SQL condition of at most 1,000 characters over price columns and features, such as
    `close > 20 AND vol_ratio > 3 AND date >= '2012-01-01'`; `close[1]` is yesterday's close. Raises InvalidParams
    for the field `where`, with what is wrong and what would be right, for any other text.
    """
    if len(text) > MAX_CHARS:
        raise _refuse(f"must have at most {MAX_CHARS} characters, not {len(text)}")
    try:
        sql = rewrite(text)
    except ValueError as error:
        raise _refuse(str(error)) from None
    try:
        expr = pl.sql_expr(sql)
        nodes = json.loads(expr.meta.serialize(format="json"))
    except RecursionError:
        raise _refuse("is nested too deeply; use fewer parentheses or conditions") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, ValueError, TypeError) as error:
        raise _refuse(f"cannot be read as an SQL condition: {_first_line(error)}") from None
    _check_nodes(nodes)
    names = dict.fromkeys(expr.meta.root_names())
    for name in names:
        if not is_known(name):
            raise _refuse(explain_unknown(name))
    _try_out(expr, list(names))
    return expr


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or ["it makes no sense"])[0]
    return line if len(line) <= 200 else line[:200] + "…"


def _check_nodes(root: Any) -> None:
    """Raises InvalidParams unless every node of the expression is one of those allowed."""
    seen = 0
    stack: list[tuple[Any, int]] = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > MAX_NODES:
            raise _refuse("is too long or nested too deeply; use fewer conditions")
        if not isinstance(node, dict) or len(node) != 1:
            raise _not_allowed(node)
        ((kind, body),) = node.items()
        stack += [(child, depth + 1) for child in _children(kind, body)]


def _children(kind: str, body: Any) -> list[Any]:
    """The parts of one node that are expressions themselves."""
    if kind == "Column":
        return []
    if kind == "Literal":
        return _check_literal(body)
    if kind == "BinaryExpr" and body["op"] in _OPERATORS:
        return [body["left"], body["right"]]
    if kind == "Ternary":
        return [body["predicate"], body["truthy"], body["falsy"]]
    if kind == "Cast" and body["dtype"] == {"Literal": "Boolean"}:  # NOT makes one
        return [body["expr"]]
    if kind == "Function":
        _check_function(body["function"])
        return list(body["input"])
    raise _not_allowed(kind)


def _check_literal(body: Any) -> list[Any]:
    if isinstance(body, dict) and len(body) == 1:
        ((form, value),) = body.items()
        if form == "Series":  # the list of IN (…)
            return []
        if form in ("Dyn", "Scalar") and isinstance(value, dict) and len(value) == 1 and set(value) <= _LITERALS:
            return []
    raise _refuse("uses a kind of value that is not allowed; numbers, 'texts', DATE 'YYYY-MM-DD' and true or false are")


def _check_function(function: Any) -> None:
    name, detail = (function, None) if isinstance(function, str) else next(iter(function.items()))
    inner = detail if isinstance(detail, str) else next(iter(detail)) if isinstance(detail, dict) and detail else None
    allowed = _MEMBERS.get(name)
    if name not in _FUNCTIONS or (allowed is not None and inner not in allowed):
        raise _not_allowed(inner or name)


def _not_allowed(what: Any) -> InvalidParams:
    if isinstance(what, dict):
        what = next(iter(what), None)
    return _refuse(
        f"uses {what[:40] if isinstance(what, str) else 'something'}, which is not allowed: a condition compares and "
        "combines the values of one row"
    )


def _try_out(expr: pl.Expr, names: list[str]) -> None:
    """Raises InvalidParams unless the condition gives a boolean, and gives it without an error."""
    bare = {name: name.partition("[")[0] for name in names}
    columns = [
        _TRIAL[bare[name]].alias(name) if bare[name] in _TRIAL.columns else pl.Series(name, _NUMBERS, pl.Float64)
        for name in names
    ]
    trial = _TRIAL.with_columns(columns)
    try:
        kind = trial.lazy().select(expr.alias("where")).collect_schema()["where"]
        if kind != pl.Boolean:
            raise _refuse(f"must be true or false for each row, not {kind}; compare it with something")
        trial.filter(expr)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise _refuse(f"cannot be computed: {_first_line(error)}") from None
