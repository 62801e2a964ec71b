"""Seconds of collectives and steps against sums done by hand."""

from __future__ import annotations

import pytest

from llamax.accounting.flops import training_flops_per_token
from llamax.accounting.roofline import StepTime, collective_seconds, estimated_traffic, peak_of, step_flops
from llamax.accounting.topology import find_topology
from llamax.config.load import run_from_data

GB = 1e9


def test_a_closed_ring_sends_both_ways() -> None:
    cube = find_topology("v5p:4x4x4")
    ring = [(0, 0, z) for z in range(4)]
    # 3/4 of 8 GB over two links of 90 GB/s
    assert collective_seconds("all-gather", 8 * GB, ring, cube) == pytest.approx(6 / 180)
    assert collective_seconds("reduce-scatter", 8 * GB, ring, cube) == pytest.approx(6 / 180)
    assert collective_seconds("all-reduce", 8 * GB, ring, cube) == pytest.approx(12 / 180)
    assert collective_seconds("collective-permute", 9 * GB, ring[:2], cube) == pytest.approx(0.1)


def test_a_group_over_a_plane_has_the_links_of_both_dimensions() -> None:
    cube = find_topology("v5p:4x4x4")
    plane = [(0, y, z) for y in range(4) for z in range(4)]
    assert collective_seconds("all-gather", 16 * GB, plane, cube) == pytest.approx(15 / 360)


def test_a_line_sends_one_way() -> None:
    small = find_topology("v5p:2x2x4")
    line = [(0, 0, z) for z in range(4)]
    assert collective_seconds("all-gather", 8 * GB, line, small) == pytest.approx(6 / 90)
    # A part of a closed ring is a line too.
    assert collective_seconds("all-gather", 8 * GB, line, find_topology("v5p:4x4x8")) == pytest.approx(6 / 90)


def test_an_exchange_is_limited_by_the_bisection() -> None:
    """On a ring of 16 every device sends half of its 16 GB across the cut, which has two links each way: 8 devices x 16
    GB / 2 / (2 x 45 GB/s)."""
    flat = find_topology("v5e:16x16")
    ring = [(0, y) for y in range(16)]
    assert collective_seconds("all-to-all", 16 * GB, ring, flat) == pytest.approx(8 * 16 / 2 / 90)


def test_gpus_inside_a_node_and_between_nodes() -> None:
    nodes = find_topology("h100:8x4")
    node, across, everything = [(i,) for i in range(8)], [(8 * i,) for i in range(4)], [(i,) for i in range(32)]
    assert collective_seconds("all-gather", 8 * GB, node, nodes) == pytest.approx(7 / 450)
    # One GPU of each of four nodes: 3/4 of the array over its own adapter.
    assert collective_seconds("all-gather", 8 * GB, across, nodes) == pytest.approx(6 / 50)
    # All GPUs: what enters a node comes over eight adapters at once, 6 / 400; NVLink needs 7.75 / 450, longer.
    assert collective_seconds("all-gather", 8 * GB, everything, nodes) == pytest.approx(7.75 / 450)
    assert collective_seconds("all-to-all", 8 * GB, everything, nodes) == pytest.approx(6 / 50)


def test_a_step_is_between_the_longest_and_the_sum() -> None:
    time = StepTime(compute=4.0, memory=1.0, network=2.0, peak=1.0)
    assert (time.best, time.worst, time.step) == (4.0, 7.0, 5.5)


def config_of(**train: object):  # type: ignore[no-untyped-def]
    data = {"model": "llama3/8b", "train": {"batch_size": 16, "seq_len": 4096, "steps": 10, **train}}
    return run_from_data(data)


def test_recomputation_is_a_forward_pass_of_the_layers() -> None:
    """Llama 3 8B by hand: 6.98e9 matrix parameters in the layers, and scores of half the keys."""
    flops = step_flops(config_of(), "full")
    tokens = 16 * 4096
    layer = 4096 * (32 + 16) * 128 + 32 * 128 * 4096 + 3 * 4096 * 14336
    attention = 2 * 2 * 32 * 128 * (4096 + 1) / 2
    assert flops["recomputed"] == pytest.approx(tokens * 32 * (2 * layer + attention))
    assert flops["model"] == pytest.approx(tokens * training_flops_per_token(config_of().model, 4096)["causal"])
    assert step_flops(config_of(), "dots")["recomputed"] == pytest.approx(tokens * 32 * attention)
    assert step_flops(config_of(), "none")["recomputed"] == 0


def test_peaks_follow_the_operand_type() -> None:
    h100, v5p = find_topology("h100:8"), find_topology("v5p:2x2x1")
    assert peak_of(h100, "auto") == 989.4e12
    assert peak_of(h100, "float8") == 1978.9e12
    assert peak_of(v5p, "float8") == 459e12  # no float8 there: as bfloat16


def test_traffic_without_a_compiler_is_mostly_weights_at_a_small_batch() -> None:
    """One sequence of 16 tokens on one device: 28 bytes a parameter for state, 6 for three readings in bfloat16."""
    config = config_of(batch_size=1, seq_len=16)
    parameters = 8_030_261_248
    found = estimated_traffic(config, {"data": 1, "fsdp": 1}, flash=True)
    assert found == pytest.approx(34 * parameters, rel=0.01)
    assert found > 34 * parameters
    halved = estimated_traffic(config, {"data": 1, "fsdp": 2}, flash=True)
    assert halved == pytest.approx((14 + 6) * parameters, rel=0.01)
