"""Rules of the project itself: format, lint, types, import contracts, README, and the wheel."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, **options: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | options, timeout=300, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def tool(name: str) -> str:
    """A command of the environment that runs the tests."""
    return str(Path(sys.executable).parent / name)


def test_the_code_is_formatted_and_free_of_lint() -> None:
    run(tool("ruff"), "format", "--check", ".")
    run(tool("ruff"), "check", ".")


def test_the_types_hold_strictly() -> None:
    run(tool("mypy"))


def test_imports_run_one_way() -> None:
    run(tool("lint-imports"))


def test_no_file_is_past_400_lines() -> None:
    """A file that grows past this is split along a seam that can be named."""
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("app", "static", "bench")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".js", ".css") and (lines := len(path.read_text().splitlines())) > 400
    }
    assert long == {}


def test_the_push_path_is_short_enough_to_be_read() -> None:
    files = [ROOT / "app/push" / f"{name}.py" for name in ("wire", "hub", "subscriber", "frames")]
    assert sum(len(file.read_text().splitlines()) for file in files) < 600


def test_the_readme_has_one_line_to_start_and_one_to_test_and_the_gate_runs_that_one() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    start = [line for line in lines if line.endswith("scanwire demo") and "pip install" in line]
    test = [line for line in lines if ".[test]" in line]
    assert len(start) == len(test) == 1
    assert all(line.startswith("python3 -m venv .venv && ") for line in start + test)
    assert "grep -m1 -F '.[test]' README.md" in (ROOT / ".ci" / "run").read_text()


def test_every_setting_that_the_readme_names_exists() -> None:
    from app.core.settings import Settings

    known = {f"SCANWIRE_{name.upper()}" for name in Settings.model_fields}
    known |= {"SCANWIRE_URL", "SCANWIRE_API_KEY", "SCANWIRE_TEST_REQUIRE", "SCANWIRE_TEST_PRICES"}
    named = set(re.findall(r"SCANWIRE_[A-Z0-9_]+", (ROOT / "README.md").read_text()))
    assert named <= known


def test_every_bound_in_the_settings_has_a_lower_limit() -> None:
    from app.core.settings import Settings

    for name, field in Settings.model_fields.items():
        if field.annotation in (int, float):
            assert any(hasattr(limit, "ge") or hasattr(limit, "gt") for limit in field.metadata), name


def test_nothing_in_the_project_names_a_machine() -> None:
    for path in run("git", "ls-files").split():
        text = (ROOT / path).read_bytes()
        if path != "tests/test_project.py":
            assert b"/work/" not in text, path
            assert b"/root/" not in text, path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), ".")
    (path,) = target.glob("scanwire-*.whl")
    return path


def test_a_wheel_holds_everything_and_serves_it_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = set(archive.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "app").rglob("*.py")}
    pages = {
        f"app/static/{path.relative_to(ROOT / 'static')}" for path in (ROOT / "static").rglob("*") if path.is_file()
    }
    assert modules | pages <= names
    assert not any(name.startswith(("tests/", "bench/")) for name in names)
    code = "import app.application as a, pathlib; print(a.STATIC); a.create_app()"
    shown = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "SCANWIRE_STATE_DIR": str(tmp_path / "state")},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert Path(shown.strip()) == tmp_path / "site" / "app" / "static"


def test_dependencies_have_lower_bounds_and_only_what_is_used_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for line in project["dependencies"] + extras:
        assert ">=" in line or line == "scanwire[test]", line
    assert shutil.which("bash")
