"""A small model whole on two simulated CPU devices, each with its rows of the batch: gradients meet in one sum.

Devices that are threads of one process take tens of microseconds to meet, and the compiler has them meet for every
array. A step of a small model is two dozen arrays and hardly more than a millisecond, so it sums one vector instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from llamax.accounting.params import count_params
from llamax.config.mesh import MeshConfig, Rules, load_rules
from llamax.config.run import RunConfig
from llamax.mesh.cpu import cores, simulate_devices

AXIS, DEVICES = "data", 2
# What was measured to gain (benchmarks/notes.md, "Two simulated devices, again"); the rest is left as it was.
MOST_PARAMETERS = 2_000_000
TOKENS = (128 * DEVICES, 4096)  # of a step


def use_cores(config: RunConfig, most: int | None = None) -> int:
    """Before JAX starts: as many CPU devices as are to share the batches of a run, at most `most`."""
    count = devices_for(config, min(len(cores()), most or DEVICES))
    return count if count > 1 and simulate_devices(count) else 1


def devices_for(config: RunConfig, available: int) -> int:
    """How many devices of a core each share a batch where the mesh is left as it is by default."""
    default = config.mesh.sizes == MeshConfig().sizes and config.mesh.layout == "sizes"
    fits = available >= DEVICES and config.train.batch_size % DEVICES == 0
    return DEVICES if default and fits and _covers(config, load_rules(config.mesh.rules)) else 1


def replicas(config: RunConfig, rules: Rules, mesh: Mesh) -> Mesh | None:
    """`mesh`, if its devices are two CPUs of this process that hold a small dense model each and share the batch."""
    alone = mesh.devices.flat[0].platform == "cpu" and jax.process_count() == 1
    return mesh if alone and mesh.shape[AXIS] == mesh.size == DEVICES and _covers(config, rules) else None


def one_of(mesh: Mesh) -> Mesh:
    """The mesh of its first device alone."""
    return Mesh(mesh.devices.ravel()[:1].reshape((1,) * mesh.devices.ndim), mesh.axis_names, axis_types=mesh.axis_types)


def summed(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function(model, batch, *more)`, a sum over the rows of `batch`, of every device's own rows, added up."""

    def own(model: Any, batch: Any, more: tuple[Any, ...]) -> Any:
        vector, restore = ravel_pytree(function(model, batch, *more))
        return restore(jax.lax.psum(vector, AXIS))

    everywhere = PartitionSpec()
    mapped = jax.shard_map(
        own, mesh=mesh, in_specs=(everywhere, PartitionSpec(AXIS), everywhere), out_specs=everywhere, check_vma=False
    )
    return lambda model, batch, *more: mapped(model, batch, more)


def _covers(config: RunConfig, rules: Rules) -> bool:
    """Whether gradients are sums over sequences, of a small model that `rules` leave whole on every device.

    What layers report of a batch is no such sum, nor is a float8 product, scaled by the largest entry of a batch.
    """
    train = config.train
    plain = all(
        block.mlp.kind != "moe" and block.branch is None and getattr(block.attention, "indexer", None) is None
        for block in config.model.layers
    )
    summable = plain and train.grad_accumulation == 1 and train.compute_dtype != "float8"
    whole = [name for name, axes in rules.items() if AXIS in axes] == ["batch"]
    small = count_params(config.model).total <= MOST_PARAMETERS
    return summable and whole and small and TOKENS[0] <= train.batch_size * train.seq_len <= TOKENS[1]
