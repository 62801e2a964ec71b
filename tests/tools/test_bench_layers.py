"""What the benchmark compares computes the same function."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from bench_layers import bench_decode, bench_experts


def test_experts_are_the_ragged_product() -> None:
    row = bench_experts(64, 16, 8, "float32", rounds=1, seconds=0)
    assert row["apart"] < 1e-5
    assert row["llamax"] > 0


def test_the_served_model_is_the_trained_one() -> None:
    row = bench_decode("ladder/d8", "float32", rounds=1, seconds=0, steps=4, capacity=8)
    assert row["apart"] < 1e-5
    assert row["trained"] > 0


def test_a_difference_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_layers

    exact = bench_layers.ragged
    monkeypatch.setattr(bench_layers, "ragged", lambda *arguments: 1.01 * exact(*arguments))
    assert bench_experts(64, 16, 8, "float32", rounds=1, seconds=0)["apart"] > 1e-3
