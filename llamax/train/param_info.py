"""What each parameter is: its path, shape, logical axes, group and matrix layout, read from its own metadata.

Parameters are `nnx.Param(value, axes=(...), group=..., inputs=...)`. `axes` names the axes of one array; a stack of
layers has further leading axes that `axes` leaves out. `inputs` counts the leading contracted axes of one matrix (after
"experts", which is a batch axis when it leads).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from flax import nnx

from llamax.config.run import Groups
from llamax.errors import UserError

GROUPS = tuple(Groups.model_fields)
BUFFER = "buffer"  # state of the model that a rule moves and no optimizer touches


class ParamInfo(NamedTuple):
    """One parameter. `batch` leading axes of `shape` hold independent arrays: stacked layers, then experts.

    `lr`, `weight_decay` and `eps` multiply the optimizer's (`llamax/model/parametrize.py`).
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    group: str
    inputs: int
    batch: int
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0

    @property
    def is_matrix(self) -> bool:
        """Whether each independent array has two sides: a lookup table too, but no norm or bias, whatever its axes."""
        return self.group not in ("norm", "bias", BUFFER) and len(self.shape) - self.batch > 1

    @property
    def view(self) -> tuple[int, ...]:
        """The stack as `[batch, inputs, outputs]` for matrices, `[batch, size]` for vectors."""
        stack, rest = self.shape[: self.batch], self.shape[self.batch :]
        split = max(self.inputs, 1)  # a lookup table contracts nothing; its rows are its inputs
        sides = (rest[:split], rest[split:]) if self.is_matrix else (rest,)
        return (math.prod(stack), *(math.prod(side) for side in sides))


def is_variable(node: Any) -> bool:
    """Whether `node` is a whole parameter with its metadata; the `is_leaf` of maps that need the metadata."""
    return isinstance(node, nnx.Variable)


def param_info(variable: nnx.Variable, path: str = "") -> ParamInfo:
    """The description of one parameter (of a model, or of gradients and moments shaped like it).

    Raises:
        UserError: metadata that is missing or does not fit the array.
    """
    metadata = variable.get_metadata()
    shape = tuple(variable.get_value().shape)
    axes, group, inputs = metadata.get("axes"), metadata.get("group"), metadata.get("inputs", 0)
    if axes is None or group not in (*GROUPS, BUFFER) or len(axes) > len(shape):
        raise UserError(
            f"parameter {path or '(unnamed)'} of shape {shape} has axes={axes}, group={group}; "
            f"give nnx.Param one axis name a dimension and a group out of {', '.join(GROUPS)}"
        )
    batch = len(shape) - len(axes) + (len(axes) > 1 and axes[0] == "experts")
    scales = {name: metadata.get(name, 1.0) for name in ("lr", "weight_decay", "eps")}
    return ParamInfo(path, shape, tuple(axes), group, int(inputs), batch, **scales)


def param_table(model: Any) -> list[ParamInfo]:
    """Every parameter of a module pytree (arrays, tracers or ShapeDtypeStructs), in leaf order.

    Raises:
        UserError: as `param_info`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_variable)
    return [param_info(leaf, jax.tree_util.keystr(path).lstrip(".")) for path, leaf in leaves]
