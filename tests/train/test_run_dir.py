"""A run directory is one run's, one process's, and readable whatever happened to the process."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from llamax.config.load import run_from_data
from llamax.errors import UserError
from llamax.train import env
from llamax.train.run_dir import (
    is_run,
    open_run,
    read_config,
    read_env,
    read_evals,
    read_metrics,
    read_result,
    read_rows,
)
from llamax.train.signals import stop_signals

HERE = Path(__file__).parents[2]
PRINT = "abc123" * 10


def config(*overrides: str):
    return run_from_data({"model": "ladder/d32", "train": {"steps": 100}}, overrides)


def opened(path: Path, *overrides: str, fingerprint: str = PRINT):
    return open_run(path, config(*overrides), fingerprint)


def row(step: int, **more) -> dict:
    return {"step": step, "tokens": step * 64, "loss": 5.0 / step, **more}


# ---------------------------------------------------------------- files
def test_a_run_from_start_to_finish(tmp_path):
    path = tmp_path / "study" / "run"
    assert not is_run(path)
    with opened(path, "train.seed=3") as run:
        assert is_run(path)
        assert run.path == path
        run.log([row(1), row(2)])
        run.log([])
        run.log([row(3)])
        run.log_eval({"step": 3, "loss": 4.0})
        assert run.result is None
        run.finish({"status": "done", "cause": None, "eval_loss": 4.0})
        assert run.result == {"status": "done", "cause": None, "eval_loss": 4.0}
    assert read_config(path) == config("train.seed=3")
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(path)[1] == row(2)
    assert read_evals(path) == [{"step": 3, "loss": 4.0}]
    assert sorted(os.listdir(path)) == [
        "config.yaml",
        "env.json",
        "evals.jsonl",
        "lock",
        "metrics.jsonl",
        "result.json",
    ]


def test_config_is_complete_and_names_every_section(tmp_path):
    with opened(tmp_path):
        text = (tmp_path / "config.yaml").read_text()
    for name in (
        "model:",
        "data:",
        "optimizer:",
        "schedule:",
        "mesh:",
        "train:",
        "checkpoint:",
        "log:",
        "every_seconds:",
    ):
        assert name in text


def test_a_finished_run_is_left_as_it_is(tmp_path):
    with opened(tmp_path) as run:
        run.finish({"status": "done"})
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"}
    with opened(tmp_path, "log.every_steps=7") as run:
        assert run.result == {"status": "done"}
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"} == before


def test_numbers_that_are_not_finite(tmp_path):
    values = {
        "loss": math.nan,
        "up": math.inf,
        "array": np.float32(-np.inf),
        "layers": [1.0, math.nan],
        "fine": np.float32(0.5),
    }
    with opened(tmp_path) as run:
        run.log([{"step": 1, **values}])
        run.finish({"train_loss": math.nan, "cause": None, "steps": np.int64(1)})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "up": None, "array": None, "layers": [1.0, None], "fine": 0.5,
    }  # fmt: skip
    back = read_metrics(tmp_path)[0]
    assert math.isnan(back["loss"])
    assert math.isnan(back["up"])
    assert back["fine"] == 0.5
    assert read_result(tmp_path) == {"train_loss": None, "cause": None, "steps": 1}


def test_env_tells_what_it_ran_on(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMAX_THING", "1")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    with opened(tmp_path):
        pass
    monkeypatch.setenv("LLAMAX_THING", "2")
    with opened(tmp_path):
        pass
    found = read_env(tmp_path)
    assert found["fingerprint"] == PRINT
    assert set(found["versions"]) >= {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "llamax"}
    assert found["devices"]["count"] == sum(found["devices"]["kinds"].values()) == 8
    assert found["flags"]["LLAMAX_THING"] == "2"
    assert "hunter2" not in json.dumps(found)
    assert os.uname().nodename not in json.dumps({**found, "git": None})
    assert len(found["sessions"]) == 2
    assert found["sessions"][1]["before"]["flags"]["LLAMAX_THING"] == "1"
    assert "before" not in found["sessions"][0]


def test_git_state_of_a_repository(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    source = tmp_path / "a.py"
    source.write_text("one\n")
    assert env.git_state.__wrapped__(source) is None
    git("init")
    git("add", "a.py")
    git("commit", "-m", "first")
    clean = env.git_state.__wrapped__(source)
    assert (len(clean["commit"]), clean["dirty"], clean["diff"]) == (40, False, "")
    source.write_text("x" * 2 * env.DIFF_LIMIT)
    dirty = env.git_state.__wrapped__(source)
    assert dirty["dirty"]
    assert dirty["commit"] == clean["commit"]
    assert env.DIFF_LIMIT < len(dirty["diff"]) < env.DIFF_LIMIT + 100
    assert "+xxx" in dirty["diff"]


# ---------------------------------------------------------------- identity
def test_another_run_is_refused_by_field(tmp_path):
    with opened(tmp_path) as run:
        run.log([row(1)])
    with pytest.raises(UserError) as error, opened(tmp_path, "train.seed=5", "optimizer.lr=0.5"):
        pass
    message = str(error.value)
    assert str(tmp_path) in message
    assert "train.seed is 0 there and 5 here" in message
    assert "optimizer.lr is 0.003 there and 0.5 here" in message
    assert "delete this one" in message
    assert read_metrics(tmp_path) == [row(1)]


def test_other_data_is_refused(tmp_path):
    with opened(tmp_path):
        pass
    with (
        pytest.raises(UserError, match="fingerprint is abc123abc123 there and fff here"),
        opened(tmp_path, fingerprint="fff"),
    ):
        pass


def test_what_is_not_identity_may_change_on_resume(tmp_path):
    with opened(tmp_path):
        pass
    with opened(tmp_path, "checkpoint.every_steps=7", "mesh.fsdp=2"):
        pass
    assert read_config(tmp_path) == config("checkpoint.every_steps=7", "mesh.fsdp=2")


def test_a_run_without_its_config_is_not_overwritten(tmp_path):
    with opened(tmp_path) as run:
        run.log([row(1)])
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl is there and config.yaml is not"), opened(tmp_path):
        pass


@pytest.mark.parametrize("name", ["result.json", "env.json", "config.yaml"])
def test_a_damaged_file_is_named(tmp_path, name):
    with opened(tmp_path):
        pass
    (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match=name), opened(tmp_path):
        pass


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"run: cannot be written: file exists"), opened(tmp_path / "run"):
        pass
    with pytest.raises(UserError, match="not a run directory"):
        read_config(tmp_path)


# ---------------------------------------------------------------- one process at a time
def test_a_second_opening_is_refused_and_names_the_holder(tmp_path):
    with (
        opened(tmp_path),
        pytest.raises(UserError, match=rf"process {os.getpid()} is using this run directory"),
        opened(tmp_path),
    ):
        pass
    with opened(tmp_path):
        pass


def test_kill_9_releases_the_lock(tmp_path):
    code = f"""
