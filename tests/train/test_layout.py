"""mesh=auto on the devices there are."""

from __future__ import annotations

import math

import jax
import pytest

from llamax.config.load import load_run
from llamax.errors import UserError
from llamax.train.precision import precision
from llamax.train.setup import notes, share_places

SMALL = ["mesh=auto", "train.steps=10"]


def test_a_run_takes_the_best_layout_its_arrays_allow_and_says_why() -> None:
    config = load_run("tiny", SMALL)
    _, mesh, abstract = share_places(config)
    assert mesh.size == len(jax.devices())
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(abstract))
    said = notes(config.train.compute_dtype, precision("float32", jax.devices()), config, mesh)
    (first, *others) = said[1:]
    assert first.startswith("mesh=auto takes ")
    assert len(others) == 3
    named = {axis: size for axis, size in mesh.shape.items() if size > 1}
    assert others[0].startswith(" ".join(f"{axis}={size}" for axis, size in named.items()))


def test_one_device_is_a_layout() -> None:
    _, mesh, _ = share_places(load_run("tiny", SMALL), jax.devices()[:1])
    assert math.prod(mesh.shape.values()) == 1


def test_nothing_divides() -> None:
    with pytest.raises(UserError, match="mesh=auto finds no layout for 7 devices: nothing divides"):
        share_places(load_run("tiny", SMALL), jax.devices()[:7])


def test_sizes_beside_auto_are_refused() -> None:
    with pytest.raises(UserError, match=r"layout=auto chooses every size, and tensor=2 is given"):
        load_run("tiny", [*SMALL, "mesh={layout: auto, tensor: 2}"])
    assert load_run("tiny", ["mesh.layout=auto"]).mesh == load_run("tiny", ["mesh=auto"]).mesh
    assert load_run("tiny", SMALL).hash8 == load_run("tiny", SMALL[1:]).hash8
