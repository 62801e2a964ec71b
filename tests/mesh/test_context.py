"""Sequences cut over `context`: steps equal one device's, in every metric and gradient."""

from __future__ import annotations

import re
from typing import Any

import jax
import pytest

from llamax.errors import UserError
from llamax.mesh.rules import make_mesh
from llamax.train.axes import check_axes

from .training import SEQ, assert_trains_as_alone, run_config

FAST = [
    ({"context": 4}, "documents", {"loss_chunk": 64}),
    ({"context": 2, "data": 2, "tensor": 2}, "window", {}),
]
MORE = [
    ({"context": 2}, "sparse", {}),
    ({"context": 2, "fsdp": 2, "data": 2}, "documents", {"remat": "full", "grad_accumulation": 2}),
    ({"context": 8}, "chunk", {}),
    ({"context": 2}, "latent", {}),
    ({"context": 2}, "alibi", {}),
    ({"context": 2}, "learned", {}),
    ({"context": 2, "expert": 2, "data": 2}, "experts", {}),
]


def name(value: Any) -> str:
    """A case in words."""
    return value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items())


@pytest.mark.parametrize(
    ("mesh", "kind", "train"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)], ids=name
)
def test_training_equals_one_device(mesh: dict[str, int], kind: str, train: dict[str, Any]) -> None:
    text = assert_trains_as_alone(mesh, kind, **train)
    # Nothing as long as a whole sequence is as wide as the stream, or has a score a key and query.
    rows = 8 // (mesh.get("data", 1) * mesh.get("fsdp", 1) * mesh.get("expert", 1) * train.get("grad_accumulation", 1))
    if kind in ("documents", "window", "chunk", "learned", "alibi"):
        assert not re.search(rf"f32\[{rows},{SEQ},16\]", text)
        assert not re.search(rf"f32\[{rows},\d+,(\d+,)?{SEQ},(\d+,)?{SEQ}\]", text)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"context": 8, "data": 1}, r"train\.seq_len=24 does not divide into the 16 chunks of mesh\.context=8"),
        (
            {"context": 2, "tensor": 4, "sequence_parallel": True},
            r"train\.seq_len=20 does not divide over context x tensor = 8 devices.*choose a multiple of 8, or drop it",
        ),
    ],
)
def test_a_sequence_that_does_not_divide(mesh: dict[str, Any], message: str) -> None:
    config = run_config(mesh, seq_len=24 if "24" in message else 20)
    with pytest.raises(UserError, match=message):
        check_axes(config, make_mesh(config.mesh, jax.devices()))
