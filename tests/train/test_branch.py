"""A branch is the run from scratch of its schedule, to the last bit, and starts from nothing but its trunk's state."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from llamax.config.load import dump_yaml
from llamax.config.run import RunConfig
from llamax.errors import UserError
from llamax.train.branch import first_state
from llamax.train.checkpoints import load_state
from llamax.train.loop import train
from llamax.train.run_dir import read_evals, read_metrics
from llamax.train.schedule import learning_rate
from llamax.train.setup import share
from llamax.train.state import hyper_of
from tests.train.conftest import build
from tests.train.runs import assert_same_bits, run_config, write_texts
from tests.train.test_loop import Killed, result_of, stop_at, untimed

PHASES = ("schedule.kind=wsd", "schedule.warmup_steps=3", "schedule.final=0.1", "train.eval_every_steps=6")
HORIZONS = {10: 8, 20: 16, 30: 24}  # with a decay of 0.2 of them: where each decay begins


def trunk_config(store: Path, *more: str) -> RunConfig:
    starts = sorted(HORIZONS.values())
    own = (f"train.steps={starts[-1]}", "schedule.decay=0.0", f"checkpoint.branch_steps={starts}")
    return run_config(*PHASES, *own, *more, store=store)


def whole_config(store: Path, steps: int, *more: str) -> RunConfig:
    return run_config(*PHASES, f"train.steps={steps}", "schedule.decay=0.2", *more, store=store)


def branch_config(store: Path, steps: int, trunk: Path, *more: str) -> RunConfig:
    branch = json.dumps({"trunk": trunk.name, "step": HORIZONS[steps]})
    return whole_config(store, steps, f"branch={branch}", *more)


@pytest.fixture(scope="module")
def trunk(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = trunk_config(store)
    path = tmp_path_factory.mktemp("study") / f"trunk-{config.hash8}"
    train(config, path)
    return path


@pytest.mark.parametrize("steps", HORIZONS)
def test_a_branch_is_the_run_from_scratch_bit_for_bit(store: Path, trunk: Path, tmp_path: Path, steps: int):
    start, branch, scratch = HORIZONS[steps], trunk.parent / f"to{steps}", tmp_path / "scratch"
    config = branch_config(store, steps, trunk)
    train(config, branch)
    train(whole_config(store, steps), scratch)
    ours, before, whole = (untimed(read_metrics(path)) for path in (branch, trunk, scratch))
    assert ours == [row for row in whole if row["step"] > start]
    assert [row for row in before if row["step"] <= start] == [row for row in whole if row["step"] <= start]
    assert untimed(read_evals(branch)) == [row for row in untimed(read_evals(scratch)) if row["step"] > start]
    a, b = result_of(branch), result_of(scratch)
    same = ("eval_loss", "train_loss", "tokens", "flops_6n", "flops_causal", "unique_tokens", "epochs", "fingerprint")
    assert {name: a[name] for name in same} == {name: b[name] for name in same}
    assert a["hash"] == config.hash8 != b["hash"]
    common = share(config)
    states = [load_state(path, common.abstract) for path in (branch, scratch)]
    assert_same_bits(*(found[1] for found in states if found is not None))


def test_a_branch_starts_from_the_trunks_state_with_its_own_schedule(store: Path, trunk: Path):
    config = branch_config(store, 20, trunk)
    common = share(config)
    step, state = first_state(config, trunk.parent / "new", common)
    found = load_state(trunk, common.abstract, 16)
    assert found is not None
    assert step == 16 == int(state.step)
    for name in ("model", "opt_state", "step", "skipped", "average"):
        assert_same_bits(getattr(state, name), getattr(found[1], name))
    assert_same_bits(state.hyper, hyper_of(config, 20))
    rates = [float(learning_rate("wsd", s, state.hyper)) for s in range(14, 20)]
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 7.75e-3, 5.5e-3, 3.25e-3, 1e-3], rtol=1e-5)


def test_killed_and_resumed_it_is_the_same_branch(store: Path, trunk: Path):
    steps, clean, killed = 30, trunk.parent / "clean", trunk.parent / "killed"
    config = branch_config(store, steps, trunk, "checkpoint.every_steps=26", "train.steps_per_dispatch=1")
    train(config, clean)
    for step in (25, 27):  # before its first own checkpoint, and after it
        with pytest.raises(Killed):
            train(config, killed, report=stop_at(step, kill=True))
    train(config, killed)
    assert untimed(read_metrics(killed)) == untimed(read_metrics(clean))
    assert result_of(killed)["eval_loss"] == result_of(clean)["eval_loss"]


def test_a_killed_trunk_keeps_its_branch_points(store: Path, trunk: Path, tmp_path: Path):
    config = trunk_config(store)
    path = tmp_path / f"trunk-{config.hash8}"
    for step in (9, 18):
        with pytest.raises(Killed):
            train(config, path, report=stop_at(step, kill=True))
    train(config, path)
    assert sorted(int(p.name) for p in (path / "checkpoints").iterdir()) == [8, 16, 24]
    common = share(config)
    for step in (8, 16, 24):
        states = [load_state(folder, common.abstract, step) for folder in (path, trunk)]
        assert_same_bits(*(found[1] for found in states if found is not None))


def test_a_branch_keeps_the_operand_type_its_trunk_began_with(store: Path, tmp_path: Path):
    config = trunk_config(store, "train.compute_dtype=auto")
    path = tmp_path / f"trunk-{config.hash8}"
    train(config, path)
    other = {"float32": "bfloat16", "bfloat16": "float32"}[result_of(path)["compute_dtype"]]
    env = json.loads((path / "env.json").read_text())
    (path / "env.json").write_text(json.dumps(env | {"precision": {"dtype": other, "why": "test"}}))
    branch = branch_config(store, 10, path, "train.compute_dtype=auto")
    assert train(branch, tmp_path / "branch")["compute_dtype"] == other


# ---------------------------------------------------------------- bad input
def refused(config: RunConfig, path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        train(config, path)
    assert not path.exists(), "nothing half-written"


def test_a_trunk_that_is_not_there_or_another_run(store: Path, trunk: Path, tmp_path: Path):
    refused(branch_config(store, 10, trunk), tmp_path / "b", f"branch.trunk={trunk.name}: no such run beside .*first")
    shutil.copytree(trunk, tmp_path / "trunk-01234567")
    config = branch_config(store, 10, tmp_path / "trunk-01234567")
    refused(config, tmp_path / "b", f"trunk-01234567: that folder holds the run {trunk.name[-8:]}")
    refused(
        branch_config(store, 10, trunk, "optimizer.lr=2e-2", "train.seed=1"),
        trunk.parent / "other",
        r"optimizer.lr is 0.01 there and 0.02 here; train.seed is 0 there and 1 here; only schedule and horizon",
    )


def test_a_checkpoint_that_is_not_there(store: Path, trunk: Path):
    config = branch_config(store, 10, trunk, "branch.step=7")
    refused(config, trunk.parent / "b7", r"no checkpoint of step 7 .*there: 8, 16, 24.*branch_steps=\[7\]")
    refused(branch_config(store, 10, trunk, "branch.step=10"), trunk.parent / "b10", "branch.step=10 is not before")


def test_other_data_and_a_diverged_trunk(store: Path, trunk: Path, tmp_path: Path):
    other = build(write_texts(tmp_path / "texts", seed=9), tmp_path / "store").path
    common = share(branch_config(other, 10, trunk))
    with pytest.raises(UserError, match=r"trained on other data .*a branch goes on with its trunk's data"):
        first_state(branch_config(other, 10, trunk), trunk.parent / "b", common)
    config = trunk_config(store, "optimizer.lr=1e30", "schedule.warmup_steps=0", "optimizer.clip_norm=null")
    path = tmp_path / f"trunk-{config.hash8}"
    result = train(config, path)
    assert result["status"] == "diverged"
    step = int(result["steps"])
    bad = branch_config(store, 10, path, f"branch.step={step}")
    with pytest.raises(UserError, match=f"the trunk diverged at step {step} .*nothing can branch"):
        first_state(bad, tmp_path / "b", share(bad))


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("schedule.warmup_steps=13", "schedule.warmup_steps=13 is longer than the 12 steps of the horizon"),
        ("schedule.warmup_steps=11", r"warmup_steps=11 and schedule.decay=0.2 of 12 steps \(2\) are longer"),
    ],
)
def test_a_horizon_shorter_than_its_warmup(store: Path, tmp_path: Path, override: str, match: str):
    refused(whole_config(store, 12, override), tmp_path / "run", match)


def test_the_trunk_is_part_of_the_identity(store: Path, trunk: Path):
    whole, a = whole_config(store, 20), branch_config(store, 20, trunk)
    b, c = branch_config(store, 20, Path("trunk-01234567")), branch_config(store, 20, trunk, "branch.step=15")
    assert len({run.hash8 for run in (whole, a, b, c)}) == 4
    assert trunk_config(store).hash8 == trunk_config(store, "checkpoint.branch_steps=[3]").hash8
    with pytest.raises(UserError, match=r"branch.trunk = 'a': string should match pattern"):
        branch_config(store, 20, Path("a"))


def test_the_tree_of_a_branch_has_the_runs_places(store: Path, trunk: Path):
    config = branch_config(store, 10, trunk)
    common = share(config)
    _, state = first_state(config, trunk.parent / "new", common)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(common.abstract), strict=True):
        assert leaf.sharding == wanted.sharding
        assert leaf.dtype == wanted.dtype


def test_by_hand(store: Path, trunk: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]):
    """A branch outside a sweep is one command with the trunk's folder beside it."""
    config = tmp_path / "c.yaml"
    config.write_text(dump_yaml(branch_config(store, 20, trunk)))
    code, out, err = cli("train", config, "--run-dir", trunk.parent / "by-hand", "train.steps=24", "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 24
    assert [row["step"] for row in read_metrics(trunk.parent / "by-hand")] == list(range(17, 25))
    code, _, err = cli("train", config, "--run-dir", tmp_path / "deep" / "b")
    assert (code, "no such run beside" in err) == (2, True)
    assert not (tmp_path / "deep").exists()
