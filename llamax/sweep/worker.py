"""A worker: claim a cell, train it, write down how it ended, until nothing is left.

`work` runs in this process; `python -m llamax.sweep.worker STUDY` is the process that `run_local` starts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamax.config.run import RunConfig
from llamax.errors import Interrupted, UserError
from llamax.sweep.claim import LEASE_SECONDS, Lease, LeaseLost, claim
from llamax.sweep.plan import Cell
from llamax.sweep.process import die_with, me, pin
from llamax.sweep.study import clear_failures, failure_path, is_finished, read_study, record_failure, select
from llamax.train.progress import Progress

POLL_SECONDS = 0.5
EVENTS = ("start", "progress", "done", "failed", "lost", "waiting")
Train = Callable[..., Any]
OnEvent = Callable[[str, str, dict[str, Any]], None]
ShouldStop = Callable[[], bool]


class Stopped(KeyboardInterrupt):
    """The worker was asked to stop (SIGTERM, parent gone) while a cell was training; the cell resumes later."""


def work(
    study: Path,
    *,
    train: Train | None = None,
    on_event: OnEvent | None = None,
    retry_failed: bool = False,
    only: Iterable[str] | None = None,
    lease_seconds: float = LEASE_SECONDS,
    should_stop: ShouldStop = lambda: False,
) -> dict[str, list[str]]:
    """Trains cells of a study until every one is finished or failed, here or by other workers.

    Longest first, or in the order of `only`. A cell held elsewhere is waited for, because its worker may die.

    Args:
        train: `train(config, run_dir, report=...)`, which leaves a result.json (None: llamax.train.loop.train).
        on_event: called as on_event(kind, cell, details), kind one of `EVENTS`.
        retry_failed: forget recorded failures at the start.
        lease_seconds: a lease without a heartbeat for so long is taken over; beats come six times as often.
        should_stop: polled between cells and at every report.

    Returns:
        `{"done": [...], "failed": [...]}`, the cells this call brought to an end.

    Raises:
        UserError: `study` is no study, or a name of `only` no cell.
        KeyboardInterrupt: interrupted; the lease is released and the same call continues.
    """
    study, emit = Path(study), on_event or _silent
    names = None if only is None else list(only)
    ended: dict[str, list[str]] = {"done": [], "failed": []}
    if retry_failed:
        clear_failures(study, select(read_study(study), names))
    run = train or default_train()
    waiting = False
    while True:
        todo = [c for c in select(read_study(study), names) if not _settled(study, c)]
        if not todo:
            return ended
        if should_stop():
            raise Stopped
        lease, cell = _claim_next(study, todo, lease_seconds)
        if lease is None or cell is None:
            if not waiting:
                emit("waiting", todo[0].name, {"cells": len(todo)})
            waiting = True
            time.sleep(POLL_SECONDS)
            continue
        waiting = False
        with lease:
            outcome = _train_cell(study, cell, lease, run, emit, should_stop)
        if outcome in ended:
            ended[outcome].append(cell.name)


def default_train() -> Train:
    """llamax's own training loop; importing it starts JAX."""
    from llamax.train.loop import train

    return train


def progress_path(study: Path, cell: str) -> Path:
    """Where a cell's newest report is."""
    return study / "progress" / f"{cell}.json"


def _settled(study: Path, cell: Cell) -> bool:
    return is_finished(study, cell) or failure_path(study, cell.name).exists()


def _claim_next(study: Path, todo: Sequence[Cell], lease_seconds: float) -> tuple[Lease | None, Cell | None]:
    for cell in todo:
        lease = claim(study, cell.name, lease_seconds=lease_seconds)
        if lease is None:
            continue
        if _settled(study, cell):  # it ended between the look and the claim
            lease.release()
            continue
        return lease, cell
    return None, None


def _train_cell(study: Path, cell: Cell, lease: Lease, train: Train, emit: OnEvent, should_stop: ShouldStop) -> str:
    """Trains one claimed cell; "done", "failed" or "lost". Interruptions pass through."""
    emit("start", cell.name, {"steps": cell.steps})
    save = _Saver(study, cell.name)

    def report(progress: Progress) -> None:
        lease.check()
        if should_stop():
            raise Stopped
        save(progress)
        emit("progress", cell.name, asdict(progress))

    try:
        result = _trained(train, cell.config, study / cell.run_name, report)
    except LeaseLost:
        emit("lost", cell.name, {})
        return "lost"
    except Interrupted as stop:  # the training loop caught the signal itself, and has saved
        raise Stopped(str(stop)) from None
    except Exception as error:
        if lease.lost.is_set() or lease.successor.exists():
            emit("lost", cell.name, {})
            return "lost"
        record_failure(study, cell.name, error)
        emit("failed", cell.name, {"error": str(error) or type(error).__name__})
        return "failed"
    emit("done", cell.name, result)
    return "done"


def _trained(train: Train, config: RunConfig, run_dir: Path, report: Callable[[Progress], None]) -> dict[str, Any]:
    result = train(config, run_dir, report=report)
    if not (run_dir / "result.json").exists():
        raise RuntimeError(f"{run_dir.name}: training returned without writing result.json")
    return result if isinstance(result, dict) else {}


class _Saver:
    """Writes a cell's newest report, at most twice a second and at every change of phase."""

    def __init__(self, study: Path, cell: str) -> None:
        self.path, self.due, self.phase = progress_path(study, cell), 0.0, ""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.time()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now < self.due and progress.phase == self.phase:
            return
        self.due, self.phase = now + 0.5, progress.phase
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(progress).items()}
        text = json.dumps({**finite, "pid": me()["pid"], "started": self.started, "time": time.time()})
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")  # no fsync: losing a report in a power cut is no loss
        os.replace(temporary, self.path)


def _silent(kind: str, cell: str, details: dict[str, Any]) -> None:
    pass


# ---------------------------------------------------------------- the process
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m llamax.sweep.worker STUDY`: exit code 0 all settled, 143 asked to stop, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m llamax.sweep.worker", description="Train the cells of a study.")
    parser.add_argument("study", type=Path)
    parser.add_argument("--cores", help="comma-separated cores to run on")
    parser.add_argument("--parent", type=int, help="end when this process does")
    parser.add_argument("--train", help="module:function to train with")
    parser.add_argument("--only", help="comma-separated cells, in order")
    parser.add_argument("--retry-failed", action="store_true")
    args = parser.parse_args(argv)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    if args.parent is not None:
        die_with(args.parent, lambda: os.kill(os.getpid(), signal.SIGTERM))
    if args.cores:
        pin([int(core) for core in args.cores.split(",")])
    only = args.only.split(",") if args.only else None
    try:
        train = _named(args.train)
        work(args.study, train=train, only=only, retry_failed=args.retry_failed, should_stop=lambda: bool(stopping))
    except KeyboardInterrupt:
        return 143
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _named(train: str | None) -> Train | None:
    if train is None:
        return None
    module, _, function = train.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    sys.exit(main())
