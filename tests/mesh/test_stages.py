"""Layers cut over `stage`: a pipelined step equals the accumulated one of one device, in every metric and gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.load import run_from_data
from llamax.errors import UserError
from llamax.mesh.rules import make_mesh
from llamax.model.pipeline import _split, interleaved
from llamax.train.axes import check_axes, pipeline_note

from .test_context import name
from .training import KINDS, assert_trains_as_alone, run_config

FAST = [({"stage": 2, "data": 2}, "documents", {"grad_accumulation": 4})]
MORE = [
    ({"stage": 2}, "experts", {"grad_accumulation": 2}),
    ({"stage": 2}, "dense", {"grad_accumulation": 1, "unroll_layers": True}),
    ({"stage": 2, "context": 2}, "sparse", {"grad_accumulation": 2, "loss_chunk": 64}),
    ({"stage": 2}, "latent", {"grad_accumulation": 2}),
    ({"stage": 2, "data": 2, "tensor": 2, "sequence_parallel": True}, "documents", {"grad_accumulation": 2}),
    ({"stage": 2, "fsdp": 2, "context": 2}, "window", {"grad_accumulation": 2, "remat": "full"}),
]


@pytest.mark.parametrize(
    ("mesh", "kind", "train"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)], ids=name
)
def test_training_equals_one_device(mesh: dict[str, Any], kind: str, train: dict[str, Any]) -> None:
    text = assert_trains_as_alone(mesh, kind, **train)
    assert "collective-permute" in text  # from stage to stage


def test_rows_are_dealt_out_to_microbatches() -> None:
    rows = jnp.arange(12)
    np.testing.assert_array_equal(_split(interleaved(rows, 3), 3), rows.reshape(3, 4))


def test_the_note_says_what_the_bubble_costs() -> None:
    config = run_config({"stage": 2}, grad_accumulation=4)
    note = pipeline_note(config, make_mesh(config.mesh, jax.devices()))
    assert note.startswith("2 stages, 4 microbatches: 20% of a step is their bubble")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": {"stage": 4}}, r"model\.segments\.0\.repeat=2 does not divide into mesh\.stage=4 stages"),
        ({"log": {"gradient_noise": True}}, r"log\.gradient_noise=true needs the gradient of each microbatch"),
        ({"model": {"mtp": 1, **KINDS["experts"]}}, r"model\.mtp=1 with experts and mesh\.stage=2"),
    ],
)
def test_what_stages_cannot_do(change: dict[str, dict[str, Any]], message: str) -> None:
    data = run_config({"stage": 2}, grad_accumulation=2).as_dict()
    for section, fields in change.items():
        data[section] |= fields
    config = run_from_data(data)
    with pytest.raises(UserError, match=message):
        check_axes(config, make_mesh(config.mesh, jax.devices()))
