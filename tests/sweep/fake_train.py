"""A stand-in for the training loop: steps that take a moment, resumable, and mishaps by seed.

Environment: FAKE_STEP_SECONDS a step (default 0.01); FAKE_FAIL and FAKE_CRASH, comma-separated seeds whose run raises,
or kills its own process, at step 3. `starts.log` gets a line a start: pid, step resumed from, cores.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from llamax.config.run import RunConfig
from llamax.errors import UserError
from llamax.train.progress import Progress


def train(config: RunConfig, run_dir: Path, *, report: Callable[[Progress], None] | None = None) -> dict:
    run_dir.mkdir(parents=True, exist_ok=True)
    saved = run_dir / "step"
    first = int(saved.read_text()) if saved.exists() else 0
    with (run_dir / "starts.log").open("a") as file:
        print(
            os.getpid(), first, sorted(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS"), sep="\t", file=file
        )
    steps, seed = config.train.steps or 0, str(config.train.seed)
    for step in range(first, steps):
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0.01")))
        if step == 3 and seed in os.environ.get("FAKE_FAIL", "").split(","):
            raise UserError(f"seed {seed} is not to be trained\nsecond line")
        if step == 3 and seed in os.environ.get("FAKE_CRASH", "").split(","):
            os.kill(os.getpid(), signal.SIGKILL)
        saved.write_text(str(step + 1))
        if report is not None:
            report(Progress(step + 1, steps, 8 * (step + 1), 5.0 - 0.1 * step, 1e4, 0.01 * (steps - step), "training"))
    result = {
        "status": "done",
        "steps": steps,
        "tokens": 8 * steps,
        "eval_loss": 1.5,
        "seconds": 0.5,
        "tokens_per_second": 1e4,
    }
    (run_dir / "result.json").write_text(json.dumps(result))
    return result


def starts(study: Path) -> dict[str, list[list[str]]]:
    """The lines of every run's starts.log, by run directory name."""
    return {
        log.parent.name: [line.split("\t") for line in log.read_text().splitlines()]
        for log in study.glob("*/starts.log")
    }
