"""Workers on a real SLURM of one machine: preempted, out of time, lost with their node, cancelled; always resumed.

The cells train with llamax's own loop, so that "resumed" can mean every number of an uninterrupted run.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llamax.config.load import validate
from llamax.config.sweep import SweepConfig
from llamax.errors import UserError
from llamax.launch import records
from llamax.launch.launch import launch
from llamax.launch.on.slurm import Settings
from llamax.sweep.claim import holder
from llamax.sweep.plan import Plan, make_plan
from llamax.sweep.status import status
from llamax.sweep.study import open_study
from tests.compiler import flags
from tests.data.corpora import small_store
from tests.launch.cluster import cluster, lose, run, wait_for

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[2]
PATHS = os.pathsep.join([str(ROOT / "tests" / "launch" / "slowly"), str(ROOT)])
WORKER = {
    "XLA_FLAGS": flags(),
    "PYTHONPATH": PATHS,
    # Only process 0 writes to it, so the second time it would start half a minute before the other has compiled, which
    # is as long as gloo waits.
    "LLAMAX_COMPILATION_CACHE": "0",
}
STEPS = 160


@pytest.fixture(scope="module", autouse=True)
def slurm() -> Iterator[None]:
    with cluster():
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store(tmp_path_factory.mktemp("data"), words=1000).path


def plan_of(store: Path, seeds: list[int], steps: int = STEPS) -> Any:
    train = {"steps": steps, "seq_len": 16, "batch_size": 4, "steps_per_dispatch": 2}
    base = {
        "model": {"base": "ladder/d16", "max_seq_len": 64},
        "train": train,
        "data": {"store": str(store), "eval_tokens": 256},
        "log": {"every_steps": 5},
    }
    data = {"name": "study", "base": base, "axes": [{"kind": "seeds", "values": seeds}]}
    return make_plan(validate(SweepConfig, data, "test"))


@pytest.fixture(scope="module")
def uninterrupted(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of seed 0, trained in one go by a worker of two processes on this machine."""
    study = tmp_path_factory.mktemp("whole") / "study"
    plan = open_study(study, plan_of(store, [0]))
    place = coordinator() | {"LLAMAX_PROCESSES": "2"}
    command = [sys.executable, "-m", "llamax.sweep.worker", str(study)]
    both = [
        subprocess.Popen(command, env=os.environ | WORKER | place | {"LLAMAX_PROCESS": str(i)}, cwd=ROOT)
        for i in range(2)
    ]
    try:
        assert [process.wait(600) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    return losses(study / plan.cells[0].run_name)


def losses(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "loss", "grad_norm", "param_norm")} for row in rows]


def settings(**more: Any) -> Settings:
    common = {"python": sys.executable, "env": WORKER, "cpus_per_task": 1, "signal_seconds": 25}
    return validate(Settings, common | more, "test")


def coordinator() -> dict[str, str]:
    """Where two processes meet (n0 is no name in DNS): above the ports that others on this machine may be given."""
    for port in range(61440, 65000, 2):
        with socket.socket() as first, socket.socket() as second, suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return {"LLAMAX_COORDINATOR": f"127.0.0.1:{port}"}
    pytest.fail("no free port")


def state_of(job: str) -> str:
    return run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T", check=False).strip()


def row_of(study: Path) -> dict[str, Any]:
    return status(study)["cells"][0]


def claims(study: Path, cell: str) -> int:
    found = holder(study, cell)
    assert found is not None
    return found.number + 1


def train_on_two_nodes(study: Path, plan: Plan) -> str:
    """Launch one worker of two nodes and wait until it trains; its job."""
    _, (id,) = launch(study, plan, "slurm", settings(partition="low", nodes=2, env=WORKER | coordinator()))
    wait_for("the worker trains", lambda: row_of(study)["step"] > 8)
    return f"{id}_0"


def start_again(job: str) -> None:
    """SLURM holds a requeued job back for two minutes; the test does not."""
    wait_for("the job is pending", lambda: state_of(job) == "PENDING")
    run("scontrol", "update", f"JobId={job}", "StartTime=now")


def test_a_preempted_worker_goes_back_and_resumes_bit_for_bit(
    store: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    study = tmp_path / "study"
    plan = plan_of(store, [0])
    job = train_on_two_nodes(study, plan)
    with pytest.raises(UserError, match="has workers already"):
        launch(study, plan, "slurm", settings())
    run("sbatch", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    wait_for("the worker is back in the queue", lambda: state_of(job) == "PENDING")
    stopped = row_of(study)
    found = holder(study, plan.cells[0].name)
    assert stopped["state"] == "pending"
    assert 8 < stopped["step"] < STEPS
    assert found is not None
    assert found.record.get("released"), "it gave its lease back, so that nobody waits for it"
    start_again(job)
    wait_for("the cell is done", lambda: row_of(study)["state"] == "done")
    wait_for("the job is over", lambda: state_of(job) == "COMPLETED")
    assert claims(study, plan.cells[0].name) == 2
    assert losses(study / plan.cells[0].run_name) == uninterrupted


def test_a_worker_whose_node_is_lost_runs_elsewhere(
    store: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    study = tmp_path / "study"
    plan = plan_of(store, [0])
    job = train_on_two_nodes(study, plan)
    lose(run("scontrol", "show", "hostnames", run("squeue", "-h", "-j", job, "-o", "%N").strip()).split()[1])
    start_again(job)
    wait_for("the cell is done", lambda: row_of(study)["state"] == "done")
    assert claims(study, plan.cells[0].name) == 2
    assert losses(study / plan.cells[0].run_name) == uninterrupted


def test_the_time_limit_puts_a_worker_back(store: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    plan = plan_of(store, [0], steps=1_000_000)
    _, (id,) = launch(study, plan, "slurm", settings(hours=2 / 60))
    job = f"{id}_0"
    wait_for("the worker trains", lambda: row_of(study)["step"] > 8)
    wait_for("the worker is back in the queue", lambda: state_of(job) == "PENDING", 120)
    assert row_of(study)["state"] == "pending"
    assert list((study / plan.cells[0].run_name / "checkpoints").glob("[0-9]*")), "it saved"
    assert records.cancel(study) == [job]
    wait_for("the job is gone", lambda: "CANCELLED" in state_of(job))


def test_cancel_ends_workers_and_they_stay_ended(store: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    _, (id,) = launch(study, plan_of(store, [0, 1], 1_000_000), "slurm", settings(partition="low", workers=2))
    wait_for("both train", lambda: [row["state"] for row in status(study)["cells"]] == ["running"] * 2)
    listed = records.jobs(study)
    assert [(row["id"], row["state"], row["live"]) for row in listed] == [
        (f"{id}_{i}", "RUNNING", True) for i in range(2)
    ]
    wait_for("both take steps", lambda: min(row["step"] for row in status(study)["cells"]) > 4)
    assert records.cancel(study) == [f"{id}_0", f"{id}_1"]
    wait_for("both have ended", lambda: not any(row["live"] for row in records.jobs(study)))
    assert {row["state"] for row in status(study)["cells"]} == {"pending"}
    assert records.cancel(study) == []
    logs = "".join(path.read_text() for path in (study / "logs").glob("slurm-*.log"))
    assert "requeue" not in logs.casefold()


def test_slurm_refuses_in_one_message(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="partition"):
        launch(tmp_path / "study", plan_of(store, [0]), "slurm", settings(partition="nowhere"))
    assert records.jobs(tmp_path / "study") == []
