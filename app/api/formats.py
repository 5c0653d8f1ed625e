"""Which format a client gets: by suffix, else by Accept."""

from collections.abc import Sequence

from app.core.errors import NotAcceptable

JSON = "application/json"
NDJSON = "application/x-ndjson"
SSE = "text/event-stream"
CSV = "text/csv"
PARQUET = "application/vnd.apache.parquet"


def choose_format(accept: str | None, offered: Sequence[str]) -> str:
    """The offered media type that the client likes best (RFC 9110, 12.5.1); the first one offered if it is all the
    same to it. Raises NotAcceptable, which lists what is offered."""
    if not accept:
        return offered[0]
    wishes = [_read_wish(part) for part in accept.split(",")]
    best, best_quality = "", 0.0
    for media_type in offered:
        # The most specific range that matches decides.
        matching = [(range_.count("*"), quality) for range_, quality in wishes if _matches(range_, media_type)]
        quality = min(matching)[1] if matching else 0.0
        if quality > best_quality:
            best, best_quality = media_type, quality
    if not best:
        raise NotAcceptable(f"Accept asks for {accept[:100]!r}; this address has {', '.join(offered)}.")
    return best


def _read_wish(part: str) -> tuple[str, float]:
    range_, *params = (piece.strip().lower() for piece in part.split(";"))
    quality = 1.0
    for param in params:
        if param.startswith("q="):
            try:
                quality = min(max(float(param[2:]), 0.0), 1.0)
            except ValueError:
                quality = 0.0
    return range_, quality


def _matches(range_: str, media_type: str) -> bool:
    return range_ in (media_type, "*/*") or (range_.endswith("/*") and media_type.startswith(range_[:-1]))
