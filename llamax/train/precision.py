"""What `train.compute_dtype: auto` becomes: the operand type of matrix products that pays on the devices of a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from llamax.accounting.peaks import peak_flops_per_second
from llamax.config.run import RunConfig
from llamax.train.run_dir import read_env

# Of /proc/cpuinfo: processors whose own instructions multiply bfloat16 and sum in float32. Others would emulate them.
CPU_FLAGS = ("amx_bf16", "avx512_bf16")


class Precision(NamedTuple):
    """The operand type of a run's products, and the rule that chose it."""

    dtype: str
    why: str


def precision(asked: str, devices: Iterable[Any]) -> Precision:
    """`asked`, or for auto: bfloat16 where all devices (anything with `platform` and `device_kind`) multiply it faster
    than float32, else float32."""
    if asked != "auto":
        return Precision(asked, "as the config says")
    kinds = sorted({(device.platform, device.device_kind) for device in devices})
    slow = [why for platform, kind in kinds if (why := _against(platform, kind))]
    return Precision("float32", slow[0]) if slow else Precision("bfloat16", _for(*kinds[0]))


def _against(platform: str, kind: str) -> str | None:
    if platform == "cpu":
        return None if cpu_flag() else f"this CPU has none of {', '.join(CPU_FLAGS)}"
    known = peak_flops_per_second(kind, "float32") is not None
    return f"{kind} has no bfloat16 products" if known and peak_flops_per_second(kind) is None else None


def _for(platform: str, kind: str) -> str:
    return f"this CPU has {cpu_flag()}" if platform == "cpu" else f"{kind} multiplies it with sums in float32"


def cpu_flag(path: Path = Path("/proc/cpuinfo")) -> str | None:
    """The first of CPU_FLAGS that this machine's processor has; None where it has none, or does not say."""
    try:
        words = set(path.read_text().split())
    except OSError:
        return None
    return next((flag for flag in CPU_FLAGS if flag in words), None)


def begun_with(config: RunConfig, run_dir: Path, devices: Iterable[Any]) -> Precision:
    """`precision` of a run: one that was begun, or whose trunk was, keeps the type it began with, on whatever machine
    it goes on."""
    env = read_env(run_dir)
    if env is None and config.branch is not None:
        env = read_env(Path(run_dir).parent / config.branch.trunk)
    before: dict[str, Any] = (env or {}).get("precision", {})
    if config.train.compute_dtype == "auto" and "dtype" in before:
        return Precision(before["dtype"], "the run began with it")
    return precision(config.train.compute_dtype, devices)


def with_dtype(config: RunConfig, dtype: str) -> RunConfig:
    """`config` with its operand type told."""
    return config.model_copy(update={"train": config.train.model_copy(update={"compute_dtype": dtype})})
