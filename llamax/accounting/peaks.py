"""Peak arithmetic rates of accelerators, and model FLOPs utilization.
 Dense rates (never the "with sparsity" figure, which is twice as large), per JAX device, in FLOP/s. Collected 2026-11
from vendors' data sheets: NVIDIA product data sheets and architecture white papers (V100, A100, H100, H200,
Blackwell, Ada, GA102), Google Cloud TPU system architecture pages. On TPU v2, v3 and v7x a JAX device is half a chip.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_T = 1e12


@dataclass(frozen=True)
class Peak:
    """One row: `device` is a regular expression for the whole of jax's `device_kind`.

    `bf16`: bfloat16 operands, float32 accumulation. `f32`: what a float32 matmul at JAX's default precision runs at:
    TF32 on NVIDIA from Ampere on, plain float32 before, one bfloat16 pass on TPU. `fp8`: e4m3 or e5m2 operands. None
    where the device lacks the format or llamax does not use it there.
    """

    device: str
    bf16: float | None
    f32: float | None
    fp8: float | None = None


PEAKS: tuple[Peak, ...] = (
    # Google TPU: per chip v2 46 (45 in later pages), v3 123, v4 275, v5e 197, v5p 459, v6e 918, v7x 2307 TFLOP/s
    Peak(r"TPU v2", 22.5 * _T, 22.5 * _T),
    Peak(r"TPU v3", 61.5 * _T, 61.5 * _T),
    Peak(r"TPU v4", 275 * _T, 275 * _T),
    Peak(r"TPU v5 lite|TPU v5e", 197 * _T, 197 * _T),
    Peak(r"TPU v5|TPU v5p", 459 * _T, 459 * _T),
    Peak(r"TPU v6 lite|TPU v6e", 918 * _T, 918 * _T),
    Peak(r"TPU7x|TPU v7x?", 1153.5 * _T, 1153.5 * _T),
    # NVIDIA data centre
    Peak(r"(Tesla|NVIDIA) V100-SXM2-.*", None, 15.7 * _T),
    Peak(r"(Tesla|NVIDIA) V100-PCIE-.*", None, 14 * _T),
    Peak(r"Tesla T4|NVIDIA T4", None, 8.1 * _T),
    Peak(r"NVIDIA A100-(SXM4|PCIE)-.*|NVIDIA A100 80GB PCIe", 312 * _T, 156 * _T),
    Peak(r"NVIDIA A30", 165 * _T, 82 * _T),
    Peak(r"NVIDIA A40", 149.7 * _T, 74.8 * _T),
    Peak(r"NVIDIA A10", 125 * _T, 62.5 * _T),
    Peak(r"NVIDIA A10G", 70 * _T, 35 * _T),
    Peak(r"NVIDIA L4", 121 * _T, 60 * _T, 242.5 * _T),
    Peak(r"NVIDIA L40", 181 * _T, 90.5 * _T, 362 * _T),
    Peak(r"NVIDIA L40S", 362 * _T, 183 * _T, 733 * _T),
    Peak(r"NVIDIA RTX 6000 Ada Generation", 364.2 * _T, 182.1 * _T, 728.5 * _T),
    Peak(r"NVIDIA H100 80GB HBM3|NVIDIA H100 SXM5.*", 989.4 * _T, 494.7 * _T, 1978.9 * _T),
    Peak(r"NVIDIA H100 PCIe", 756 * _T, 378 * _T, 1513 * _T),
    Peak(r"NVIDIA H100 NVL", 835 * _T, 417.5 * _T, 1671 * _T),
    Peak(r"NVIDIA H200", 989.4 * _T, 494.7 * _T, 1978.9 * _T),
    Peak(r"NVIDIA H200 NVL", 835 * _T, 417.5 * _T, 1671 * _T),
    Peak(r"NVIDIA GH200 (480GB|144G HBM3e|120GB)", 989.4 * _T, 494.7 * _T, 1978.9 * _T),
    Peak(r"NVIDIA H20", 148 * _T, 74 * _T, 296 * _T),
    Peak(r"NVIDIA B200", 2250 * _T, 1125 * _T, 4500 * _T),
    Peak(r"NVIDIA GB200", 2500 * _T, 1250 * _T, 5000 * _T),
    # NVIDIA GeForce: the rate with float32 accumulation, half of the float16-accumulation one
    Peak(r"NVIDIA GeForce RTX 3090", 71.2 * _T, 35.6 * _T),
    Peak(r"NVIDIA GeForce RTX 4090", 165.2 * _T, 82.6 * _T),
    Peak(r"NVIDIA GeForce RTX 5090", 209.5 * _T, 104.8 * _T),
)


@dataclass(frozen=True)
class Mfu:
    """Model FLOPs utilization: `fraction` = flops_per_second / (peak_flops_per_second x n_devices).

    It says nothing without its FLOP convention, which the caller chose and prints beside it, and the peak, which is
    here.
    """

    fraction: float
    peak_flops_per_second: float
    dtype: str
    device_kind: str
    n_devices: int


def peak_flops_per_second(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Dense peak of one JAX device for matmuls of `dtype` (bfloat16, float32, float8); None for an unknown device.

    Names must match whole: a laptop, MIG or cut-down part is not the part it is named after.
    """
    for row in PEAKS:
        if re.fullmatch(row.device, device_kind.strip()) and "MIG" not in device_kind:
            return {"bfloat16": row.bf16, "float8": row.fp8}.get(dtype, row.f32)
    return None


# Bytes a second of a device's memory, from the same sheets.
BANDWIDTHS: tuple[tuple[str, float], ...] = (
    (r"NVIDIA A100-(SXM4|PCIE)-40GB", 1.555e12),
    (r"NVIDIA A100-SXM4-80GB", 2.039e12),
    (r"NVIDIA H100 80GB HBM3|NVIDIA H100 SXM5.*", 3.35e12),
    (r"NVIDIA H100 PCIe", 2.0e12),
    (r"NVIDIA H100 NVL", 3.9e12),
    (r"NVIDIA H200( NVL)?", 4.8e12),
    (r"NVIDIA B200", 8.0e12),
)


def bandwidth_bytes_per_second(device_kind: str) -> float | None:
    """What one device's memory delivers at most; None for one that is not in BANDWIDTHS."""
    found = (rate for device, rate in BANDWIDTHS if re.fullmatch(device, device_kind.strip()))
    return next(found, None)


def mfu(flops_per_second: float, device_kind: str, n_devices: int, dtype: str = "bfloat16") -> Mfu | None:
    """Utilization of `n_devices` devices of one kind by `flops_per_second` in total; None where the peak is not
    known."""
    peak = peak_flops_per_second(device_kind, dtype)
    if peak is None:
        return None
    return Mfu(flops_per_second / (peak * n_devices), peak, dtype, device_kind, n_devices)
