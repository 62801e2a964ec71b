"""Logical axes to mesh axes: where every array of the training state lives."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamax.config.mesh import AXES, MeshConfig, Rules
from llamax.errors import UserError
from llamax.mesh.layout import laid_out


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The device mesh with the axes AXES, laid out as layout.py says; -1 becomes the devices the others leave.

    Without a -1 a single process uses as many of its devices as asked for.

    Raises:
        UserError: more devices asked for than there are, or a number that -1 cannot complete.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes
    fixed = math.prod(size for size in sizes.values() if size > 0)
    free = [axis for axis, size in sizes.items() if size == -1]
    shown = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if fixed > len(devices) or (free and len(devices) % fixed):
        raise UserError(
            f"{shown}: the fixed sizes multiply to {fixed}, which does not fit the {len(devices)} devices there are; "
            "change one of them"
        )
    if free:
        sizes = config.over(len(devices))
    elif fixed < len(devices):
        if jax.process_count() > 1:
            raise UserError(
                f"{shown}: uses {fixed} of the {len(devices)} devices of {jax.process_count()} processes; "
                "set one axis to -1"
            )
        devices = devices[:fixed]  # what was asked for; the others stay idle
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return Mesh(laid_out(sizes, devices), AXES, axis_types=types)


def spec_of(axes: tuple[str, ...], shape: tuple[int, ...], rules: Rules, mesh: Mesh, name: str) -> PartitionSpec:
    """The partition of one array with logical `axes` (a stacked array has one more leading dimension, "layers").

    Raises:
        UserError: an axis without a rule, a mesh axis used twice, or a dimension its mesh axes do not divide; the
            message names the array.
    """
    if len(shape) == len(axes) + 1:
        axes = ("layers", *axes)
    used: dict[str, str] = {}
    parts: list[Any] = []
    for logical, size in zip(axes, shape, strict=True):
        if logical not in rules:
            raise UserError(
                f"mesh rules: array {name} has the axis {logical!r}, which has no rule; add `{logical}: null`"
            )
        targets = tuple(axis for axis in rules[logical] if mesh.shape[axis] > 1)
        for axis in targets:
            if axis in used:
                raise UserError(
                    f"mesh rules: array {name} would use mesh axis {axis!r} twice (for {used[axis]} and {logical}); "
                    "change one rule"
                )
            used[axis] = logical
        ways = 1
        for axis in targets:
            ways *= mesh.shape[axis]
        if size % ways:
            raise UserError(
                f"mesh: array {name}, axis {logical} of {size}, is not divisible by "
                f"{' x '.join(f'{a}={mesh.shape[a]}' for a in targets)}; change the mesh or the model"
            )
        parts.append(targets if len(targets) > 1 else targets[0] if targets else None)
    return PartitionSpec(*parts)


def shardings(tree: Any, model: Any, rules: Rules, mesh: Mesh) -> Any:
    """A sharding for every leaf of `tree` (abstract or concrete): parameters and whatever has a parameter's shape by
    its logical axes (gradients, moments), everything else replicated."""
    known = {
        (leaf.get_metadata()["axes"], tuple(leaf.get_value().shape))
        for leaf in jax.tree.leaves(model, is_leaf=_is_variable)
        if _is_variable(leaf)
    }

    def place(path: Any, leaf: Any) -> Any:
        spec = PartitionSpec()
        if _is_variable(leaf):
            axes = leaf.get_metadata().get("axes")
            shape = tuple(getattr(leaf.get_value(), "shape", ()))
            if (axes, shape) in known:
                spec = spec_of(axes, shape, rules, mesh, jax.tree_util.keystr(path, simple=True, separator="."))
            return jax.tree.map(lambda _: NamedSharding(mesh, spec), leaf)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=_is_variable)


def batch_sharding(rules: Rules, mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The sharding of [*leading, batch, ...]: the batch axis over its mesh axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, rules["batch"]))


def stream_sharding(rules: Rules, mesh: Mesh, sequence: tuple[str, ...], batch: tuple[str, ...] = ()) -> NamedSharding:
    """The sharding of [batch, seq, ...]: the batch as always and over the mesh axes `batch`, the sequence over
    `sequence`."""
    over = tuple(axis for axis in sequence if mesh.shape[axis] > 1)
    rows = (*rules["batch"], *batch)
    return NamedSharding(mesh, PartitionSpec(rows, over) if over else PartitionSpec(rows))


def batch_ways(rules: Rules, mesh: Mesh) -> int:
    """Into how many parts the batch axis is cut."""
    ways = 1
    for axis in rules["batch"]:
        ways *= mesh.shape[axis]
    return ways


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)
