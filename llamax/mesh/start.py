"""What a process does once before it touches a device."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def cache_dir() -> Path:
    """Where llamax keeps compiled programs and built stores: $LLAMAX_CACHE, else $XDG_CACHE_HOME/llamax, else ~/.cache/llamax."""
    if given := os.environ.get("LLAMAX_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamax"


def start() -> None:
    """Turn on the persistent compilation cache, unless JAX has one already or LLAMAX_COMPILATION_CACHE=0."""
    if os.environ.get("LLAMAX_COMPILATION_CACHE") == "0" or jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
