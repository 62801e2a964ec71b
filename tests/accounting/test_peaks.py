"""The table of peaks: figures known from elsewhere, ratios that must hold, names that must not match."""

from __future__ import annotations

import re

import pytest

from llamax.accounting import mfu
from llamax.accounting.peaks import PEAKS, peak_flops_per_second


@pytest.mark.parametrize(
    ("device", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_known_devices(device: str, bf16: float) -> None:
    assert peak_flops_per_second(device) == bf16


def test_nvidia_dense_tf32_is_half_of_bf16() -> None:
    """A sparse figure in one column would show as a ratio of 1 or 4."""
    for row in PEAKS:
        if row.device.startswith("NVIDIA") and row.bf16:
            assert 1.9 < row.bf16 / (row.f32 or 1) < 2.1, row.device


@pytest.mark.parametrize(
    "device",
    ["cpu", "", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L400", "TPU v99"],
)
def test_unknown_devices_have_no_utilization(device: str) -> None:
    assert peak_flops_per_second(device) is None
    assert mfu(1e12, device, 1) is None


def test_one_row_a_device() -> None:
    plain = [name for row in PEAKS if not re.search(r"[*?(\[]", row.device) for name in row.device.split("|")]
    assert len(plain) > 20
    for name in plain:
        assert sum(re.fullmatch(row.device, name) is not None for row in PEAKS) == 1, name


def test_mfu_divides_by_all_devices_and_says_its_peak() -> None:
    found = mfu(989.4e12, "NVIDIA H100 80GB HBM3", 4)
    assert found is not None
    assert found.fraction == pytest.approx(0.25)
    assert (found.peak_flops_per_second, found.n_devices, found.dtype) == (989.4e12, 4, "bfloat16")
    assert mfu(1e12, "Tesla V100-SXM2-16GB", 1) is None
    assert mfu(1e12, "Tesla V100-SXM2-16GB", 1, dtype="float32") is not None