import fcntl, os, sys, time
from pathlib import Path
from llamax.train.lock import locked
with locked(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    environ = os.environ | {"PYTHONPATH": str(HERE)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {child.pid} is using"), opened(tmp_path):
        pass
    child.kill()
    child.communicate()
    with opened(tmp_path):
        pass


# ---------------------------------------------------------------- rows after a crash
def test_rewind_drops_later_rows(tmp_path):
    with opened(tmp_path) as run:
        run.log([row(step) for step in range(1, 11)])
        run.log_eval({"step": 4, "loss": 1.0})
        run.log_eval({"step": 8, "loss": 1.0})
        kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:7]
        run.rewind(7)
        assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == kept
        run.log([row(8)])
        assert [r["step"] for r in read_metrics(tmp_path)] == [*range(1, 9)]
        assert [r["step"] for r in read_evals(tmp_path)] == [4]
        run.rewind(0)
        assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("cut", range(1, 36, 3))
def test_a_cut_last_line_costs_that_line_at_most(tmp_path, cut):
    with opened(tmp_path) as run:
        run.log([row(1), row(2)])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    expected = [row(1), row(2)] if cut == 1 else [row(1)]
    assert read_rows(path) == expected
    with opened(tmp_path) as run:
        run.log([row(3)])
    assert read_rows(path) == [*expected, row(3)]


def test_a_damaged_line_is_named(tmp_path):
    with opened(tmp_path) as run:
        run.log([row(1), row(2), row(3)])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"step": 2', b'\x00"step": 2'))
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not a row"):
        read_rows(path)
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not a row"), opened(tmp_path) as run:
        run.rewind(1)


def test_a_full_disk_is_one_message_and_the_rows_stay(tmp_path):
    """For real: a limit on file size makes the kernel refuse the write in the middle of a row."""
    with opened(tmp_path) as run:
        run.log([row(1)])
    code = f"""
import resource
from pathlib import Path
from llamax.errors import UserError
from llamax.train.run_dir import Run
resource.setrlimit(resource.RLIMIT_FSIZE, (70, resource.RLIM_INFINITY))
run = Run(Path({str(tmp_path)!r}), writer=True)
for act in (lambda: run.log([{row(2)}]), lambda: run.finish({{"text": "x" * 100}})):
    try:
        act()
        print("no error")
    except UserError as error:
        print(error)
"""
    environ = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert "metrics.jsonl: cannot be written: file too large; what was saved before is intact" in first
    assert "result.json: cannot be written: file too large" in second
    with opened(tmp_path) as run:
        assert run.result is None
        run.log([row(2)])
    assert read_metrics(tmp_path) == [row(1), row(2)]
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


# ---------------------------------------------------------------- signals
def test_the_first_signal_is_a_request_and_the_second_raises():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop
        assert stop.signal == "SIGTERM"
        with pytest.raises(KeyboardInterrupt, match="SIGINT a second time"):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_outside_the_main_thread_are_left_alone():
    seen = []

    def work():
        with stop_signals() as stop:
            seen.append(stop.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
