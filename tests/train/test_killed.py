"""Real processes: `kill -9` at random moments, SIGTERM, and the same command again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamax.config.load import dump_yaml
from llamax.train.run_dir import read_evals, read_metrics
from tests.compiler import flags
from tests.train.runs import run_config
from tests.train.test_loop import untimed

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
STEPS = 1200


@pytest.fixture(scope="module")
def command(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run that is always saving: checkpoints every 7 steps, dispatches of 10, an evaluation every 200."""
    overrides = (f"train.steps={STEPS}", "train.eval_every_steps=200", "checkpoint.every_steps=7", "model.d_model=16")
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    path.write_text(dump_yaml(run_config(*overrides, store=store)))
    return [sys.executable, "-m", "llamax.cli", "train", str(path), "--json", "--run-dir"]


def start(command: list[str], path: Path, log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as out:
        words, env = [*command, str(path)], os.environ | {"XLA_FLAGS": flags()}
        return subprocess.Popen(words, cwd=ROOT, env=env, stderr=out, stdout=out)


def wait_for_rows(path: Path, more_than: int, child: subprocess.Popen[bytes]) -> None:
    """Until the process has logged more than `more_than` rows, or ended."""
    while child.poll() is None and (len(read_metrics(path)) <= more_than):
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    assert start([*command[:-1], "checkpoint.every_steps=1000", command[-1]], path, path.parent / "log").wait(600) == 0
    return path


def test_kill_9_at_any_moment_changes_no_number(command: list[str], whole: Path, tmp_path: Path):
    path, log, rng, kills = tmp_path / "run", tmp_path / "log", random.Random(1), 0
    while True:
        child = start(command, path, log)
        if kills < 6:
            if kills % 3 < 2:  # else at some moment of starting up
                wait_for_rows(path, len(read_metrics(path)) if path.exists() else 0, child)
            time.sleep(rng.uniform(0.0, 1.0))
            kills += child.poll() is None
            child.kill()
        if child.wait(600) >= 0:
            break
    assert child.returncode == 0, log.read_text()
    assert kills >= 4
    assert "Traceback" not in log.read_text()
    assert untimed(read_metrics(path)) == untimed(read_metrics(whole))
    assert untimed(read_evals(path)) == untimed(read_evals(whole))


def test_sigterm_saves_and_exits_within_ten_seconds(command: list[str], whole: Path, tmp_path: Path):
    path, log = tmp_path / "run", tmp_path / "log"
    child = start([*command[:-1], "checkpoint.every_steps=1000000", command[-1]], path, log)
    wait_for_rows(path, 3, child)
    sent = time.monotonic()
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 143, log.read_text()
    assert time.monotonic() - sent < 10
    rows = untimed(read_metrics(path))
    names = [p.name for p in (path / "checkpoints").iterdir()]
    assert len(names) == 1
    step = int(names[0].removesuffix(".temporary"))
    assert rows[-1]["step"] == step < STEPS
    assert rows == [row for row in untimed(read_metrics(whole)) if row["step"] <= step]
    assert f"stopped by SIGTERM at step {step}, checkpoint saved" in " ".join(log.read_text().split())
