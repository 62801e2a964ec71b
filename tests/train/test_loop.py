"""The loop: what it records, and that a run interrupted anyhow and continued is the run that was not."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamax
from llamax.accounting.flops import training_flops_per_token
from llamax.accounting.params import count_params
from llamax.config.load import dump_yaml
from llamax.config.mesh import load_rules
from llamax.config.run import RunConfig
from llamax.data.batches import TrainBatches
from llamax.data.store import Store
from llamax.errors import Interrupted
from llamax.mesh.rules import make_mesh
from llamax.train.load import evaluate_run
from llamax.train.loop import train
from llamax.train.progress import Progress
from llamax.train.replicas import replicas
from llamax.train.run_dir import read_evals, read_metrics
from llamax.train.schedule import learning_rate
from llamax.train.state import hyper_of
from tests.train.runs import BATCH, SEQ, assert_same_bits, go, prepare, run_config

TRAIN_STEPS, TIMED = 24, ("seconds", "tokens_per_second")
# Dispatches of 5, evaluations every 7: with checkpoints every 3 no two boundaries fall together for long.
LOOP = ("train.steps=24", "train.steps_per_dispatch=5", "train.eval_every_steps=7")


def loop_config(store: Path, *overrides: str) -> RunConfig:
    return run_config(*LOOP, *overrides, store=store)


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run nothing interrupted."""
    path = tmp_path_factory.mktemp("whole") / "run"
    train(loop_config(store), path)
    return path


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in (*TIMED, "data_seconds")} for row in rows]


def result_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "result.json").read_text())


def assert_same_run(path: Path, whole: Path) -> None:
    """The same rows, evaluations and result, to the last bit, but for what a clock said."""
    assert untimed(read_metrics(path)) == untimed(read_metrics(whole))
    assert untimed(read_evals(path)) == untimed(read_evals(whole))
    (a,), (b,) = untimed([result_of(path)]), untimed([result_of(whole)])
    assert a | {"name": ""} == b | {"name": ""}
    seconds = [row["seconds"] for row in read_metrics(path)]
    assert seconds == sorted(seconds)


class Killed(BaseException):
    """Stands for a crash: nothing in the loop may catch it."""


def stop_at(step: int, phase: str = "train", *, kill: bool = False) -> Callable[[Progress], None]:
    """A report that sends SIGTERM to this process, or crashes, once `step` is reached in `phase`."""
    sent = []

    def report(progress: Progress) -> None:
        if progress.phase == phase and progress.step >= step and not sent:
            sent.append(True)
            if kill:
                raise Killed
            signal.raise_signal(signal.SIGTERM)

    return report


# ---------------------------------------------------------------- what is recorded
def test_rows_are_what_the_accounting_and_the_schedule_say(store: Path, whole: Path):
    config, rows = loop_config(store), read_metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, TRAIN_STEPS + 1))
    per_token, hyper = training_flops_per_token(config.model, SEQ), hyper_of(config, TRAIN_STEPS)
    for row in rows:
        assert row["tokens"] == row["step"] * BATCH * SEQ
        for convention, flops in per_token.items():
            assert row[f"flops_{convention}"] == pytest.approx(flops * row["tokens"], rel=1e-12)
        assert row["lr"] == pytest.approx(float(learning_rate("cosine", row["step"] - 1, hyper)), rel=1e-6)
        assert row["bad"] == 0.0
        assert min(row[name] for name in ("grad_norm", "param_norm", "update_norm", *TIMED)) > 0
    assert rows[0]["loss"] == pytest.approx(math.log(256), rel=0.02)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert set(rows[0]) == {
        "step", "tokens", "loss", "lr", "grad_norm", "param_norm", "update_norm", "bad", "tokens_per_second",
        "seconds", "flops_6n", "flops_chinchilla", "flops_palm", "flops_causal",
    }  # fmt: skip


