"""Several real processes train one run: the numbers of one process, one writer, and every way to end together.

Each process costs seconds of processor time, so a few jobs are asked many things.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamax.config.load import dump_yaml
from llamax.data.batches import TrainBatches
from llamax.data.store import Store
from llamax.mesh.job import PEER_LOST
from llamax.train.checkpoints import find_checkpoints
from llamax.train.goodput import KINDS
from llamax.train.lock import locked
from llamax.train.loop import train
from llamax.train.run_dir import read_env, read_evals, read_metrics, read_result, read_time
from tests.processes.harness import free_port, start
from tests.train.conftest import build
from tests.train.runs import BATCH, SEQ, run_config, write_texts

STEPS, ONE_LAYER = 40, "model.segments=[{repeat: 1}]"
SHORT = (f"train.steps={STEPS}", "train.eval_every_steps=15", "train.steps_per_dispatch=5", ONE_LAYER)
ENDLESS = ("train.steps_per_dispatch=1", "train.steps=100000", "mesh.data=-1")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return build(write_texts(folder / "texts"), folder / "store").path


def config_file(folder: Path, store: Path, *overrides: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "c.yaml"
    path.write_text(dump_yaml(run_config(*overrides, store=store)))
    return path


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short run by one process."""
    path = tmp_path_factory.mktemp("alone") / "run"
    train(run_config(*SHORT, store=store), path)
    return path


@pytest.fixture(scope="module")
def pair(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    """The short run by two: (run directory, the rows each process read, what the first said on stdout)."""
    folder = tmp_path_factory.mktemp("pair")
    seen = [folder / f"rows-{i}.json" for i in range(2)]
    words = ["train", config_file(folder, store, *SHORT, "mesh.data=-1"), "--run-dir", folder / "run", "--json"]
    job = start(folder / "logs", words, 2, faults={i: {"rows": str(seen[i])} for i in range(2)})
    assert job.wait() == [0, 0], job.said()
    assert (job.out(1), job.errors()) == ("", [])
    return folder / "run", [json.loads(path.read_text()) for path in seen], job.out(0)


def assert_same_losses(path: Path, other: Path) -> None:
    """Rows and evaluations of the same steps, and losses that agree to 1e-5."""
    for read in (read_metrics, read_evals):
        ours, theirs = read(path), read(other)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)
        assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]


