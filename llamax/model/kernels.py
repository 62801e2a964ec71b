"""Which hand-written kernels a device has. Each hides behind one function that has a reference beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple


class Host(NamedTuple):
    """What a kernel's rule reads of a mesh: the maker's platform, the least compute capability, how many devices,
    whether sequences or layers are cut over them, and whether they are this process's own (not those of a plan)."""

    platform: str
    capability: float
    devices: int
    cut: bool = False
    here: bool = True


# cudnn: flash attention through jax.nn, which partitions itself over batch and heads; bfloat16 from Ampere on.
# Over cut sequences attention has its own blocks (context.py), and what cuDNN is given for stages side by side, under
# jax.vmap, does not partition over them.
# ragged: products of rows sorted by expert (ragged.py); written for Hopper's instructions, and not partitioned; it asks
# the device at hand for its number of cores.
# splash: TPU flash attention (Pallas); a Pallas call does not partition itself, so flash.py does it by hand.
RULES: dict[str, Callable[[Host], bool]] = {
    "cudnn": lambda host: host.platform == "cuda" and host.capability >= 8.0 and not host.cut,
    "ragged": lambda host: (
        host.platform == "cuda" and 9.0 <= host.capability < 10.0 and host.devices == 1 and host.here
    ),
    "splash": lambda host: host.platform == "tpu" and not host.cut,
}


def host_of(devices: Iterable[Any], axes: Mapping[str, int] | None = None) -> Host:
    """The host of JAX `devices`, which are of one kind, in a mesh with these sizes of its axes."""
    import jax

    devices = list(devices)
    first = devices[0]
    gpu = first.platform == "gpu"
    platform = ("rocm" if "rocm" in first.client.platform_version else "cuda") if gpu else first.platform
    capability = min(float(device.compute_capability) for device in devices) if platform == "cuda" else 0.0
    cut = any((axes or {}).get(axis, 1) > 1 for axis in ("context", "stage"))
    return Host(platform, capability, len(devices), cut, here=first in jax.local_devices())


def kernels_for(host: Host, asked: Literal["auto", "none"] = "auto") -> tuple[str, ...]:
    """The kernels of RULES that a model may use on `host`."""
    return () if asked == "none" else tuple(name for name, runs in RULES.items() if runs(host))
