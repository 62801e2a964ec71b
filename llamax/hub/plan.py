"""Which hub tensor holds which part of which array of ours: a dialect's table worked out for one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from llamax.accounting.params import Leaf, leaves
from llamax.config.model import ModelConfig
from llamax.errors import UserError
from llamax.hub.dialects.base import Dialect
from llamax.hub.layouts import Layout, Row


class Piece(NamedTuple):
    """The numbers of one hub tensor, or of one part of it, in one array of ours.

    `at` are the leading indices of the array (layer, expert), `shape` its shape after them; the part starts at
    `offset` along the layout's fused axis of a tensor of `hub_shape`, or of each of its `rounds` equal runs of rows.
    """

    hub: str
    hub_shape: tuple[int, ...]
    at: tuple[int, ...]
    shape: tuple[int, ...]
    inputs: int
    layout: Layout
    offset: int
    rounds: int = 1


class Target(NamedTuple):
    """One array of ours with everything that fills it, in the order of its layers and experts."""

    path: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def plan(config: ModelConfig, dialect: Dialect) -> list[Target]:
    """Every array of the model with its pieces.

    Raises:
        UserError: the dialect has no name for an array.
    """
    table: dict[str, tuple[Row, int]] = {ours: (row, i) for row in dialect.rows for i, ours in enumerate(row.ours)}
    found = list(leaves(config))
    by_path = {_key(leaf): leaf for leaf in found}
    firsts = [0]
    for repeat, unit in config.blocks:
        firsts.append(firsts[-1] + repeat * len(unit))
    targets = []
    for leaf in found:
        place, key = _key(leaf)
        if key not in table:
            raise UserError(
                f"dialect {dialect.name} has no tensor for {leaf.name}; export the model in another dialect"
            )
        row, part = table[key]
        shapes = [_own(by_path[place, ours], row) for ours in row.ours]
        hub_shapes = [row.layout.hub_shape(shape, by_path[place, ours].inputs)
                      for shape, ours in zip(shapes, row.ours, strict=True)]  # fmt: skip
        whole = list(hub_shapes[0])
        whole[row.layout.fuse] = sum(shape[row.layout.fuse] for shape in hub_shapes)
        rounds = _rounds(
            row, [(shape, by_path[place, ours].inputs) for shape, ours in zip(shapes, row.ours, strict=True)]
        )
        offset = sum(shape[row.layout.fuse] for shape in hub_shapes[:part]) // rounds
        pieces = tuple(
            Piece(name, tuple(whole), at, shapes[part], leaf.inputs, row.layout, offset, rounds)
            for name, at in _names(row, leaf, place, firsts)
        )
        stacked = (leaf.layers,) if leaf.layers else ()
        targets.append(Target(leaf.name, stacked + leaf.shape, pieces))
    return targets


def hub_shapes(targets: list[Target]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape, in the order of our arrays."""
    return {piece.hub: piece.hub_shape for target in targets for piece in target.pieces}


def _key(leaf: Leaf) -> tuple[tuple[str, ...], str]:
    """(where an array is: a stack's unit, a multi-token module or nowhere; its name in a dialect's table)."""
    parts = leaf.name.split(".")
    place: tuple[str, ...] = ()
    if parts[0] == "stacks":
        place, parts = tuple(parts[:4]), parts[4:]
    elif parts[0] == "mtp":
        place, parts = tuple(parts[:2]), parts[3:] if parts[2] == "block" else ["mtp", *parts[2:]]
    if leaf.experts:
        parts = [*parts[:-1], "experts", parts[-1]]
    return place, ".".join(parts)


def _own(leaf: Leaf, row: Row) -> tuple[int, ...]:
    """The shape of what one tensor of `row` holds of `leaf`: of one expert where the name counts them."""
    return leaf.shape[1:] if "{expert}" in row.hub else leaf.shape


def _rounds(row: Row, parts: list[tuple[tuple[int, ...], int]]) -> int:
    """The turns that the parts of a dealt tensor take, each given as (shape, inputs)."""
    if not row.layout.dealt:
        return 1
    return min(shape[row.layout.leading(shape, inputs)[0]] for shape, inputs in parts)


def _names(row: Row, leaf: Leaf, place: tuple[str, ...], firsts: list[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(hub name, leading indices of our array) for each layer and expert."""
    if not place:
        yield row.hub, ()
        return
    if place[0] == "mtp":
        layers: list[tuple[int, tuple[int, ...]]] = [(firsts[-1] + int(place[1]), ())]
    else:
        stack, member = int(place[1]), int(place[3])
        size = (firsts[stack + 1] - firsts[stack]) // leaf.layers
        layers = [(firsts[stack] + r * size + member, (r,)) for r in range(leaf.layers)]
    for layer, at in layers:
        if "{expert}" in row.hub:
            for expert in range(leaf.experts):
                yield row.hub.format(layer=layer, expert=expert), (*at, expert)
        else:
            yield row.hub.format(layer=layer), at


def compare(wanted: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse a checkpoint that lacks a tensor, has one too many, or one of another shape, naming the first few.

    Raises:
        UserError: they differ.
    """
    problems = [
        ("missing", [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in there]),
        ("not part of the model", [f"{name} {list(shape)}" for name, shape in there.items() if name not in wanted]),
        (
            "of another shape",
            [
                f"{name} is {list(there[name])}, the config asks for {list(shape)}"
                for name, shape in wanted.items()
                if name in there and there[name] != shape
            ],
        ),
    ]
    told = [
        f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {what}: {', '.join(names[:3])}"
        + (", ..." if len(names) > 3 else "")
        for what, names in problems
        if names
    ]
    if told:
        raise UserError(f"{where}: {'; '.join(told)}; config.json and the tensors must be of one model")
