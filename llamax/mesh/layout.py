"""Which device stands where in the mesh: what talks most lies closest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from llamax.errors import UserError


def laid_out(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """`devices` as an array with the axes of `sizes`, which go from the axis that communicates least to the one that
    communicates most.

    Neighbours along the last axes are devices of one host, as long as they fit in it; on a TPU slice JAX lays the axes
    along its physical ones, and splits one where it must. Several slices are joined by the slow network between them,
    over which `data` alone goes.

    Raises:
        UserError: `data` cannot be cut over the slices.
    """
    shape, platform = tuple(sizes.values()), devices[0].platform
    # Devices of a topology that is only compiled for do not say their slice: it is one.
    slices = {getattr(device, "slice_index", 0) for device in devices} if platform == "tpu" else {0}
    if len(slices) == 1:
        if platform != "tpu":
            devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if sizes["data"] % len(slices):
        raise UserError(
            f"mesh.data={sizes['data']}: there are {len(slices)} slices, and only data parallelism goes between them; "
            f"make mesh.data a multiple of {len(slices)}"
        )
    within = {**sizes, "data": sizes["data"] // len(slices)}
    across = {**dict.fromkeys(sizes, 1), "data": len(slices)}
    return mesh_utils.create_hybrid_device_mesh(
        tuple(within.values()), tuple(across.values()), devices, allow_split_physical_axes=True
    )
