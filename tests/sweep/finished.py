"""Planned cells as if they had been trained: run directories whose losses follow a law."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llamax.config.load import dump_yaml
from llamax.sweep.plan import Cell, Plan


def finish(study: Path, plan: Plan, loss: Callable[[float, float], float], *, noise: float, seed: int = 0) -> int:
    """Write config.yaml and result.json of every cell that has none; returns how many."""
    rng, count = np.random.default_rng(seed), 0
    for cell in plan.cells:
        run = study / cell.run_name
        if not run.exists():
            count += 1
            run.mkdir(parents=True)
            (run / "config.yaml").write_text(dump_yaml(cell.config))
            value = loss(cell.n, cell.tokens) * float(np.exp(noise * rng.standard_normal()))
            (run / "result.json").write_text(json.dumps(_result(cell, value)))
    return count


def _result(cell: Cell, loss: float) -> dict[str, object]:
    flops = {f"flops_{name}": value for name, value in cell.flops.items()}
    known = {"n": cell.n, "tokens": cell.tokens, "steps": cell.steps, "eval_loss": loss, "train_loss": loss}
    return {"status": "done", "name": cell.name, "hash": cell.hash, **known, **flops}
