"""Match rows as a file. Runs in a worker process: a large table must not hold up the event loop."""

import io
from collections.abc import Sequence

import orjson
import polars as pl


def export_rows(events: Sequence[bytes], as_csv: bool) -> bytes:
    """The rows of these `matches` events (their JSON), in order, as CSV (UTF-8, with a header) or as Parquet."""
    rows = [row for event in events for row in orjson.loads(event)["data"]["rows"]]
    frame = pl.from_dicts(rows, infer_schema_length=None) if rows else pl.DataFrame({"symbol": [], "date": []})
    buffer = io.BytesIO()
    if as_csv:
        frame.write_csv(buffer)
    else:
        frame.write_parquet(buffer)
    return buffer.getvalue()
