"""A small model whole on several simulated CPU devices, each with its rows of the batch: gradients meet in one sum.

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
from llamax.config.mesh import MeshConfig, Rules
from llamax.config.run import RunConfig
from llamax.mesh.cpu import cores, simulate_devices

AXIS = "data"
# Measured on two cores (benchmarks/notes.md); what was not measured is left as it was.
MOST_PARAMETERS, MOST_DEVICES, FEWEST_TOKENS = 2_000_000, 2, 128  # the last: of a device, in a step


def use_cores(config: RunConfig) -> int:
    """Before JAX starts: as many CPU devices as share the batches of a run that leaves its mesh at the default."""
    count = devices_for(config, len(cores()))
    return count if count > 1 and simulate_devices(count) else 1


def devices_for(config: RunConfig, available: int) -> int:
    """How many devices of one core each share a batch: 1 where that was not measured to gain."""
    default = config.mesh.sizes == MeshConfig().sizes and config.mesh.layout == "sizes"
    if not (default and _covers(config)):
        return 1
    batch, tokens = config.train.batch_size, config.train.batch_size * config.train.seq_len
    most = min(available, MOST_DEVICES, max(tokens // FEWEST_TOKENS, 1))
    return max(count for count in range(1, most + 1) if batch % count == 0)


def replicas(config: RunConfig, rules: Rules, mesh: Mesh) -> Mesh | None:
    """`mesh`, if its devices are CPUs of this process that hold a small dense model each and share the batch."""
    alone = mesh.devices.flat[0].platform == "cpu" and jax.process_count() == 1
    whole = mesh.shape[AXIS] == mesh.size > 1 and [name for name, axes in rules.items() if AXIS in axes] == ["batch"]
    return mesh if alone and whole and _covers(config) else None


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


def _covers(config: RunConfig) -> bool:
    """Whether gradients are sums over sequences (what layers report of a batch is none), and the model is small."""
    plain = all(
        block.mlp.kind != "moe" and block.branch is None and getattr(block.attention, "indexer", None) is None
        for block in config.model.layers
    )
    return plain and config.train.grad_accumulation == 1 and count_params(config.model).total <= MOST_PARAMETERS
