"""Which hand-written kernels a device has. Each hides behind one function that has a reference beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple


class Host(NamedTuple):
    """What a kernel's rule reads of a mesh: the maker's platform, the least compute capability, how many devices."""

    platform: str
    capability: float
    devices: int


# cudnn: flash attention through jax.nn, which partitions itself over batch and heads; bfloat16 from Ampere on.
# splash: TPU flash attention (Pallas); a Pallas call does not partition itself, so flash.py does it by hand.
RULES: dict[str, Callable[[Host], bool]] = {
    "cudnn": lambda host: host.platform == "cuda" and host.capability >= 8.0,
    "splash": lambda host: host.platform == "tpu",
}


def host_of(devices: Iterable[Any]) -> Host:
    """The host of JAX `devices`, which are of one kind."""
    devices = list(devices)
    first = devices[0]
    gpu = first.platform == "gpu"
    platform = ("rocm" if "rocm" in first.client.platform_version else "cuda") if gpu else first.platform
    capability = min(float(device.compute_capability) for device in devices) if platform == "cuda" else 0.0
    return Host(platform, capability, len(devices))


def kernels_for(host: Host, asked: Literal["auto", "none"] = "auto") -> tuple[str, ...]:
    """The kernels of RULES that a model may use on `host`."""
    return () if asked == "none" else tuple(name for name, runs in RULES.items() if runs(host))
