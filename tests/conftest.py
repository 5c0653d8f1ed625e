"""What several test files need: price files, and parts that may be missing on a machine."""

import asyncio
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.market.sample import make_sample, make_synthetic
from app.scanners import registry
from tests.serving import IS_WIRED
from tests.trial_scanners import ENTRY_POINTS

SHARED_PRICES = Path(__file__).parents[2] / "shared" / "data" / "sp500_daily_2013_2018.parquet"


async def until(is_so: Callable[[], object]) -> None:
    """Lets the event loop turn until something is so; for what has no event of its own to wait for."""
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0)


def require(is_there: bool, reason: str) -> None:
    """Skips a test whose real part is missing; under SCANWIRE_TEST_REQUIRE=all that is a failure instead."""
    if is_there:
        return
    if os.environ.get("SCANWIRE_TEST_REQUIRE") == "all":
        pytest.fail(f"required, but missing: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def real_prices() -> Path:
    """619,040 real rows of 505 symbols, with real dirt."""
    path = Path(os.environ.get("SCANWIRE_TEST_PRICES") or SHARED_PRICES)
    require(path.is_file(), f"no price table at {path.name}; name one with SCANWIRE_TEST_PRICES")
    return path


@pytest.fixture(scope="session")
def sample_prices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five real symbols, 2000 to 2013."""
    path = tmp_path_factory.mktemp("prices") / "sample.parquet"
    make_sample(path)
    return path


@pytest.fixture(scope="session")
def synthetic_prices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 invented symbols of 500 days."""
    path = tmp_path_factory.mktemp("prices") / "synthetic.parquet"
    make_synthetic(path, symbols=100, days=500, seed=7)
    return path


@pytest.fixture(scope="module")
def trial_scanners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Scanners that misbehave, installed the way a third party's are."""
    site = tmp_path_factory.mktemp("site")
    info = site / "trial_scanners-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trial-scanners\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    sys.path.append(str(site))
    registry._load.cache_clear()
    yield
    sys.path.remove(str(site))
    registry._load.cache_clear()


class Gate:
    """A FIFO at which worker processes wait, each until it is let through."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    def open(self) -> None:
        """Lets through everyone, now and from now on."""
        os.rename(self.path, self.path.with_suffix(".was"))
        self.path.touch()
        for _ in range(100):
            try:
                os.close(os.open(self.path.with_suffix(".was"), os.O_WRONLY | os.O_NONBLOCK))
            except OSError:  # nobody waits any more
                return


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    if not gate.path.is_file():
        gate.open()


@pytest.fixture(scope="module", params=["wire", "asgi"])
def both_paths(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs tests over both ways from the log to a peer: straight to uvicorn's transport, and by ASGI's `send`."""
    IS_WIRED[0] = request.param == "wire"
    yield
    IS_WIRED[0] = True


def pytest_configure() -> None:
    """Thousands of peers are open in some tests; for all of them, in whatever order they come, the bound is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