def test_result_is_what_happened(store: Path, whole: Path):
    config, result = loop_config(store), result_of(whole)
    rows, evals, opened = read_metrics(whole), read_evals(whole), Store.open(store)
    batches = TrainBatches(opened, batch_size=BATCH, seq_len=SEQ, seed=0)
    params, tokens = count_params(config.model), TRAIN_STEPS * BATCH * SEQ
    assert [row["step"] for row in evals] == [7, 14, 21, 24]
    assert set(evals[0]) == {"step", "tokens", "loss", "bits_per_byte", "eval_tokens", "seconds"}
    expected = {
        "status": "done", "cause": None, "name": "run", "hash": config.hash8, "steps": TRAIN_STEPS, "skipped_steps": 0,
        "tokens": tokens, "train_loss": rows[-1]["loss"], "eval_loss": evals[-1]["loss"],
        "eval_bits_per_byte": evals[-1]["bits_per_byte"], "eval_tokens": opened.tokens("held_out") - 1,
        "params_total": params.total, "params_active": params.active, "n": params.active_matmul,
        "unique_tokens": batches.unique_tokens(TRAIN_STEPS), "epochs": batches.epochs(TRAIN_STEPS),
        "fingerprint": opened.fingerprint, "compute_dtype": "float32",
    }  # fmt: skip
    per_token = training_flops_per_token(config.model, SEQ)
    expected |= {f"flops_{name}": pytest.approx(flops * tokens) for name, flops in per_token.items()}
    assert {name: result.pop(name) for name in expected} == expected
    assert set(result) == {*TIMED, "data_seconds"}
    assert result["seconds"] >= rows[-1]["seconds"] > result["data_seconds"] > 0
    bytes_per_token = opened.bytes("held_out") / opened.tokens("held_out")
    assert evals[-1]["bits_per_byte"] == pytest.approx(evals[-1]["loss"] / math.log(2) / bytes_per_token)


def test_rows_are_thinned_but_first_and_last_stay(store: Path, whole: Path, tmp_path: Path):
    train(loop_config(store, "log.every_steps=10"), tmp_path / "run")
    rows = untimed(read_metrics(tmp_path / "run"))
    assert rows == [row for row in untimed(read_metrics(whole)) if row["step"] in (1, 10, 20, 24)]


def test_a_finished_run_returns_its_result_and_touches_nothing(store: Path, whole: Path):
    def state() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and p.name != "lock"}

    before, phases = state(), []
    assert train(loop_config(store), whole, report=lambda p: phases.append(p.phase)) == result_of(whole)
    assert state() == before
    assert phases == []


# ---------------------------------------------------------------- the numbers themselves
def test_the_loop_is_the_step_on_the_batches_and_load_gives_its_model(store: Path, whole: Path):
    config = loop_config(store)
    dispatch, state = prepare(config)
    batches = TrainBatches(Store.open(store), batch_size=BATCH, seq_len=SEQ, seed=0)
    losses = []
    for k in range(TRAIN_STEPS):
        padded = np.zeros((5, BATCH, SEQ + 1), np.int32)
        padded[0] = batches(k)["tokens"]
        state, metrics, _ = go(dispatch, state, {"tokens": padded}, 1)
        losses.append(float(metrics["loss"][0]))
    assert losses == [row["loss"] for row in read_metrics(whole)]
    model, loaded = llamax.load(whole)
    assert loaded == config
    assert_same_bits(model, state.model)
    tokens = jnp.asarray(batches(99)["tokens"][:, :-1])
    logits = jax.jit(lambda m, t: m(t))
    assert logits(model, tokens).shape == (BATCH, SEQ, 256)
    np.testing.assert_allclose(logits(model, tokens), logits(state.model, tokens), atol=1e-5)


