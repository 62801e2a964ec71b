"""What `mesh: auto` becomes on the devices there are."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from llamax.accounting.layout import SHARE, Layout, layouts, rates_of, why
from llamax.config.mesh import MeshConfig
from llamax.config.run import RunConfig
from llamax.model.kernels import host_of, kernels_for
from llamax.train.precision import precision


def ranked_layouts(config: RunConfig, devices: list[Any]) -> list[Layout]:
    """All layouts of a run over `devices`, the best first."""
    dtype = precision(config.train.compute_dtype, devices).dtype
    flash = bool(kernels_for(host_of(devices), config.mesh.kernels)) and dtype != "float32"
    return layouts(config, len(devices), rates_of(devices[0].device_kind, dtype), _memory(devices), flash)


def with_layout(config: RunConfig, layout: Layout) -> RunConfig:
    """The run with the sizes of `layout`."""
    mesh = MeshConfig.model_validate({**config.mesh.as_dict(), **layout.sizes, "layout": "sizes"})
    return config.model_copy(update={"mesh": mesh})


def layout_notes(config: RunConfig, mesh: Mesh) -> list[str]:
    """Why a run that left its layout open has this mesh: the three best, with their estimates."""
    devices = list(mesh.devices.flat)
    ranked = ranked_layouts(config, devices)
    taken = next(one for one in ranked if one.sizes == dict(mesh.shape))
    memory = _memory(devices)
    fits = memory is None or taken.memory <= SHARE * memory
    room = "" if fits else f"; none is estimated to leave {1 - SHARE:.0%} of the memory free, and it may not fit"
    first = f"mesh=auto takes {taken.name} of {len(ranked)} layouts, by estimate (llamax/accounting/layout.py){room}:"
    return [first, *why(ranked, memory)]


def _memory(devices: list[Any]) -> int | None:
    own = [device for device in devices if device.process_index == jax.process_index()]  # others do not say
    return (own[0].memory_stats() or {}).get("bytes_limit") if own else None
