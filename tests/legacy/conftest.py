"""What the tests of clients of old share."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.legacy.clients import Clock
from tests.legacy.oracle import LARGE_CAP, Oracle, ask_oracle
from tests.serving import Serving, serve


@pytest.fixture(scope="session")
def oracle(sample_prices: Path) -> Oracle:
    return ask_oracle(sample_prices, (*LARGE_CAP, "momentum-breakout", "a-plus"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def serving(tmp_path: Path, sample_prices: Path) -> AsyncIterator[Serving]:
    async with serve(tmp_path / "state", sample_prices) as serving:
        yield serving
