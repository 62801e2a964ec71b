"""Other trackers' formats, written from a finished or unfinished run directory; the run directory stays the record.

Exporting again replaces what was exported before, so it can be done at any time and as often as wanted.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamax.errors import UserError
from llamax.storage.copies import at_hand
from llamax.train.run_dir import read_config, read_evals, read_metrics, read_result

Points = list[tuple[int, float, dict[str, float]]]  # (step, seconds since the start, finite values by name)


def export(run_dir: Path, kind: str) -> Path:
    """Write `run_dir` as `kind`, "tensorboard" or "wandb" (offline), and return the folder `run_dir/kind`.

    Raises:
        UserError: not a run directory, unknown kind, or its package is not installed.
    """
    if kind not in EXPORTERS:
        raise UserError(f"exporter {kind!r} is not known; use one of {', '.join(EXPORTERS)}")
    run_dir = at_hand(run_dir)
    config = read_config(run_dir).as_dict()
    out, partial = run_dir / kind, run_dir / f".{kind}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        EXPORTERS[kind](run_dir, partial, config)
    except ImportError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"exporter {kind}: {error.name} is not installed; pip install 'llamax[{kind}]'") from None
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


def points(run_dir: Path) -> Points:
    """The finite numbers of metrics.jsonl as `train/...` and of evals.jsonl as `eval/...`, in order of step."""
    found: Points = []
    for prefix, rows in (("train", read_metrics(run_dir)), ("eval", read_evals(run_dir))):
        for row in rows:
            values = {f"{prefix}/{name}": float(v) for name, v in row.items() if name != "step" and _finite(v)}
            found.append((int(row["step"]), float(values.get(f"{prefix}/seconds", 0.0)), values))
    return sorted(found, key=lambda point: point[0])


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tensorboard(run_dir: Path, out: Path, config: dict[str, Any]) -> None:
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(out), write_to_disk=True) as writer:
        writer.add_text("config", (run_dir / "config.yaml").read_text(encoding="utf-8").replace("\n", "  \n"))
        for step, seconds, values in points(run_dir):
            for name, value in values.items():
                writer.add_scalar(name, value, step, walltime=seconds)


def _wandb(run_dir: Path, out: Path, config: dict[str, Any]) -> None:
    import wandb

    settings = wandb.Settings(silent=True, disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True)
    run = wandb.init(
        mode="offline", project="llamax", name=run_dir.name, dir=str(out), config=config, settings=settings
    )
    for step, _, values in points(run_dir):
        run.log(values, step=step)
    run.summary.update(read_result(run_dir) or {})
    run.finish()


EXPORTERS: dict[str, Callable[[Path, Path, dict[str, Any]], None]] = {"tensorboard": _tensorboard, "wandb": _wandb}
