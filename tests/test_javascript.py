"""The browser client: its types, its tests in Node (tests/node) against real servers, and how it is served."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tests.serving import serve

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "static"
MODULES = sorted([STATIC / "scanwire.js", *(STATIC / "scanwire").glob("*.js")])
TESTS = sorted((ROOT / "tests" / "node").glob("*.test.mjs"))
# Where npm packages are kept between runs.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scanwire-test"
DENO = shutil.which("deno", path=str(Path(sys.executable).parent)) or shutil.which("deno")
DENO_TESTS = [path for path in TESTS if path.name.partition(".")[0] in ("client", "eventstream")]
NODE_MIN = (20, 18)  # with both flags; from 22 on WebSocket needs none
NODE_FLAGS = ("--experimental-websocket", "--experimental-eventsource", "--no-warnings")
MAX_SCRIPT_BYTES = 100_000
TSC_FLAGS = (
    "--noEmit --strict --allowJs --checkJs --noUnusedLocals --noUnusedParameters --noImplicitReturns "
    "--target es2024 --module esnext --moduleResolution bundler --lib es2024,dom,dom.iterable,dom.asynciterable"
).split()


def run(*command: str | Path, timeout_s: float, **env: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | env, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def require_node() -> None:
    version = run("node", "--version", timeout_s=30) if shutil.which("node") else ""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    least = ".".join(map(str, NODE_MIN))
    require(numbers >= NODE_MIN, f"Node {least} or newer; there is {version.strip() or 'none'}")


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name.partition(".")[0])
def test_the_client_passes_its_tests_in_node(path: Path, tmp_path: Path, sample_prices: Path) -> None:
    require_node()
    # Node ends a run that takes too long itself, and its servers with it.
    command = ("node", *NODE_FLAGS, "--test", "--test-reporter=spec", "--test-timeout=570000", path)
    env = {"SCANWIRE_TEST_PYTHON": sys.executable, "SCANWIRE_PRICES": str(sample_prices), "TMPDIR": str(tmp_path)}
    run(*command, timeout_s=600, **env)


def test_the_client_passes_its_tests_in_deno(tmp_path: Path, sample_prices: Path) -> None:
    """Every transport against a real server, and what Deno's own parts could do otherwise than Node's."""
    require(DENO is not None, "Deno")
    assert DENO is not None
    command: tuple[str | Path, ...] = (DENO, "test", "--allow-all", "--no-check", "--no-lock", "--quiet", *DENO_TESTS)
    env = {"SCANWIRE_TEST_PYTHON": sys.executable, "SCANWIRE_PRICES": str(sample_prices), "TMPDIR": str(tmp_path)}
    env |= {"DENO_DIR": str(tmp_path / "deno"), "DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}
    assert " 0 failed" in run(*command, timeout_s=300, **env)


def find_tsc() -> Path:
    require(bool(shutil.which("npm") and shutil.which("node")), "npm and node, for TypeScript")
    tsc = CACHE / "node_modules" / ".bin" / "tsc"
    if not tsc.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        run("npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", CACHE, "typescript@7", timeout_s=300)
    return tsc


def test_the_types_of_the_client_hold_strictly() -> None:
    for module in MODULES:
        assert module.read_text().startswith("// @ts-check\n"), module.name
    run(find_tsc(), *TSC_FLAGS, *MODULES, STATIC / "scanwire.d.ts", timeout_s=120)


async def test_the_types_are_those_of_what_the_server_answers(tmp_path: Path, sample_prices: Path) -> None:
    """Written out as literals, answers may have no member that the types do not have, and must have all of them."""
    answers: list[tuple[str, Any]] = []
    async with serve(tmp_path, sample_prices, max_running=1) as serving:
        first, *waiting = [await serving.submit(preset="relaxed") for _ in range(3)]
        producing = await serving.submit("external", title="Test", total=10)
        events = [{"type": "matches", "rows": [{"name": "a"}]}, {"type": "progress", "done": 3, "phase": "reading"}]
        events.append({"type": "end", "state": "failed", "error": "The printer is empty."})
        headers = {"Authorization": f"Bearer {producing['producer_token']}"}
        at = f"/v1/scans/{producing['id']}"
        for event in events:
            answer = await serving.http.post(f"{at}/events", json=event, headers=headers)
            assert answer.status_code == 202, answer.text
            answers.append(("Snapshot", (await serving.http.get(at)).json()))
        answers += [("Snapshot", snapshot) for snapshot in (first, *waiting, producing)]
        answers += [("Snapshot", await serving.finish(snapshot["id"])) for snapshot in (first, *waiting)]
        answers.append(("Scanners", (await serving.http.get("/v1/scanners")).json()))
        listed = (await serving.http.get("/v1/scans?limit=2")).json()
        answers.append(("{ scans: Snapshot[]; next: string | null }", listed))
        accept = {"Accept": "application/json"}
        pages = [
            (await serving.http.get(f"/v1/scans/{id}/events", headers=accept)).json()
            for id in (first["id"], producing["id"])
        ]
    answers += [("ScanEvent", event) for page in pages for event in page["events"]]
    shown = [snapshot for kind, snapshot in answers if kind == "Snapshot"]
    assert all(any(snapshot[name] for snapshot in shown) for name in ("position", "eta_s", "progress", "end"))
    lines = ['import type { ScanEvent, Scanners, Snapshot } from "./scanwire.d.ts";']
    for place, (kind, answer) in enumerate(answers):
        lines.append(f"export const answer{place}: {kind} = {json.dumps(answer)};")
    shutil.copy(STATIC / "scanwire.d.ts", tmp_path)
    (tmp_path / "answers.ts").write_text("\n".join(lines))
    run(find_tsc(), *TSC_FLAGS, tmp_path / "answers.ts", timeout_s=120)


def test_the_client_is_one_import_and_small() -> None:
    """Nothing is loaded from elsewhere, and every module is reached from the one that is public."""
    reached: set[Path] = set()
    waiting = [STATIC / "scanwire.js"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            named = re.findall(r'(?:from|import|new URL\() ?"([^"]+)"', re.sub(r"/\*.*?\*/", "", module.read_text()))
            assert all(name.startswith("./") for name in named), f"{module.name}: {named}"
            waiting += [(module.parent / name).resolve() for name in named]
    assert sorted(reached) == MODULES
    assert sum(module.stat().st_size for module in MODULES) < MAX_SCRIPT_BYTES


async def test_the_client_is_served_as_modules_that_may_connect(tmp_path: Path, sample_prices: Path) -> None:
    """A worker has the policy that its script came with, so a script must have that of pages."""
    async with serve(tmp_path, sample_prices) as serving:
        for module in MODULES:
            answer = await serving.http.get(f"/static/{module.relative_to(STATIC)}")
            assert answer.status_code == 200, module
            assert answer.headers["content-type"].startswith("text/javascript"), module
            assert "connect-src 'self'" in answer.headers["content-security-policy"], module


async def test_a_new_release_is_seen_at_once_and_what_has_not_changed_is_not_sent_again(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with serve(tmp_path, sample_prices) as serving:
        for path in ("/static/scanwire.js", "/static/page.css", "/static/icon.svg", "/"):
            first = await serving.http.get(path)
            assert first.headers["cache-control"] == "no-cache", path
            again = await serving.http.get(path, headers={"If-None-Match": first.headers["etag"]})
            assert (again.status_code, again.content) == (304, b""), path
            assert again.headers["cache-control"] == "no-cache", path
            # A browser would put it in place of the policy that it has kept, and then run nothing of it.
            assert "content-security-policy" not in again.headers, path
            other = await serving.http.get(path, headers={"If-None-Match": '"of-another-release"'})
            assert (other.status_code, other.content) == (200, first.content), path
