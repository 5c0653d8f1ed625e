"""A status endpoint as it is usually written: FastAPI with a response model, limited by SlowAPI."""

from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.util import get_remote_address


class Progress(BaseModel):
    done: int
    total: int
    unit: str
    rate: float | None
    eta_s: tuple[float, float] | None
    matches: int
    phase: str


class Status(BaseModel):
    id: str
    scanner: str
    params: dict[str, Any]
    state: str
    position: int | None
    eta_s: tuple[float, float] | None
    progress: Progress | None
    matches: int
    cursor: str
    created_ts: int
    started_ts: int | None
    finished_ts: int | None
    data_version: str
    attempt: int
    joined: bool
    poll_after_s: float | None
    links: dict[str, str]
    end: dict[str, Any] | None


limiter = Limiter(key_func=get_remote_address, headers_enabled=True)
app = FastAPI()
app.state.limiter = limiter
app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)
scans: dict[str, dict[str, Any]] = {}


@app.get("/healthz")
async def get_health() -> dict[str, str]:
    return {"status": "ok"}


@app.put("/v1/scans/{scan_id}")
async def put_scan(scan_id: str, status: Status) -> None:
    scans[scan_id] = status.model_dump()


@app.get("/v1/scans/{scan_id}", response_model=Status)
@limiter.limit("1000000/second")
async def get_scan(request: Request, response: Response, scan_id: str) -> dict[str, Any]:
    if scan_id not in scans:
        raise HTTPException(404, "Scan not found")
    return scans[scan_id]
