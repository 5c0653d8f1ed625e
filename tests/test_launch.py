"""A server in this process, as `scanwire serve` runs it."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.commands import launch as launch_module
from app.commands.environment import CommandFailed
from app.commands.launch import Launch, open_socket
from app.core.settings import Settings


@pytest.fixture
def signals() -> Iterator[None]:
    """What signals do is as before, after a run."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("way", ["signal", "work that fails"])
def test_a_stop_waits_for_no_tick(
    tmp_path: Path, sample_prices: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(launch_module, "TICK_S", 3600)

    async def work(launch: Launch) -> int:
        async with asyncio.timeout(30), httpx.AsyncClient() as http:
            assert (await http.get(f"{launch.url}/healthz")).status_code == 200
        if way != "signal":
            raise CommandFailed("on purpose")
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(3600)
        return 1

    launch = Launch(Settings(state_dir=tmp_path, prices=str(sample_prices)), open_socket("127.0.0.1", 0))
    with contextlib.nullcontext() if way == "signal" else pytest.raises(CommandFailed):
        assert launch.run(work) == 0
