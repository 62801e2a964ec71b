"""Depth is free: the scanned program does not grow with the number of layers."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from bench_compile import bench_compile, compile_step


def test_a_scanned_step_has_the_instructions_of_four_layers() -> None:
    few, many = (compile_step(layers, unroll=False, width=16)["instructions"] for layers in (4, 32))
    assert few > 500
    assert many < 1.05 * few


@pytest.mark.slow
def test_compiling_32_layers_costs_what_4_do() -> None:
    result = bench_compile([4, 32], repeats=3)
    assert max(result["ratios"].values()) < 1.3
    assert (
        result["default"]["4"]["instructions"] > result["scan"]["4"]["instructions"]
    )  # four are straight code on CPUs
