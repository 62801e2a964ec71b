"""Memory of accelerators by the name a person gives them, and how many of one kind hold a number of bytes.

Gigabytes are those of the vendors' data sheets, per JAX device, read as 10^9 bytes; drivers report a few percent more
or less. Collected 2026-11: NVIDIA product pages and data sheets (A100, A10, A30, A40, L4, L40, L40S, H100, H200, B200
as in HGX B200, GB200 as 13.4 TB / 72 of an NVL72, GeForce), Google Cloud TPU system architecture pages. On TPU v2, v3
and v7x a JAX device is half a chip and half its memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamax.errors import UserError

DEFAULT_DEVICE = "h100"
GIGABYTES: dict[str, float] = {
    "v100-16gb": 16,
    "v100-32gb": 32,
    "t4": 16,
    "a100-40gb": 40,
    "a100-80gb": 80,
    "a10": 24,
    "a10g": 24,
    "a30": 24,
    "a40": 48,
    "l4": 24,
    "l40": 48,
    "l40s": 48,
    "rtx3090": 24,
    "rtx4090": 24,
    "rtx5090": 32,
    "rtx6000-ada": 48,
    "h100": 80,
    "h100-nvl": 94,
    "h200": 141,
    "h20": 96,
    "b200": 180,
    "gb200": 186,
    "tpu-v2": 8,
    "tpu-v3": 16,
    "tpu-v4": 32,
    "tpu-v5e": 16,
    "tpu-v5p": 95,
    "tpu-v6e": 32,
    "tpu-v7x": 96,
}


@dataclass(frozen=True)
class Device:
    """One kind of accelerator: its name here and its memory in bytes."""

    name: str
    memory: int

    def needed(self, size: float) -> int:
        """Devices that `size` bytes fill, nothing else in them."""
        return max(1, -(-int(size) // self.memory))


def find_device(name: str) -> Device:
    """A device by its name, in any case.

    Raises:
        UserError: unknown name; all known ones are listed.
    """
    key = name.casefold()
    if key not in GIGABYTES:
        raise UserError(f"device {name!r} is not known; choose one of {', '.join(GIGABYTES)}")
    return Device(key, int(GIGABYTES[key] * 1e9))
