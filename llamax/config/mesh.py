"""The mesh section of a run: devices along each axis."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import model_validator

from llamax.config.base import Frozen
from llamax.config.files import find, read_yaml
from llamax.errors import UserError

# From the axis whose devices talk least to the one whose devices talk most: a machine's neighbours differ in the last.
AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")

Rules = dict[str, tuple[str, ...]]  # logical axis -> mesh axes


class MeshConfig(Frozen):
    """Devices along each mesh axis; -1 on one axis takes all that the others leave. `rules` names a preset in
    configs/meshes.

    `data` and `fsdp` cut the batch, `expert` it and the experts, `tensor` heads and widths, `context` every sequence,
    `stage` the layers; docs/parallelism.md says when to use which. `sequence_parallel` keeps the residual stream and
    its norms cut along the sequence over `tensor` too. With stages, the train.grad_accumulation parts of a batch are
    the pipeline's microbatches.

    `layout: auto` chooses the sizes of all axes for the devices there are, from estimates of memory and communication
    (accounting/layout.py), each time the run starts; `mesh: auto` is short for it.

    `kernels`: auto takes the devices' own kernels, of attention and of experts, wherever they cover a layer, none the
    references everywhere.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1
    stage: int = 1
    sequence_parallel: bool = False
    layout: Literal["sizes", "auto"] = "sizes"
    rules: str = "default"
    kernels: Literal["auto", "none"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"layout": "auto"} if data == "auto" else data

    @model_validator(mode="after")
    def _sizes(self) -> MeshConfig:
        sizes = self.sizes
        if bad := [f"{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]:
            raise ValueError(f"{bad[0]} is not a device count; give a positive number, or -1 for all remaining devices")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError("only one mesh axis can be -1; give the others a number")
        given = [f"{axis}={size}" for axis, size in sizes.items() if size != (-1 if axis == "data" else 1)]
        if self.layout == "auto" and given:
            raise ValueError(f"layout=auto chooses every size, and {given[0]} is given; drop one of the two")
        if self.sequence_parallel and self.tensor == 1 and self.layout == "sizes":
            raise ValueError(
                "sequence_parallel=true cuts sequences over the tensor axis, and tensor=1; raise tensor, or drop it"
            )
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along every axis of AXES as they are asked for, -1 included."""
        return {axis: getattr(self, axis) for axis in AXES}

    def over(self, devices: int) -> dict[str, int]:
        """The same on so many devices: -1 becomes what the others leave, one at least. Whether it fits is not asked."""
        taken = math.prod(size for size in self.sizes.values() if size > 0)
        return {axis: size if size > 0 else max(devices // taken, 1) for axis, size in self.sizes.items()}


def load_rules(name: str) -> Rules:
    """The preset `configs/meshes/<name>.yaml` (or a path) as logical axis -> mesh axes.

    Raises:
        UserError: unknown preset, or a rule that names no mesh axis.
    """
    rules: Rules = {}
    for logical, target in read_yaml(find("meshes", name, "mesh rules")).items():
        axes = () if target is None else (target,) if isinstance(target, str) else tuple(target)
        if bad := [axis for axis in axes if axis not in AXES]:
            raise UserError(
                f"mesh rules {name}: {logical} -> {bad[0]!r} is not a mesh axis; use one of {', '.join(AXES)} or null"
            )
        if (logical == "batch" and "context" in axes) or (logical != "layers" and "stage" in axes):
            raise UserError(
                f"mesh rules {name}: {logical} -> {list(axes)}: context cuts sequences and weights but no batch, stage "
                "cuts layers alone; change that rule"
            )
        rules[logical] = axes
    if "batch" not in rules:
        raise UserError(f"mesh rules {name}: batch has no rule; add `batch: [data, fsdp, expert]`")
    return rules
