"""What the service measures of its own process, and what asking for it costs."""

import contextlib
import os
import socket
import time
from pathlib import Path

from app.observe.metrics import count_open_files
from tests.conftest import require
from tests.serving import serve


async def test_a_process_is_described_as_prometheus_expects(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices) as serving:

        async def read() -> dict[str, float]:
            lines = (await serving.http.get("/metrics")).text.splitlines()
            return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("process_")}

        before = await read()
        assert before.keys() == {
            *("process_cpu_seconds_total", "process_open_fds", "process_max_fds", "process_start_time_seconds"),
            *("process_resident_memory_bytes", "process_virtual_memory_bytes"),
        }
        assert 0 < time.time() - before["process_start_time_seconds"] < 3600
        assert 20e6 < before["process_resident_memory_bytes"] < before["process_virtual_memory_bytes"]
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(socket.socket())
            assert 100 <= (await read())["process_open_fds"] - before["process_open_fds"] < 110


async def test_open_files_are_counted_with_one_call_or_listed_where_the_kernel_does_not_count() -> None:
    require(os.stat("/proc/self/fd").st_size > 0, "Linux since 6.2")
    assert os.stat("/proc/self/fdinfo").st_size == 0  # the same entries, which the kernel does not count
    with contextlib.ExitStack() as stack:
        for _ in range(5000):
            stack.enter_context(contextlib.closing(os.fdopen(os.dup(0))))
        counted, listed = await count_open_files(), await count_open_files("/proc/self/fdinfo")
        assert listed is not None
        assert counted in (listed, listed - 1)  # the directory itself is open while it is listed
        took = []
        for _ in range(20):
            began = time.perf_counter()
            await count_open_files()
            took.append(time.perf_counter() - began)
        assert min(took) < 0.001
    assert await count_open_files("/proc/no/such/folder") is None
