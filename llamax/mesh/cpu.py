"""The cores of this machine, and JAX devices simulated on them. Imports JAX only to ask for devices."""

from __future__ import annotations

import os


def cores() -> list[int]:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def simulate_devices(count: int) -> bool:
    """Gives JAX `count` CPU devices, also where it will use an accelerator. False, and nothing is done, where it has
    started or the user has said how many there are (JAX_NUM_CPU_DEVICES, or XLA_FLAGS)."""
    if "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return False
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return False
    return True
