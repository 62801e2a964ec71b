"""Populations: every member is the run it would be alone, whatever happens to the others."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from llamax.config.mesh import load_rules
from llamax.config.run import RunConfig
from llamax.errors import Interrupted, UserError
from llamax.mesh.rules import make_mesh
from llamax.train.checkpoints import find_checkpoints
from llamax.train.loop import train
from llamax.train.packed import train_packed
from llamax.train.population import ProgramFailed, population_dispatch
from llamax.train.progress import Progress
from llamax.train.run_dir import read_evals, read_metrics, read_result
from llamax.train.shape import fits_one_device, shape_key
from llamax.train.state import abstract_state, hyper_of
from llamax.train.step import execution_of
from tests.train.runs import go, prepare, run_config, tokens_of

ROOT = Path(__file__).parents[2]
SHORT = ("train.steps=24", "train.steps_per_dispatch=5")
CLOCKS = ("seconds", "data_seconds", "tokens_per_second")


def members(store: Path, *each: str, common: Sequence[str] = ()) -> list[RunConfig]:
    return [run_config(*SHORT, *common, *own.split(), store=store) for own in each]


def losses(path: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(path)]


def assert_same_run(path: Path, other: Path) -> None:
    """Rows, evaluations and result alike to float tolerance, but for what a clock said."""
    for read in (read_metrics, read_evals):
        ours, theirs = read(path), read(other)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            assert [a[k] for k in a if k not in CLOCKS] == pytest.approx([b[k] for k in a if k not in CLOCKS], rel=1e-5)
    ours, theirs = read_result(path) or {}, read_result(other) or {}
    for key in theirs.keys() - {*CLOCKS, "name"}:
        assert ours[key] == (pytest.approx(theirs[key], rel=1e-5) if isinstance(theirs[key], float) else theirs[key])


def test_members_are_the_runs_they_would_be_alone(store: Path, tmp_path: Path):
    """Two learning rates, a weight decay, a beta and another seed; evaluations and checkpoints on the way."""
    configs = members(
        store,
        "optimizer.lr=1e-2",
        "optimizer.lr=2e-3 optimizer.b2=0.9 schedule.warmup=0.2",
        "train.seed=3 optimizer.weight_decay=0.0",
        common=("train.eval_every_steps=7", "checkpoint.every_steps=9"),
    )
    folders = [tmp_path / str(i) for i in range(3)]
    ended = train_packed(configs, folders)
    for i, (config, folder) in enumerate(zip(configs, folders, strict=True)):
        train(config, tmp_path / f"alone{i}")
        assert ended[i] == read_result(folder)
        assert_same_run(folder, tmp_path / f"alone{i}")
        steps = [found.step for found in find_checkpoints(folder / "checkpoints")]
        assert steps == [24, 18, 9]
        assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / f"alone{i}").iterdir()}
    first = [losses(folder)[0] for folder in folders]
    assert first[0] == first[1] != first[2]  # the seed alone sets weights and data


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["lion", "muon", pytest.param("adafactor", marks=SLOW), pytest.param("sgd", marks=SLOW)]
)
def test_every_optimizer_packs(kind: str):
    """One after the other as on a CPU, and as one batch as on an accelerator."""
    config = run_config(f"optimizer.kind={kind}", "train.steps_per_dispatch=20", "train.steps=20")
    others = [run_config(f"optimizer.lr={lr}", "train.steps=20", f"optimizer.kind={kind}") for lr in (3e-3, 1e-3)]
    for batched in (False, True):
        _assert_packs(config, others, batched)


def _assert_packs(config: RunConfig, others: list[RunConfig], batched: bool) -> None:
    """`population_dispatch` gives the metrics and states of `dispatch` on each."""
    dispatch, state = prepare(config)
    hyper = [hyper_of(each, 20) for each in (config, *others)]
    states = [jax.tree.map(jnp.copy, state.__class__(**{**vars(state), "hyper": h})) for h in hyper]
    batches = [tokens_of(20, config, seed=i) for i in range(len(states))]
    mesh = make_mesh(config.mesh)
    execution = execution_of(config, load_rules("default"), mesh)
    members_mesh = Mesh(np.array(jax.devices()[:1]), ("member",))
    several = jax.jit(population_dispatch(config, execution, members_mesh, batched))
    stack = lambda trees: jax.tree.map(lambda *a: jnp.stack(a), *trees)  # noqa: E731
    found, metrics, ran = several(stack(states), stack(batches), jnp.full(len(states), 20, jnp.int32))
    for i, (own, batch) in enumerate(zip(states, batches, strict=True)):
        wanted, rows, count = go(dispatch, own, batch, 20)
        assert count == int(ran[i]) == 20
        np.testing.assert_allclose(metrics["loss"][i], rows["loss"], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


def test_a_member_that_diverges_ends_alone(store: Path, tmp_path: Path):
    each = ("optimizer.lr=1e-2", "optimizer.lr=1e3", "train.seed=5")
    configs = members(store, *each, common=("optimizer.clip_norm=null", "train.divergence_factor=1.5"))
    ended = train_packed(configs, [tmp_path / str(i) for i in range(3)])
    train(configs[1], tmp_path / "alone")
    assert [end["status"] for end in ended if isinstance(end, dict)] == ["done", "diverged", "done"]
    assert_same_run(tmp_path / "1", tmp_path / "alone")
    assert (read_result(tmp_path / "1") or {})["steps"] < 24
    quiet = train_packed([configs[0], configs[2]], [tmp_path / "q0", tmp_path / "q2"])
    assert [losses(tmp_path / "q0"), losses(tmp_path / "q2")] == [losses(tmp_path / "0"), losses(tmp_path / "2")]
    assert all(isinstance(end, dict) and math.isfinite(end["eval_loss"]) for end in quiet)


class LeaseGone(BaseException):
    pass


def test_a_member_that_raises_ends_alone(store: Path, tmp_path: Path):
    """A lost lease, raised by its report, and a folder that holds another run."""

    def lost(progress: Progress) -> None:
        if progress.step >= 5 and progress.phase == "train":
            raise LeaseGone

    configs = members(store, "train.seed=0", "train.seed=1", "train.seed=2")
    train(configs[0], tmp_path / "2")
    ended = train_packed(configs, [tmp_path / str(i) for i in range(3)], reports=[None, lost, None])
    assert isinstance(ended[1], LeaseGone)
    assert isinstance(ended[2], UserError)
    assert read_result(tmp_path / "1") is None
    train(configs[0], tmp_path / "alone")
    assert_same_run(tmp_path / "0", tmp_path / "alone")
    train(configs[1], tmp_path / "1")  # nothing holds it
    assert (read_result(tmp_path / "1") or {})["status"] == "done"


def test_a_failing_program_leaves_members_to_be_trained_alone(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    configs = members(store, "train.seed=0", "train.seed=1")
    monkeypatch.setattr("llamax.train.population.updates", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_packed(configs, [tmp_path / "a", tmp_path / "b"])
    monkeypatch.undo()

    def explode(*_: Any) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr("llamax.train.population.Population._batches", explode)
    with pytest.raises(ProgramFailed, match="2 members failed: RESOURCE_EXHAUSTED"):
        train_packed(configs, [tmp_path / "a", tmp_path / "b"])
    monkeypatch.undo()
    assert train(configs[0], tmp_path / "a")["status"] == "done"


def test_members_resume_from_the_steps_they_are_at(store: Path, tmp_path: Path):
    """One at step 10, one at 5, one never started, one finished; then together to the end."""
    configs = members(store, *(f"train.seed={i}" for i in range(4)), common=("checkpoint.every_steps=5",))
    folders = [tmp_path / str(i) for i in range(4)]
    for i, step in ((0, 10), (1, 5)):

        def crash(progress: Progress, step: int = step) -> None:
            if progress.step >= step + 2 and progress.phase == "train":
                raise LeaseGone

        with pytest.raises(LeaseGone):
            train(configs[i], folders[i], report=crash)
    train(configs[3], folders[3])
    before = (folders[3] / "result.json").read_text()
    ended = train_packed(configs, folders)
    assert all(isinstance(end, dict) and end["steps"] == 24 for end in ended)
    assert (folders[3] / "result.json").read_text() == before
    for i in range(3):
        train(configs[i], tmp_path / f"alone{i}")
        assert_same_run(folders[i], tmp_path / f"alone{i}")


def test_a_signal_saves_every_member(store: Path, tmp_path: Path):
    configs = members(store, "train.seed=0", "train.seed=1")
    folders = [tmp_path / "0", tmp_path / "1"]

    sent: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.step >= 10 and not sent:
            sent.append(progress.step)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train_packed(configs, folders, reports=[None, stop])
    assert all(len(find_checkpoints(folder / "checkpoints")) == 1 for folder in folders)
    train(configs[0], folders[0])  # a member goes on alone
    train(configs[0], tmp_path / "alone")
    assert_same_run(folders[0], tmp_path / "alone")


# ---------------------------------------------------------------- which runs pack
MAY_DIFFER = (
    "optimizer.lr=1e-4",
    "optimizer.weight_decay=0.0",
    "optimizer.clip_norm=null",
    "optimizer.eps=1e-6",
    "optimizer.groups.head.lr=0.5",
    "schedule.warmup=0.5",
    "train.z_loss=1e-4",
    "train.divergence_factor=9.0",
    "train.seed=7",
)
MAY_NOT = (
    "model.d_model=32",
    "model.norm.kind=layernorm",
    "optimizer.kind=lion",
    "schedule.kind=linear",
    "train.batch_size=4",
    "train.seq_len=8",
    "train.steps=13",
    "train.on_divergence=skip",
    "train.grad_accumulation=2",
    "data.mask_documents=true",
)


@pytest.mark.parametrize("override", MAY_DIFFER)
def test_what_may_differ_leaves_the_program_as_it_is(override: str):
    assert shape_key(run_config(override)) == shape_key(run_config())
    assert _program(run_config(override)) == _program(run_config())


@pytest.mark.parametrize("override", MAY_NOT)
def test_what_may_not_differ(override: str):
    assert shape_key(run_config(override)) != shape_key(run_config())


def _program(config: RunConfig) -> str:
    dispatch, _ = prepare(config)
    rules, mesh = load_rules(config.mesh.rules), make_mesh(config.mesh)
    batches = {"tokens": jax.ShapeDtypeStruct((10, 8, 17), jnp.int32)}
    return dispatch.lower(abstract_state(config, rules, mesh), batches, jnp.int32(0)).as_text()  # type: ignore[attr-defined]


def test_equal_steps_from_other_horizons_share_a_shape():
    assert shape_key(run_config("train.steps=null", "train.tokens=1536.0")) == shape_key(run_config())


def test_runs_that_do_not_share_a_shape_are_refused(store: Path, tmp_path: Path):
    with pytest.raises(UserError, match="do not share a shape"):
        train_packed([run_config(store=store), run_config("model.d_model=32", store=store)], [tmp_path, tmp_path])
    assert not fits_one_device(run_config("mesh.data=2"))
    with pytest.raises(UserError, match="whole on one device"):
        train_packed([run_config("mesh.data=2", store=store)] * 2, [tmp_path, tmp_path])
    assert list(tmp_path.iterdir()) == []
