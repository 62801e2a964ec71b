"""The packing benchmark runs at a tiny size, and its figures are what their names say."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import bench_packing

from tests.train.runs import run_config


def test_compare_on_two_devices():
    config = run_config("train.steps_per_dispatch=3")
    found = bench_packing.compare(config, 3, jax.devices()[:2], seconds=0.05, rounds=3)
    one, packed = found["sides"][bench_packing.ONE], found["sides"][bench_packing.PACKED]
    assert one["ratio_wall"] == one["ratio_processor"] == 1.0
    assert len(packed["rounds"]) == 3
    assert min(packed["rounds"]) <= packed["wall"] <= max(packed["rounds"])
    assert 0 < packed["ratio_wall"] < 100
    assert found["loss_difference"] < 1e-4
    row = {"shape": "tiny", **found}
    text = bench_packing.table({"steps": [row], "end_to_end": []})
    assert text.count("| tiny | 3 |") == 2


@pytest.mark.slow
def test_end_to_end():
    found = bench_packing.end_to_end("S1", 2, "float32", 3)
    assert found["ratio_processor"] == pytest.approx(
        found[bench_packing.PACKED]["processor"] / found[bench_packing.ONE]["processor"]
    )
    assert all(found[name]["wall"] > 0 for name in (bench_packing.ONE, bench_packing.PACKED))
