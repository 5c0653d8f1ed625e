"""What every bench needs: servers in processes of their own, their CPU time and memory, and tables."""

import contextlib
import http.client
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
START_WITHIN_S = 60
SHOWN_CHARS = 4000  # of what a server said before it failed
# Limits that protect a service would only measure themselves here.
GENEROUS = {
    "SCANWIRE_SUBMIT_PER_MIN": "1000000",
    "SCANWIRE_SUBMIT_HEAVY_PER_HOUR": "1000000",
    "SCANWIRE_MAX_ACTIVE_PER_CLIENT": "100000",
    "SCANWIRE_READ_PER_S": "1000000",
    "SCANWIRE_READ_BURST": "1000000",
    "SCANWIRE_CONNECT_PER_S": "1000000",
    "SCANWIRE_CONNECT_BURST": "1000000",
    "SCANWIRE_MAX_STREAMS_PER_CLIENT": "100000",
    "SCANWIRE_MAX_STREAMS": "100000",
    "SCANWIRE_PRODUCER_TIMEOUT_S": "600",
}


def find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class Server:
    """A server process under test, on loopback."""

    pid: int
    port: int

    def cpu_s(self) -> float:
        """User and system time of the process itself, from /proc."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def memory_mb(self, *, peak: bool = False) -> float:
        """Resident memory of the process itself, now or at its peak so far."""
        return read_memory_mb(self.pid, "VmHWM" if peak else "VmRSS")

    def forget_peak(self) -> None:
        """The peak of its memory counts from here."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]


def read_memory_mb(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


@contextlib.contextmanager
def serve(
    target: str,
    *,
    env: Mapping[str, str] = {},
    cpus: set[int] | None = None,
    factory: bool = False,
    path: str = "/healthz",
) -> Iterator[Server]:
    """Runs `target` (module:app) under uvicorn on a free loopback port until the block is left."""
    port = find_port()
    command = [sys.executable, "-m", "uvicorn", target, "--host", "127.0.0.1", "--port", str(port)]
    command += [
        "--log-level",
        "warning",
        "--no-access-log",
        "--no-server-header",
        "--no-proxy-headers",
        "--timeout-graceful-shutdown",
        "2",
    ]
    if factory:
        command.append("--factory")
    with run_server(command, port, env=env, cpus=cpus, path=path) as server:
        yield server


@contextlib.contextmanager
def serve_scanwire(
    *,
    env: Mapping[str, str] = {},
    cpus: set[int] | None = None,
    command: Sequence[str] = ("-m", "app", "serve"),
    path: str = "/healthz",
) -> Iterator[Server]:
    """Runs Scanwire by its own command (which is how it gets its own protocol classes), with generous limits and a
    journal that is thrown away."""
    port = find_port()
    with tempfile.TemporaryDirectory() as state:
        settings = GENEROUS | {"SCANWIRE_STATE_DIR": state, "SCANWIRE_DRAIN_S": "1"} | dict(env)
        words = [sys.executable, *command, "--port", str(port)]
        with run_server(words, port, env=settings, cpus=cpus, path=path) as server:
            yield server


@contextlib.contextmanager
def run_server(
    command: Sequence[str],
    port: int,
    *,
    env: Mapping[str, str] = {},
    cpus: set[int] | None = None,
    path: str = "/healthz",
) -> Iterator[Server]:
    """Runs a server that was told to listen on this loopback port, until the block is left.

    It may open as many files as the system lets it, and is pinned to `cpus`. What it says is shown when the block
    fails.
    """

    def prepare() -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        if cpus:
            os.sched_setaffinity(0, cpus)

    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command,
            env=os.environ | dict(env),
            cwd=Path(__file__).parents[1],
            stdout=said,
            stderr=said,
            preexec_fn=prepare,
        )
        try:
            _wait_until_served(process, port, path)
            yield Server(process.pid, port)
        except BaseException:
            said.seek(0)
            sys.stderr.write(said.read()[-SHOWN_CHARS:])
            raise
        finally:
            _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_served(process: "subprocess.Popen[bytes]", port: int, path: str) -> None:
    """Any answer will do at /healthz, which not every peer has; at another address it must be a good one."""
    too_bad = 500 if path == "/healthz" else 400
    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server under test ended with code {process.returncode}")
        try:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
                connection.request("GET", path)
                with connection.getresponse() as answer:
                    if answer.status < too_bad:
                        return
        except OSError:
            pass
        time.sleep(0.05)
    raise SystemExit("the server under test did not start in time")


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table that reads well in a terminal and pastes as Markdown."""
    cells = [[f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(line[place]) for line in [list(headers), *cells]) for place in range(len(headers))]
    print(f"\n{title}\n")
    for number, line in enumerate([list(headers), *cells]):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
