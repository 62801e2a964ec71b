"""XLA's compiler flags for a platform, set before JAX starts its backend.

An unknown flag ends the process, so a flag is listed only when the oldest and newest jaxlib that llamax supports know
it (tests/mesh/test_flags.py asks the installed one).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, MutableMapping

# GPU: large bfloat16 products run on cuBLAS, which needs no search over Triton tilings at compile time; collectives
# overlap with compute; the host-bound small models keep XLA's default command buffers. TPU: none has paid.
# CPU: a dispatch has options of its own (train/step.py), as decoding has on a GPU (generate/serving.py).
FLAGS: dict[str, dict[str, str]] = {
    "cpu": {},
    "gpu": {
        "xla_gpu_enable_triton_gemm": "false",
        "xla_gpu_enable_latency_hiding_scheduler": "true",
    },
    "tpu": {},
}
SWITCH = "LLAMAX_XLA_FLAGS"  # 0: leave XLA_FLAGS as it is


def expected_platform(environment: Mapping[str, str]) -> str:
    """The platform JAX will start, told without starting it: JAX_PLATFORMS, else the plugin that is installed."""
    named = environment.get("JAX_PLATFORMS", "").split(",")[0].strip().casefold()
    if named:
        return "gpu" if named in ("cuda", "rocm", "gpu") else named
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    return "gpu" if any(importlib.util.find_spec(name) for name in plugins) else "cpu"


def set_flags(environment: MutableMapping[str, str] | None = None) -> str:
    """XLA_FLAGS with those of the platform added, also in the environment; a flag that is there is left alone."""
    environment = os.environ if environment is None else environment
    given = environment.get("XLA_FLAGS", "")
    if environment.get(SWITCH) == "0":
        return given
    named = {word.lstrip("-").partition("=")[0] for word in given.split()}
    ours = FLAGS.get(expected_platform(environment), {})
    added = [f"--{name}={value}" for name, value in ours.items() if name not in named]
    if added:
        environment["XLA_FLAGS"] = " ".join([*given.split(), *added])
    return environment.get("XLA_FLAGS", "")
