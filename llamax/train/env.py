"""What a run ran on: the content of env.json, enough to explain a number later and nothing that names the machine."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("llamax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")
MACHINES = ("LLAMAX_COORDINATOR", "LLAMAX_BIND", "LLAMAX_PROCESS")  # they name one
DIFF_LIMIT = 64 * 1024  # characters


def environment() -> dict[str, Any]:
    """Versions, platform, devices, flags and the state of the source, as JSON data. Starts JAX if it is not started."""
    return {
        "versions": versions(),
        "platform": {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count()},
        "devices": devices(),
        "flags": {name: os.environ[name] for name in sorted(os.environ) if name in FLAGS or _ours(name)},
        "git": git_state(Path(__file__)),
    }


def _ours(name: str) -> bool:
    return name.startswith("LLAMAX_") and name not in MACHINES


@functools.cache
def versions() -> dict[str, str | None]:
    """The installed version of each package that can change a number, null where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> dict[str, Any]:
    """Backend, kinds and counts of the devices of all processes."""
    import jax

    kinds = [device.device_kind for device in jax.devices()]
    return {
        "backend": jax.default_backend(),
        "kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "count": len(kinds),
        "processes": jax.process_count(),
    }


@functools.cache
def git_state(source: Path) -> dict[str, Any] | None:
    """The commit of the repository that tracks `source`, and how tracked files differ from it (64 KiB at most).

    None when `source` is not a tracked file, such as in an installed wheel.
    """
    if _git(source, "ls-files", "--error-unmatch", source.name) is None:
        return None
    diff = _git(source, "diff", "HEAD", "--no-color", "--no-ext-diff") or ""
    cut = f"\n[cut at {DIFF_LIMIT} of {len(diff)} characters]" if len(diff) > DIFF_LIMIT else ""
    commit = (_git(source, "rev-parse", "HEAD") or "").strip() or None
    return {"commit": commit, "dirty": bool(diff), "diff": diff[:DIFF_LIMIT] + cut}


def _git(source: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(source.parent), *arguments], capture_output=True, text=True, errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
