"""What layers report beside their output: losses and health, gathered over the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# What one block reports: name -> scalar, possibly under the part of the block it comes from (`mlp`, `branch`).
Statistics = dict[str, Any]
LayerStatistics = dict[str, Float[Array, "..."]]
LOAD = "load"


def join_statistics(stacks: Sequence[Sequence[Mapping[str, Any]]]) -> LayerStatistics:
    """The reports of all layers as one flat dict, from one report [repeat] a member of every stack's unit.

    Where the layers are cut into stages the reports have a leading axis of microbatches, all but `load`; it stays.
    A scalar becomes name -> [layers that report it], in layer order whichever part of the block it comes from. `load`,
    whose width differs by layer, stays with the module it is of: `load.stacks.0.blocks.1.mlp` -> [repeat, experts].
    """
    joined: dict[str, list[Array]] = {}
    loads: LayerStatistics = {}
    for s, members in enumerate(stacks):
        here: dict[str, list[Array]] = {}
        for u, member in enumerate(members):
            for path, value in jax.tree_util.tree_leaves_with_path(member):
                *part, name = (key.key for key in path)
                if name == LOAD:
                    loads[".".join((LOAD, f"stacks.{s}.blocks.{u}", *part))] = value
                else:
                    here.setdefault(name, []).append(value)
        for name, values in here.items():
            by_layer = jnp.stack(values, axis=-1)
            joined.setdefault(name, []).append(by_layer.reshape(*by_layer.shape[:-2], -1))
    return {name: jnp.concatenate(values, axis=-1) for name, values in joined.items()} | loads


def add_module(joined: LayerStatistics, path: str, report: Mapping[str, Any]) -> LayerStatistics:
    """`joined` with the report of one more block, which is not in a stack: the module at `path` (`mtp.0.block`)."""
    result = dict(joined)
    for keys, value in jax.tree_util.tree_leaves_with_path(report):
        *part, name = (key.key for key in keys)
        if name == LOAD:
            result[".".join((LOAD, path, *part))] = value
        else:
            result[name] = jnp.concatenate([result.get(name, jnp.zeros(0)), value[None]])
    return result
