"""The guides' commands, as they are printed: every shell block of docs/scaling.md runs, and so does its Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "scaling.md").read_text()
RUNS = ("RUN", "OTHER_RUN")  # names of the guide that stand for run directories


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a newcomer stands: the example beside the two runs, and `llamax` of this checkout on the path."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "example-runs.csv", folder / "docs")
    for number, name in enumerate(RUNS):
        rows = [{"step": i, "tokens": 100 * i, "flops_6n": 600.0 * i, "loss": 2 + number + 1 / i} for i in range(1, 30)]
        (folder / name).mkdir()
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bin").mkdir()
    script = folder / "bin" / "llamax"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llamax.cli "$@"\n')
    script.chmod(0o755)
    return folder


def run(folder: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_commands_of_the_guide_run(folder: Path) -> None:
    shell = "\n".join(blocks("sh"))
    assert shell.count("llamax ") >= 6
    said = run(folder, "sh", "-e", "-c", shell)
    assert "E + A/N^alpha + B/D^beta" in said
    assert "predicted loss" in said
    assert "chain verified to record 0" in said
    assert (folder / "runs.predictions.jsonl").exists()
    assert (folder / "curves.png").exists()


def test_the_python_of_the_guide_runs(folder: Path) -> None:
    shutil.copy(ROOT / "docs" / "example-runs.csv", folder / "runs.csv")
    (code,) = blocks("python")
    said = run(folder, sys.executable, "-c", code)
    assert "N* = " in said


def test_the_example_is_what_the_guide_shows() -> None:
    example = (ROOT / "docs" / "example-runs.csv").read_text().splitlines()
    assert "\n".join(f"    {line}" for line in example[:3]) in GUIDE


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", GUIDE) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
