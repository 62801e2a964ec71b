"""Which runs can train as one population: those that differ only in numbers that are arrays of the state. No JAX."""

from __future__ import annotations

import json
from typing import Any

from llamax.accounting.horizon import horizon
from llamax.config.run import HORIZONS, RunConfig

# Fields of the train section that are arrays of the state: weights of losses, rates and limits.
TRAIN_NUMBERS = (
    "z_loss",
    "moe_balance_loss",
    "moe_sequence_balance_loss",
    "moe_z_loss",
    "mtp_loss",
    "indexer_loss",
    "router_bias_rate",
    "divergence_factor",
)


def shape_key(config: RunConfig) -> str:
    """Equal for two runs whose compiled step is the same program over the same number of steps of the same data.

    They may differ in every number of the optimizer and schedule sections (not in `kind`), in TRAIN_NUMBERS, in
    `train.seed` (other weights, another data order), in what asks for the same number of steps, and in the trunk they
    branch from at the same step.
    """
    data: dict[str, Any] = config.as_dict()
    for name in ("optimizer", "schedule"):
        data[name] = data[name]["kind"]
    for name in (*TRAIN_NUMBERS, "seed", *HORIZONS):
        del data["train"][name]
    if config.branch is not None:
        data["branch"] = config.branch.step
    return json.dumps([data, horizon(config).steps], sort_keys=True)


def fits_one_device(config: RunConfig) -> bool:
    """Whether the mesh lets the run be whole on one device, as a member of a population is."""
    return all(size in (1, -1) for size in config.mesh.sizes.values())
