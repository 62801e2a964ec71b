"""What a process does once before it touches a device."""

from __future__ import annotations

import os

import jax

from llamax.config.files import cache_dir
from llamax.mesh.flags import set_flags


def start() -> None:
    """Set the compiler flags of the platform (flags.py), and turn on the persistent compilation cache, unless JAX has
    one already or LLAMAX_COMPILATION_CACHE=0."""
    set_flags()
    if os.environ.get("LLAMAX_COMPILATION_CACHE") == "0" or jax.config.values["jax_compilation_cache_dir"]:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
