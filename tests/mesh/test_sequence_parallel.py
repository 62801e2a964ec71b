"""The stream between a block's parts cut over `tensor`: steps equal one device's, and no norm sees a whole sequence."""

from __future__ import annotations

import re
from typing import Any

import pytest

from .test_context import name
from .training import SEQ, assert_trains_as_alone

MESH = {"tensor": 2, "sequence_parallel": True}
FAST = [(MESH, "dense", {})]
MORE = [
    ({**MESH, "context": 2, "data": 2}, "window", {"remat": "dots"}),
    (MESH, "latent", {}),
    (MESH, "experts", {}),
    ({**MESH, "fsdp": 2}, "learned", {}),
]


@pytest.mark.parametrize(
    ("mesh", "kind", "train"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)], ids=name
)
def test_training_equals_one_device(mesh: dict[str, Any], kind: str, train: dict[str, Any]) -> None:
    text = assert_trains_as_alone(mesh, kind, **train)
    if kind == "dense":  # a norm's statistics, one a token: of half a sequence alone
        shapes = set(re.findall(r"f32\[[\d,]+\]\S* rsqrt\(", text))
        assert shapes
        assert all(str(SEQ // 2) in shape and f",{SEQ}" not in shape for shape in shapes), shapes