# ---------------------------------------------------------------- two processes
def test_two_processes_give_the_losses_of_one(pair: Any, alone: Path):
    path, _, out = pair
    assert_same_losses(path, alone)
    ours, theirs = read_result(path) or {}, read_result(alone) or {}
    assert json.loads(out) == {**ours, "run_dir": str(path)}
    for key in ("eval_loss", "train_loss", "eval_bits_per_byte"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
    for key in ("steps", "tokens", "eval_tokens", "unique_tokens", "flops_6n", "fingerprint"):
        assert ours[key] == theirs[key]
    norms = [[row["grad_norm"] for row in read_metrics(where)] for where in (path, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_each_process_reads_its_own_slice(pair: Any, store: Path):
    _, seen, _ = pair
    whole = TrainBatches(Store.open(store), batch_size=BATCH, seq_len=SEQ, seed=0)
    for step in range(STEPS):
        rows = [np.array(one["steps"][str(step)]) for one in seen]
        assert [len(part) for part in rows] == [BATCH // 2, BATCH // 2]
        np.testing.assert_array_equal(np.concatenate(rows), whole(step)["tokens"])
    assert all(set(one["held_out"]) == {BATCH // 2} for one in seen)


def test_one_process_writes(pair: Any):
    path, _, _ = pair
    assert sorted(os.listdir(path)) == [
        "checkpoints", "config.yaml", "env.json", "evals.jsonl", "lock", "metrics.jsonl", "result.json", "time.json",
    ]  # fmt: skip
    assert [found.step for found in find_checkpoints(path / "checkpoints")] == [STEPS]
    env = read_env(path) or {}
    assert (env["devices"]["processes"], env["devices"]["count"], len(env["sessions"])) == (2, 2, 1)
    assert set(env["flags"]) & {"LLAMAX_COORDINATOR", "LLAMAX_PROCESS"} == set()
    spent = (read_time(path) or {})["seconds"]
    assert set(spent) == set(KINDS)
    assert all(spent[kind] > 0 for kind in ("start", "compile", "step", "checkpoint", "evaluation"))


# ---------------------------------------------------------------- a dead one, a signal, other meshes and numbers
def test_two_of_which_one_dies_then_four_of_which_one_is_stopped_then_one(store: Path, alone: Path, tmp_path: Path):
    """The rows of a run that nothing interrupted, from three meshes."""
    path = tmp_path / "run"
    overrides = (*SHORT, "train.steps_per_dispatch=1", "checkpoint.every_steps=2")
    words = ["train", config_file(tmp_path / "c", store, *overrides, "mesh.data=-1"), "--run-dir", path]
    two = start(tmp_path / "two", words, 2, faults={1: {"kill_at": 5}})
    assert two.wait() == [PEER_LOST, -signal.SIGKILL], two.said()
    (message,) = two.errors()
    assert message.startswith(f"error: process 1 (pid {two.processes[1].pid} on ")
    assert message.endswith("died: its connection closed without a word; all 2 end; the same command resumes the run")
    assert "Traceback" not in two.said()

    four = start(tmp_path / "four", [*words, "mesh.fsdp=2", "mesh.tensor=2"], 4, faults={2: {"sigterm_at": 12}})
    assert four.wait() == [143] * 4, four.said()
    step = find_checkpoints(path / "checkpoints")[0].step
    assert 12 <= step < STEPS
    assert f"stopped by SIGTERM at step {step}, checkpoint saved" in four.error(0)
    assert [four.error(i).count("stopped by") for i in range(4)] == [1, 0, 0, 0]
    assert read_metrics(path)[-1]["step"] == step
    assert read_result(path) is None

    train(run_config(*overrides, "mesh.data=1", store=store), path)
    assert_same_losses(path, alone)
    assert [len((read_env(path) or {})["sessions"]), (read_env(path) or {})["devices"]["processes"]] == [3, 1]
    assert (read_time(path) or {})["seconds"]["restart"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_silent_leader_ends_the_others(store: Path, tmp_path: Path, how: signal.Signals):
    path = tmp_path / "run"
    words = ["train", config_file(tmp_path, store, *ENDLESS), "--run-dir", path, "--peer-seconds", 5]
    job = start(tmp_path / "logs", words, 2)
    job.wait_for_step(path, 3)
    sent = job.signal(0, how)
    assert job.processes[1].wait(120) not in (0, 143), job.said()
    took = time.monotonic() - sent
    if how == signal.SIGSTOP:
        job.signal(0, signal.SIGKILL)
    assert job.wait()[0] == -signal.SIGKILL
    assert took < 30
    why = "died" if how == signal.SIGKILL else "has given no sign of life for"
    assert f"error: process 0 (pid {job.processes[0].pid} on" in job.error(1), job.said()
    assert why in job.error(1)


@pytest.mark.slow
def test_a_signal_to_all_stops_all_together(store: Path, tmp_path: Path):
    path = tmp_path / "run"
    words = ["train", config_file(tmp_path, store, *ENDLESS), "--run-dir", path]
    job = start(tmp_path / "logs", words, 4)
    job.wait_for_step(path, 3)
    for index in range(4):
        job.signal(index, signal.SIGTERM)
    assert job.wait() == [143] * 4, job.said()
    assert len(find_checkpoints(path / "checkpoints")) == 1


# ---------------------------------------------------------------- bad input: one message, nobody hangs
def test_what_all_find_wrong_is_said_once(store: Path, tmp_path: Path):
    """A mesh larger than the devices."""
    words = ["train", config_file(tmp_path, store), "mesh.data=3", "--run-dir", tmp_path / "run"]
    job = start(tmp_path / "logs", words, 2)
    assert job.wait() == [2, 2], job.said()
    (message,) = job.errors()
    assert "mesh.data=3" in message
    assert "does not fit the 2 devices there are" in message
    assert "Traceback" not in job.said()


@pytest.mark.slow
def test_a_run_in_use_ends_all(store: Path, tmp_path: Path):
    """Two jobs on one run: only the leader can see it."""
    path = tmp_path / "run"
    path.mkdir()
    words = ["train", config_file(tmp_path, store), "mesh.data=2", "--run-dir", path]
    with locked(path):
        job = start(tmp_path / "logs", words, 2)
        assert job.wait() == [2, 2], job.said()
    (message,) = job.errors()
    assert f"process {os.getpid()} is using this run directory" in message


def test_versions_and_addresses_that_differ(store: Path, tmp_path: Path):
    """Found before JAX is started."""
    words = ["train", config_file(tmp_path, store), "--run-dir", tmp_path / "run", "--start-seconds", 30]
    job = start(tmp_path / "versions", words, 2, faults={1: {"versions": {"jax": "0.9.9"}}})
    assert job.wait() == [2, 2], job.said()
    (message,) = job.errors()
    assert "jax is 0.9.9 there" in message
    elsewhere = {1: {"LLAMAX_COORDINATOR": f"127.0.0.1:{free_port()}"}}
    job = start(tmp_path / "addresses", [*words[:-1], 2], 2, each=elsewhere)
    assert job.wait() == [2, 2], job.said()
    assert sorted("missing 1" in line or "found no process 0" in line for line in job.errors()) == [True, True]


@pytest.mark.slow
def test_other_bad_input(store: Path, tmp_path: Path):
    """An axis that does not divide, storage that refuses, and a failure of one that is nobody's input."""
    words = ["train", config_file(tmp_path, store), "mesh.data=1"]
    job = start(tmp_path / "axis", [*words, "mesh.tensor=3", "--run-dir", tmp_path / "a"], 3)
    assert job.wait() == [2, 2, 2], job.said()
    assert len(job.errors()) == 1
    assert "is not divisible by tensor=3" in job.errors()[0]
    job = start(tmp_path / "storage", [*words, "mesh.data=2", "--run-dir", "/proc/llamax/run"], 2)
    assert job.wait() == [2, 2], job.said()
    assert len(job.errors()) == 1
    assert "/proc/llamax/run: cannot be written" in job.errors()[0]
    job = start(tmp_path / "bug", [*words, "mesh.data=2", "--run-dir", tmp_path / "b"], 2, faults={1: {"raise_at": 3}})
    assert job.wait() == [1, 1], job.said()
    assert "process 1 (pid" in job.errors()[0]
    assert "RuntimeError: a fault at step 3" in job.errors()[0]
