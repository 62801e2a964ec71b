"""What `train.remat: auto` becomes: the least recomputation whose estimated memory fits the devices."""

from __future__ import annotations

import math
from typing import Any, Literal

from jax.sharding import Mesh

from llamax.accounting.memory import memory_bytes, stacked_share
from llamax.config.run import RunConfig
from llamax.model.kernels import host_of, kernels_for

Policy = Literal["none", "dots", "full"]

POLICIES: tuple[Policy, ...] = ("none", "dots", "full")  # from the fastest step to the smallest
SHARE = 0.85  # of a device's memory that the estimate may fill: compilers add buffers of their own


def rematerialization(config: RunConfig, mesh: Mesh) -> tuple[Policy, str]:
    """(the policy a run on `mesh` has, the rule that chose it)."""
    if config.train.remat != "auto":
        return config.train.remat, f"remat={config.train.remat}: as the config says"
    return for_devices(config, list(mesh.devices.flat), dict(mesh.shape))


def for_devices(config: RunConfig, devices: list[Any], mesh: dict[str, int]) -> tuple[Policy, str]:
    """The same for `auto` and the devices of a mesh of these sizes."""
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    if memory is None:
        return "none", f"remat=none: {devices[0].device_kind} does not say how much memory it has"
    kernels = kernels_for(host_of(devices, mesh), config.mesh.kernels)
    flash = bool(kernels) and config.train.compute_dtype != "float32"
    return fitting(config, memory, flash or mesh.get("context", 1) > 1, mesh)  # over cut sequences no scores are kept


def fitting(config: RunConfig, memory: int, flash: bool, mesh: dict[str, int]) -> tuple[Policy, str]:
    """The first of POLICIES whose bytes a device (see `device_bytes`) are within SHARE of `memory`; the last, if none
    is."""
    room, tried = SHARE * memory, []
    for policy in POLICIES:
        needed = device_bytes(config, policy, flash, mesh)
        tried.append(f"{policy} needs {needed / 1e9:.1f} GB")
        if needed <= room:
            break
    rule = f"remat={policy}: {', '.join(tried)} a device, {SHARE:.0%} of its memory is {room / 1e9:.1f} GB"
    return policy, rule if needed <= room else f"{rule}; it may not fit: lower train.batch_size or train.loss_chunk"


def device_bytes(config: RunConfig, policy: Policy, flash: bool, mesh: dict[str, int]) -> float:
    """Estimated bytes of one device of a mesh of these sizes: weights and moments over fsdp, tensor, expert and
    context, those of the layers over stage too, activations and logits over all axes."""
    train, stages = config.train.model_copy(update={"remat": policy}), mesh.get("stage", 1)
    found = memory_bytes(config.model_copy(update={"train": train}), flash, stages)
    weights = math.prod(mesh.get(axis, 1) for axis in ("fsdp", "tensor", "expert", "context"))
    layers = stacked_share(config.model)
    state = (found["parameters"] + found["gradients"] + found["optimizer"]) * (1 - layers * (1 - 1 / stages))
    return state / weights + (found["activations"] + found["logits"]) / (weights * mesh.get("data", 1) * stages)
