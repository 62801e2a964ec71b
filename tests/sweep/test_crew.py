"""A worker of two real processes on loopback: it trains cells together, and a bad cell or a death ends both alike."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llamax.config.load import validate
from llamax.config.sweep import SweepConfig
from llamax.sweep.crew import AGAIN, ASKED
from llamax.sweep.plan import make_plan
from llamax.sweep.status import status
from llamax.sweep.study import open_study
from tests.compiler import flags
from tests.data.corpora import small_store
from tests.processes.harness import free_port

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[2]
PEER_LOST = 75


class Worker:
    """Two processes of one worker."""

    def __init__(self, study: Path) -> None:
        place = {"LLAMAX_COORDINATOR": f"127.0.0.1:{free_port()}", "LLAMAX_PROCESSES": "2"}
        own = {"XLA_FLAGS": flags(), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "llamax.sweep.worker", str(study)]
        self.logs = [study / f"process-{i}.log" for i in range(2)]
        self.processes = []
        for i, log in enumerate(self.logs):
            env = os.environ | own | place | {"LLAMAX_PROCESS": str(i)}
            with log.open("ab") as file:
                self.processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=file, stderr=file))

    def wait(self) -> list[int]:
        """The exit codes."""
        try:
            return [process.wait(300) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store(tmp_path_factory.mktemp("data"), words=1000).path


def study_of(folder: Path, store: Path, steps: int, batches: list[int]) -> Path:
    base = {
        "model": {"base": "ladder/d16", "max_seq_len": 64},
        "train": {"steps": steps, "seq_len": 16, "batch_size": 4, "steps_per_dispatch": 2},
        "data": {"store": str(store), "eval_tokens": 128},
    }
    axes = [{"kind": "product", "fields": {"train.batch_size": batches}}]
    open_study(folder, make_plan(validate(SweepConfig, {"name": "s", "base": base, "axes": axes}, "test")))
    return folder


def states(study: Path) -> list[str]:
    return [row["state"] for row in status(study)["cells"]]


def wait_for_step(study: Path, step: int) -> None:
    until = time.monotonic() + 300
    while max(row["step"] or 0 for row in status(study)["cells"]) < step:
        assert time.monotonic() < until, status(study)
        time.sleep(0.1)


def test_a_cell_that_fails_is_written_down_and_the_worker_started_again_goes_on(store: Path, tmp_path: Path) -> None:
    study = study_of(tmp_path / "s", store, 6, [5, 4])  # 5 sequences do not divide by two devices
    assert Worker(study).wait() == [AGAIN, AGAIN]
    assert states(study) == ["failed", "pending"]
    assert "not divisible" in status(study)["cells"][0]["error"]
    assert Worker(study).wait() == [0, 0]
    assert states(study) == ["failed", "done"]
    rows: list[dict[str, Any]] = status(study)["cells"]
    assert rows[1]["loss"] > 0


def test_a_signal_to_one_stops_both_and_a_death_is_no_failure_of_the_cell(store: Path, tmp_path: Path) -> None:
    study = study_of(tmp_path / "s", store, 100_000, [4])
    worker = Worker(study)
    wait_for_step(study, 4)
    worker.processes[1].send_signal(signal.SIGTERM)
    assert worker.wait() == [ASKED, ASKED]
    assert states(study) == ["pending"]
    stopped = status(study)["cells"][0]["step"]
    worker = Worker(study)
    wait_for_step(study, stopped + 2)
    worker.processes[1].kill()
    assert worker.wait() == [PEER_LOST, -signal.SIGKILL]
    assert states(study) == ["pending"]
