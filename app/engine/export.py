"""Match rows as a file. Runs in a worker process: a large table must not hold up the event loop."""

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
