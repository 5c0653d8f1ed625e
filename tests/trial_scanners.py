"""Scanners that misbehave on request, registered as a third party would: through the entry point group."""

import asyncio
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
from pydantic import Field

from app.scanners.params import MarketParams
from app.scanners.registry import Prices, Scanner


class GateParams(MarketParams):
    gate: str | None = Field(None, description="a FIFO; each chunk waits until someone writes into it")
    only_symbol: str | None = Field(None, description="misbehave on the chunk with this symbol alone")


class CrashParams(GateParams):
    how: str = Field("killed", description="one of DEATHS")
    marker: str | None = Field(None, description="a file; once it is there, nothing crashes any more")


class LeavingParams(MarketParams):
    interrupts: bool = Field(False, description="leave as if by Ctrl-C, rather than by sys.exit()")


class SlowParams(MarketParams):
    pause_ms: int = Field(100, ge=0, description="for so long each chunk does nothing")


def _is_meant(frame: pl.DataFrame, params: GateParams) -> bool:
    return params.only_symbol is None or params.only_symbol in frame["symbol"]


def find_gated(prices: Prices, params: GateParams) -> pl.DataFrame:
    """The first row of every symbol, once the gate was opened."""
    frame = prices.with_features([])
    if params.gate is not None and _is_meant(frame, params):
        with open(params.gate, "rb") as gate:
            gate.read()
    return frame.group_by("symbol", maintain_order=True).agg(pl.col("date").first())


def _raise_cancelled() -> None:
    raise asyncio.CancelledError


def _use_up_native_memory() -> None:
    frame = pl.DataFrame({"a": [0.5] * 1000})
    for _ in range(18):  # 2 GB at most
        frame = pl.concat([frame, frame], rechunk=True)


def _use_up_python_memory() -> None:
    kept = [bytearray(2**24) for _ in range(128)]  # 2 GB at most
    kept.clear()


def _leave_a_child() -> None:
    """Its child has the pipes of the dead process open, for a while."""
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


DEATHS: dict[str, Callable[[], object]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "killed, with a child": _leave_a_child,
    "segfault": lambda: ctypes.string_at(0),
    "no memory in Python": _use_up_python_memory,
    "no memory in native code": _use_up_native_memory,
    "hanging": lambda: time.sleep(3600),
    "hanging in native code": lambda: ctypes.PyDLL(None).sleep(3600),  # PyDLL: it holds the interpreter's lock
    "cancelled": _raise_cancelled,
}


def find_crashing(prices: Prices, params: CrashParams) -> pl.DataFrame:
    frame = prices.with_features([])
    if _is_meant(frame, params) and not (params.marker and Path(params.marker).exists()):
        if params.marker:
            Path(params.marker).touch()
        DEATHS[params.how]()
    return find_gated(prices, params)


def find_slow(prices: Prices, params: SlowParams) -> pl.DataFrame:
    """The first row of every symbol, in its own time."""
    time.sleep(params.pause_ms / 1000)
    return prices.with_features([]).group_by("symbol", maintain_order=True).agg(pl.col("date").first())


_leaked: list[bytes] = []


def find_leaking(prices: Prices, params: MarketParams) -> pl.DataFrame:
    """Each chunk leaves 4 MB behind in its process."""
    _leaked.append(bytes(bytearray(4 * 2**20).replace(b"\0", b"x")))
    return find_slow(prices, SlowParams(pause_ms=10))


def find_raising(prices: Prices, params: GateParams) -> pl.DataFrame:
    raise RuntimeError("/secret/path of the server")


def find_leaving(prices: Prices, params: LeavingParams) -> pl.DataFrame:
    """A library that thinks it is the program."""
    if params.interrupts:
        raise KeyboardInterrupt
    sys.exit("nothing to do")


def find_everything(prices: Prices, params: GateParams) -> pl.DataFrame:
    """Every row is a match."""
    return prices.with_features([]).select("symbol", "date")


def _make(name: str, find: object, params: type[MarketParams] = GateParams) -> Scanner:
    return Scanner(name=name, title=name, summary=name, params=params, find=find, columns={})  # type: ignore[arg-type]


GATED = _make("trial-gated", find_gated)
CRASHING = _make("trial-crashing", find_crashing, CrashParams)
RAISING = _make("trial-raising", find_raising)
LEAVING = _make("trial-leaving", find_leaving, LeavingParams)
SLOW = _make("trial-slow", find_slow, SlowParams)
LEAKING = _make("trial-leaking", find_leaking, MarketParams)
EVERYTHING = _make("trial-everything", find_everything)
BROKEN = "not a scanner at all"

ENTRY_POINTS = """[scanwire.scanners]
gated = tests.trial_scanners:GATED
crashing = tests.trial_scanners:CRASHING
raising = tests.trial_scanners:RAISING
leaving = tests.trial_scanners:LEAVING
slow = tests.trial_scanners:SLOW
leaking = tests.trial_scanners:LEAKING
everything = tests.trial_scanners:EVERYTHING
broken = tests.trial_scanners:BROKEN
missing = tests.no_such_module:SCANNER
"""
