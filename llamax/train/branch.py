"""Where a run starts: at step 0 from its seed, or at the state its trunk had when it branched off.

A WSD run holds the peak learning rate until its decay begins, and until then its state does not depend on how long it
will be. So one run at the peak, the trunk, passes through the states of the runs of every horizon, and a branch that
takes the trunk's state at the start of its decay is the run from scratch, bit for bit on the same mesh, where both
have the same warmup in steps (arXiv:2404.06395, section 4). A branch takes over all but the numbers of its schedule.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from llamax.accounting.horizon import horizon
from llamax.config.load import diff
from llamax.config.run import HORIZONS, RunConfig
from llamax.errors import UserError
from llamax.train.checkpoints import find_checkpoints, load_state
from llamax.train.run_dir import CHECKPOINTS, is_run, read_config, read_result
from llamax.train.setup import Common
from llamax.train.state import TrainState, hyper_of, seed_of

OWN = (*HORIZONS, "eval_every_steps", "steps_per_dispatch")  # of the train section, where a branch may differ


def first_state(config: RunConfig, run_dir: Path, common: Common) -> tuple[int, TrainState]:
    """The step a run begins at and its state there, on the run's mesh.

    Raises:
        UserError: the trunk's checkpoint is missing, damaged, of a diverged run, or of other data.
    """
    hyper = hyper_of(config, horizon(config).steps)
    if config.branch is None:
        return 0, common.initialize(hyper, seed_of(config))
    folder, step = trunk_of(config, run_dir), config.branch.step
    found = load_state(folder, common.abstract, step)
    if found is None:
        raise UserError(_absent(folder, step))
    _, state, meta = found
    if meta.get("cause"):
        raise UserError(
            f"{folder}: the trunk diverged at step {step} ({meta['cause']}), so nothing can branch from there"
        )
    if meta.get("fingerprint") != common.store.fingerprint:
        raise UserError(
            f"{folder}: the trunk was trained on other data (fingerprint {str(meta.get('fingerprint'))[:12]}, "
            f"here {common.store.fingerprint[:12]}); a branch goes on with its trunk's data"
        )
    places = {name: leaf.sharding for name, leaf in common.abstract.hyper.items()}
    return step, dataclasses.replace(state, hyper=jax.device_put(hyper, places))


def trunk_of(config: RunConfig, run_dir: Path) -> Path:
    """The run directory of a branch's trunk, beside the branch's own."""
    assert config.branch is not None
    return Path(run_dir).absolute().parent / config.branch.trunk


def check_trunk(config: RunConfig, run_dir: Path) -> None:
    """Refuses, before anything is written, a branch that was not begun yet and whose trunk is not there or another run.

    A branch differs from its trunk in schedule, horizon and evaluations alone: batches go on in the trunk's order, and
    costs are counted for one model.

    Raises:
        UserError: names the trunk and what is wrong with it.
    """
    if config.branch is None or is_run(run_dir):
        return
    folder, step = trunk_of(config, run_dir), config.branch.step
    if not is_run(folder):
        raise UserError(f"branch.trunk={folder.name}: no such run beside {run_dir}; train the trunk first")
    trunk = read_config(folder)
    if trunk.hash8 != folder.name[-8:]:
        raise UserError(f"branch.trunk={folder.name}: that folder holds the run {trunk.hash8}; name its own trunk")
    if changed := diff(_shared(trunk), _shared(config)):
        fields = "; ".join(f"{name} is {old!r} there and {new!r} here" for name, old, new in changed[:4])
        raise UserError(f"{run_dir} cannot branch from {folder.name}: {fields}; only schedule and horizon may differ")
    if not any(found.step == step for found in find_checkpoints(folder / CHECKPOINTS)):
        raise UserError(_absent(folder, step))


def _shared(config: RunConfig) -> dict[str, Any]:
    data = {name: config.as_dict()[name] for name in ("model", "data", "optimizer", "train")}
    return data | {"train": {name: value for name, value in data["train"].items() if name not in OWN}}


def _absent(folder: Path, step: int) -> str:
    have = ", ".join(str(found.step) for found in find_checkpoints(folder / CHECKPOINTS)[::-1]) or "none"
    state = "is finished and" if read_result(folder) is not None else "has not come so far, or"
    return (
        f"{folder}: no checkpoint of step {step} to branch from (there: {have}); the trunk {state} did not keep one; "
        f"train it with checkpoint.branch_steps=[{step}]"
    )
