"""The mesh section of a run: devices along each axis."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llamax.config.base import Frozen


class MeshConfig(Frozen):
    """Devices along each mesh axis; -1 on one axis takes all that the others leave. `rules` names a preset in
    configs/meshes.

    `kernels`: auto takes the devices' own attention kernel wherever it covers a layer, none the reference everywhere.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    rules: str = "default"
    kernels: Literal["auto", "none"] = "auto"

    @model_validator(mode="after")
    def _sizes(self) -> MeshConfig:
        sizes = {axis: getattr(self, axis) for axis in ("data", "fsdp", "tensor", "expert")}
        if bad := [f"{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]:
            raise ValueError(f"{bad[0]} is not a device count; give a positive number, or -1 for all remaining devices")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError("only one mesh axis can be -1; give the others a number")
        return self
