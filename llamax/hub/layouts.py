"""How a tensor on the hub and an array of ours hold the same numbers.

A hub tensor's axes are products of our axes: a linear layer stores [out, in] and we store [in..., out...], so its two
axes are (our output axes) and (our input axes). That is all a `Layout` says; both directions follow from it, as
views without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Groups = tuple[tuple[int, ...], ...]


class Layout(NamedTuple):
    """`groups(ndim, inputs)` names, for each axis of the hub's tensor, the axes of ours it is the product of.

    `fuse` is the hub axis along which several arrays of ours follow each other in one tensor. With `dealt` they take
    turns along its rows instead, as many turns as the shortest of their slowest axes has entries: the query heads of a
    group, its key head and its value head (Megatron), or a row of the gate and a row of what it multiplies.
    """

    groups: Callable[[int, int], Groups]
    fuse: int = 0
    dealt: bool = False

    def hub_shape(self, shape: tuple[int, ...], inputs: int) -> tuple[int, ...]:
        """The hub's shape of an array of ours."""
        return tuple(math.prod(shape[axis] for axis in group) for group in self.groups(len(shape), inputs))

    def leading(self, shape: tuple[int, ...], inputs: int) -> tuple[int, int]:
        """(our axis that the hub's rows run over slowest, rows for one step along it)."""
        first = self.groups(len(shape), inputs)[0]
        return first[0], math.prod(shape[axis] for axis in first[1:])

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...], inputs: int) -> np.ndarray:
        """A view of the hub's `tensor` with our axes, `shape`."""
        order = [axis for group in self.groups(len(shape), inputs) for axis in group]
        return tensor.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))

    def to_hub(self, array: np.ndarray, inputs: int) -> np.ndarray:
        """Our `array` as the hub stores it."""
        order = [axis for group in self.groups(array.ndim, inputs) for axis in group]
        return array.transpose(order).reshape(self.hub_shape(array.shape, inputs))


def _each(ndim: int, inputs: int) -> Groups:
    return tuple((axis,) for axis in range(ndim))


MATRIX = Layout(lambda ndim, inputs: (tuple(range(inputs, ndim)), tuple(range(inputs))))  # nn.Linear's [out, in]
SAME = Layout(_each)
FLAT = Layout(lambda ndim, inputs: (tuple(range(ndim)),))  # a bias over heads
DEALT, DEALT_FLAT = MATRIX._replace(dealt=True), FLAT._replace(dealt=True)
EXPERTS = Layout(_each, fuse=2)  # all experts in one tensor [expert, in, out] (Llama 4)
ROWS_OUT_IN = Layout(lambda ndim, inputs: ((0, 2), (1,)))  # all experts as rows, [expert x out, in] (DBRX w1, v1)
ROWS_IN_OUT = Layout(lambda ndim, inputs: ((0, 1), (2,)))  # [expert x in, out] (DBRX w2)


class Row(NamedTuple):
    """One line of a family's table: a hub tensor's name, with {layer} and {expert}, and the arrays it holds in order.

    Ours are paths inside a block (`attention.query`, experts as `mlp.experts.up`), of the model (`embedding`), or of a
    multi-token module (`mtp.project`).
    """

    hub: str
    ours: tuple[str, ...]
    layout: Layout = MATRIX
