"""GET /v1/prices/{symbol}: the prices around a match, for a chart."""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date

import orjson
from starlette.requests import Request
from starlette.responses import Response

from app.api.formats import JSON
from app.api.service import Service, get_client, get_service
from app.core.errors import AtCapacity, InvalidParams, PricesChanged, PricesError, UnknownSymbol, WorkerCrashed
from app.market.store import Days, SymbolPrices, SymbolRows, find_symbol, name_symbols, read_days

DAYS_DEFAULT = 60
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


async def get_prices(request: Request) -> Response:
    """GET /v1/prices/{symbol}: `?around=DAY&days=60`, or `?start=&end=`"""
    service, client = get_service(request), get_client(request)
    service.limits.charge("read", client)
    days = _read_query(request.query_params, service.settings.max_price_rows)
    entry = _find(service, request.path_params["symbol"])
    # The same address gives the same answer for as long as the price file is the same.
    etag = f'"{service.store.data_version}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache", **service.limits.headers("read", client)}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    prices = await _read(service, entry, days)
    answer = {
        "symbol": entry.symbol,
        "data_version": service.store.data_version,
        "is_synthetic": service.store.is_synthetic,
        **asdict(prices),
    }
    return Response(orjson.dumps(answer), headers=headers, media_type=JSON)


def _find(service: Service, name: str) -> SymbolRows:
    entry = find_symbol(service.store, name) or find_symbol(service.store, name.strip().upper())
    if entry is None:
        raise UnknownSymbol(f"{name[:24]!r} is not in the price file, which has {name_symbols(service.store)}.")
    return entry


def _read_query(query: Mapping[str, str], max_rows: int) -> Days:
    around, start, end = (_read_day(query, name) for name in ("around", "start", "end"))
    if around is None:
        if "days" in query:
            raise InvalidParams.of("days", "goes with around; for all days between two, give start and end")
        if start and end and start > end:
            raise InvalidParams.of("start", f"{start} is after end, {end}")
        return Days(rows=max_rows, start=start, end=end)
    if start or end:
        raise InvalidParams.of("around", "does not go with start and end")
    text = query.get("days", str(min(DAYS_DEFAULT, max_rows)))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 0 < int(text) <= max_rows):
        raise InvalidParams.of("days", f"must be a whole number from 1 to {max_rows}")
    return Days(rows=int(text), around=around)


def _read_day(query: Mapping[str, str], name: str) -> date | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        return date.fromisoformat(text if _DAY.fullmatch(text) else "")  # it would take other forms as well
    except ValueError:
        raise InvalidParams.of(name, "must be a date written as YYYY-MM-DD") from None


async def _read(service: Service, entry: SymbolRows, days: Days) -> SymbolPrices:
    """In a worker process, in turn with the chunks of scans."""
    wait_s = service.settings.price_wait_s
    try:
        async with asyncio.timeout(wait_s):
            prices: SymbolPrices = await service.runner.pool.call(
                read_days, service.store.path, service.store.stamp, entry, days
            )
            return prices
    except TimeoutError:
        raise AtCapacity(
            f"All workers were busy for {wait_s:g} s. Ask again in a moment.", retry_after_s=wait_s
        ) from None
    except PricesChanged:
        raise PricesError("The price file was replaced while the server runs. Have the server restarted.") from None
    except WorkerCrashed:
        raise AtCapacity("The worker that read the prices died. Ask again.", retry_after_s=1) from None
