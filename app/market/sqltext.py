"""The text of a `where` condition, word by word, before an SQL parser sees it.

The parser backtracks: thirty `cast(` or `case` inside each other would keep it busy for hours. So it is given nothing
but the words listed here, in few brackets, and a client learns at once which word has no place.
"""

import difflib
import re
from collections.abc import Iterator

from app.market.features import BASE_COLUMNS, FEATURES, is_known

MAX_BRACKETS = 8  # and CASEs, open at the same time: the time to refuse a text can double with each

FUNCTIONS = frozenset(
    {"abs", "ceil", "coalesce", "day", "exp", "floor", "greatest", "least", "length", "ln", "lower", "month"}
    | {"nullif", "pow", "power", "quarter", "round", "sign", "sqrt", "starts_with", "upper", "year"}
)
_KEYWORDS = frozenset(
    {"and", "or", "not", "in", "is", "null", "between", "like", "ilike", "distinct", "from"}
    | {"case", "when", "then", "else", "end", "true", "false", "date"}
)
_ELSEWHERE = frozenset({"select", "exists", "over", "partition", "any", "all", "cast", "interval", "extract"})
_CLOCK = frozenset({"now", "today", "current_date", "current_time", "current_timestamp"})
_TOKEN = re.compile(
    r"""
      (?P<space>\s+)
    | (?P<comment>--|/\*)
    | (?P<day>'\d{4}-\d{2}-\d{2}')
    | (?P<text>'(?:[^']|'')*')
    | (?P<name>"[^"]*")
    | (?P<number>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)(?![\w.])
    | (?P<word>[a-z_]\w*(?:\s*\[\s*\d+\s*\])?)
    | (?P<sign><=|>=|<>|!=|[-+*/%<>=(),~])
    """,
    re.IGNORECASE | re.VERBOSE | re.ASCII,
)


def rewrite(text: str) -> str:
    """The same condition for the SQL parser: `close[1]` quoted as one name, and days as DATE 'YYYY-MM-DD'.

    Raises ValueError, which says in words what is wrong, for a sign or word that has no place in a condition, for
    comments, and for brackets that are not closed or too many inside each other.
    """
    tokens = list(_split(text))
    words: list[str] = []
    depth = 0
    for number, (kind, token) in enumerate(tokens):
        depth += (token.lower() in ("(", "case")) - (token.lower() in (")", "end"))
        if kind == "word":
            is_call = number + 1 < len(tokens) and tokens[number + 1][1] == "("
            words.append(_check_word(token, is_call))
        elif kind == "day" and not (words and words[-1].lower() == "date"):
            words.append(f"DATE {token}")
        else:
            words.append(token)
        if token == ")" and tokens[number - 1][1] == "(":
            raise ValueError("has empty brackets")
        if not 0 <= depth <= MAX_BRACKETS:
            raise ValueError(
                f"must open each bracket and CASE before it closes, at most {MAX_BRACKETS} inside each other"
            )
    if depth:
        raise ValueError("has a bracket or CASE that is not closed")
    return " ".join(words)


def _split(text: str) -> Iterator[tuple[str, str]]:
    """The tokens of a text with their kinds, without white space."""
    at = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise ValueError(f"cannot be read from {text[at : at + 20]!r} on; that has no place in a condition")
        if token.lastgroup == "comment":
            raise ValueError("must not hold comments; put a space between two signs")
        if token.lastgroup != "space":
            yield str(token.lastgroup), token.group()
        at = token.end()


def _check_word(word: str, is_call: bool) -> str:
    """The word as the parser is to have it. Raises ValueError when it is no keyword, function or name."""
    lower = word.lower()
    if lower in _CLOCK:
        raise ValueError("must mean the same tomorrow; write the day as DATE 'YYYY-MM-DD'")
    if lower in _ELSEWHERE:
        raise ValueError(f"uses {word}, which is not allowed: a condition compares and combines the values of one row")
    if lower in FUNCTIONS and is_call:
        return word
    if lower in _KEYWORDS and not (lower == "date" and is_call):
        return word
    name = re.sub(r"\s", "", word)
    if is_call:
        raise ValueError(f"uses {name[:64]}(…), which is not allowed; there are: {', '.join(sorted(FUNCTIONS))}")
    if not is_known(name):
        raise ValueError(explain_unknown(name))
    return f'"{name}"'


def explain_unknown(name: str) -> str:
    """In words: there is no such name, which ones are near it, and where all are listed."""
    bare = name.partition("[")[0].lower()
    near = difflib.get_close_matches(bare, [*BASE_COLUMNS, *FEATURES], n=3)
    hint = f"; near it: {', '.join(near)}" if near else ""
    return f"uses {name[:64]!r}, which is not a column or feature{hint}. GET /v1/scanners lists them all"