def test_evaluation_by_hand(store: Path, whole: Path):
    """Every held-out token but the first, predicted once from its window, in float64."""
    text = np.concatenate([np.asarray(s.held_out.tokens) for s in Store.open(store).sources]).astype(np.int32)
    windows = -(-(len(text) - 1) // SEQ)
    padded = np.concatenate([text, np.zeros(windows * SEQ + 1 - len(text), np.int32)])
    rows = np.stack([padded[i * SEQ : i * SEQ + SEQ + 1] for i in range(windows)])
    model, _ = llamax.load(whole)
    logits = np.asarray(jax.jit(lambda m, t: m(t))(model, rows[:, :-1]), np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
    by_hand = nats.reshape(-1)[: len(text) - 1].mean()
    assert result_of(whole)["eval_loss"] == pytest.approx(by_hand, rel=1e-6)
    again = evaluate_run(whole, ["train.batch_size=3"])  # on eight devices: batches are padded to their number
    assert again["loss"] == pytest.approx(by_hand, rel=1e-6)
    assert again["eval_tokens"] == len(text) - 1


# ---------------------------------------------------------------- interrupted and continued
@pytest.mark.parametrize("every", ["null", "3", "7"])
def test_sigterm_twice_and_the_numbers_are_the_same(store: Path, whole: Path, tmp_path: Path, every: str):
    config, path = loop_config(store, f"checkpoint.every_steps={every}"), tmp_path / "run"
    for step in (4, 13):
        with pytest.raises(Interrupted) as stop:
            train(config, path, report=stop_at(step))
        assert stop.value.step >= step
        assert read_metrics(path)[-1]["step"] == stop.value.step
        assert stop.value.exit_code == 143
        assert not (path / "result.json").exists()
    train(config, path)
    assert_same_run(path, whole)


@pytest.mark.parametrize("how", ["train 9", "eval 7", "eval 14", "eval 24", "done 24"])
def test_a_crash_and_the_numbers_are_the_same(store: Path, whole: Path, tmp_path: Path, how: str):
    """`eval 14` crashes between a checkpoint and its evaluation; `eval 24` leaves only the evaluation to do."""
    phase, step = how.split()
    config, path = loop_config(store, "checkpoint.every_steps=7"), tmp_path / "run"
    with pytest.raises(Killed):
        train(config, path, report=stop_at(int(step), phase, kill=True))
    assert (path / "result.json").exists() == (phase == "done")
    train(config, path)
    assert_same_run(path, whole)


@pytest.mark.parametrize("step", [14, 24])
def test_sigterm_in_an_evaluation_saves_the_steps_before_it(store: Path, whole: Path, tmp_path: Path, step: int):
    config, path = loop_config(store), tmp_path / "run"
    with pytest.raises(Interrupted) as stop:
        train(config, path, report=stop_at(step, "eval"))
    assert stop.value.step == step
    assert step not in [row["step"] for row in read_evals(path)]
    seen = []
    train(config, path, report=lambda p: seen.append(p.step))
    assert min(s for s in seen if s) >= step  # nothing was trained twice
    assert_same_run(path, whole)


def test_devices_that_share_batches_resume_to_the_same_numbers(store: Path, tmp_path: Path):
    config, path = loop_config(store, "mesh.data=2", "train.seq_len=32"), tmp_path / "run"
    assert replicas(config, load_rules("default"), make_mesh(config.mesh)) is not None
    whole = tmp_path / "whole"
    train(config, whole)
    with pytest.raises(Interrupted):
        train(config, path, report=stop_at(7))
    train(config, path)
    assert_same_run(path, whole)


def test_a_run_goes_on_on_another_mesh(store: Path, whole: Path, tmp_path: Path):
    path = tmp_path / "run"
    with pytest.raises(Interrupted) as stop:
        train(loop_config(store, "mesh.data=8"), path, report=stop_at(10))
    assert 10 <= stop.value.step < 20
    train(loop_config(store, "mesh.data=1", "mesh.fsdp=8"), path)
    for a, b in ((read_metrics(path), read_metrics(whole)), (read_evals(path), read_evals(whole))):
        assert [row["step"] for row in a] == [row["step"] for row in b]
        np.testing.assert_allclose([row["loss"] for row in a], [row["loss"] for row in b], rtol=1e-5)


# ---------------------------------------------------------------- divergence
DIVERGES = ("optimizer.lr=1000.0", "schedule.warmup=0.0")


def test_a_diverged_run_says_why_and_still_does_after_a_crash(store: Path, tmp_path: Path):
    config, path = loop_config(store, *DIVERGES), tmp_path / "run"
    with pytest.raises(Killed):
        train(config, path, report=stop_at(1, "eval", kill=True))
    result = train(config, path)
    rows = read_metrics(path)
    assert result["status"] == "diverged"
    assert result["steps"] == rows[-1]["step"] < TRAIN_STEPS
    assert result["cause"] == (
        f"loss {rows[-1]['loss']:.4f} at step {result['steps']} exceeds train.divergence_factor=4 x the running average"
    )
    assert [row["bad"] for row in rows] == [0.0] * (len(rows) - 1) + [1.0]
    assert result["train_loss"] == rows[-1]["loss"]
    assert result["skipped_steps"] == 1
    assert train(config, path) == result


def test_a_diverged_run_exits_with_one(store: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]):
    (tmp_path / "c.yaml").write_text(dump_yaml(loop_config(store, *DIVERGES)))
    code, out, err = cli("train", tmp_path / "c.yaml", "--run-dir", tmp_path / "run", "--json")
    assert code == 1
    result = json.loads(out)
    assert result["status"] == "diverged"
    assert f"the run diverged: {result['cause']}" in err


def test_skipped_steps_are_counted_and_every_one_is_logged(store: Path, tmp_path: Path):
    path = tmp_path / "run"
    overrides = ("train.on_divergence=skip", "train.divergence_factor=1.01", "optimizer.lr=1.0", "log.every_steps=1000")
    result = train(loop_config(store, *overrides), path)
    bad = [row["step"] for row in read_metrics(path) if row["bad"]]
    assert result["status"] == "done"
    assert result["steps"] == TRAIN_STEPS
    assert 0 < result["skipped_steps"] < TRAIN_STEPS
    assert len(bad) == result["skipped_steps"]
