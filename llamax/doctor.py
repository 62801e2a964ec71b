"""What this machine has, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

EXTRAS = {
    "parquet": "pyarrow",
    "datasets": "datasets",
    "tokenizers": "tokenizers",
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "torch": "torch",
}
CORE = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "scipy",
    "pandas",
    "sentencepiece",
    "pydantic",
    "matplotlib",
)


def examine() -> dict[str, Any]:
    """Versions, devices with their known peak, cores, caches and free disk, extras that are not installed, problems."""
    import jax

    from llamax.accounting.peaks import peak_flops_per_second
    from llamax.config.files import cache_dir
    from llamax.mesh.cpu import cores
    from llamax.mesh.start import start

    problems = []
    versions = {}
    for name in CORE:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            problems.append(f"{name} is not installed; reinstall llamax")
    start()
    devices = jax.devices()
    kind = devices[0].device_kind
    peak = peak_flops_per_second(kind)
    if jax.default_backend() != "cpu" and peak is None:
        problems.append(f"device kind {kind!r} is not in the table of peaks: no MFU will be printed")
    cache = cache_dir()
    parent = next(p for p in (cache, *cache.parents) if p.exists())
    if not os.access(parent, os.W_OK):
        problems.append(f"{cache} is not writable; set LLAMAX_CACHE to a writable folder")
    free = shutil.disk_usage(parent).free
    if free < 2**30:
        problems.append(f"{free / 2**20:.0f} MiB free under {parent}; free some disk")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": versions,
        "backend": jax.default_backend(),
        "devices": [f"{d.id}: {d.device_kind}" for d in devices],
        "peak_bf16_flops_per_second": peak,
        "cores": len(cores()),
        "cache": str(cache),
        "compilation_cache": jax.config.values["jax_compilation_cache_dir"],
        "free_disk_gib": round(free / 2**30, 1),
        "extras_missing": [
            f"llamax[{extra}]" for extra, module in EXTRAS.items() if importlib.util.find_spec(module) is None
        ],
        "problems": problems,
    }
