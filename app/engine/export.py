"""Match rows in other forms. Runs in a worker process: a large table must not hold up the event loop."""

import io
from collections.abc import Sequence

import orjson
import polars as pl

from app.core.errors import TooLarge

MAX_CELLS = 20_000_000  # rows with ever new columns make a table much larger than they are themselves


def export_rows(events: Sequence[bytes], as_csv: bool, columns: Sequence[str]) -> bytes:
    """The rows of these `matches` events (their JSON), in order, as CSV (UTF-8, with a header) or as Parquet.

    A table without rows has these columns. Raises TooLarge.
    """
    rows = [row for event in events for row in orjson.loads(event)["data"]["rows"]]
    width = len(set().union(*rows))
    if width * len(rows) > MAX_CELLS:
        raise TooLarge(f"These rows have {width} different columns, too many for one table. Ask for JSON or NDJSON.")
    frame = pl.from_dicts(rows, infer_schema_length=None) if rows else pl.DataFrame({name: [] for name in columns})
    buffer = io.BytesIO()
    if as_csv:
        frame.write_csv(buffer)
    else:
        frame.write_parquet(buffer)
    return buffer.getvalue()


def export_legacy(events: Sequence[bytes]) -> bytes:
    """The rows of these `matches` events (their JSON) as the clients of old know them, best score first: an array."""
    rows = [row for event in events for row in orjson.loads(event)["data"]["rows"]]
    made = [
        {
            "ticker": row["symbol"],
            "date": row["date"],
            "gap_pct": row["gap_pct"],
            "parabolic_score": row["parabolic_score"] or 0.0,
            "lc_frontside_d2_extended": int(row["lc_frontside_d2_extended"]),
            "volume": row["volume"],
            "close": row["close"],
            "confidence_score": round((row["parabolic_score"] or 0.0) / 100, 6),
        }
        for row in rows
    ]
    made.sort(key=lambda row: (-row["parabolic_score"], row["date"], row["ticker"]))
    return orjson.dumps(made)
