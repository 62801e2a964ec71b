"""The checks of pre-commit, as tests."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff_finds_nothing() -> None:
    run("ruff", "check", ".")


def test_code_is_formatted() -> None:
    run("ruff", "format", "--check", ".")


def test_types_check() -> None:
    run("mypy")


def test_files_are_one_idea() -> None:
    long = {
        str(path.relative_to(ROOT)): n
        for path in (ROOT / "llamax").rglob("*.py")
        if (n := len(path.read_text().splitlines())) > 400
    }
    assert not long, f"files over 400 lines: {long}"
