"""A worker: claim a cell, train it, write down how it ended, until nothing is left.

`work` runs in this process; `python -m llamax.sweep.worker STUDY` is the process that launchers start, alone or as one
of several (crew.py).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from llamax.errors import UserError
from llamax.mesh.cpu import cores, simulate_devices
from llamax.mesh.job import ALONE, Job, start_processes
from llamax.mesh.processes import find_processes
from llamax.storage.bucket import StorageError
from llamax.storage.copies import at_hand, refresh
from llamax.storage.places import address_of
from llamax.sweep.attempt import OnEvent, ShouldStop, Stopped, Train, train_cells
from llamax.sweep.claim import LEASE_SECONDS, Lease, claim
from llamax.sweep.crew import AGAIN, ASKED, Crew
from llamax.sweep.packing import NEVER, Pack, groups, parse_pack
from llamax.sweep.plan import Cell, Plan
from llamax.sweep.process import die_with, pin
from llamax.sweep.study import can_begin, clear_failures, is_settled, orphaned, read_study, record_failure, select
from llamax.train.env import versions

POLL_SECONDS, BUCKET_POLL_SECONDS = 0.5, 5.0
EVENTS = ("start", "progress", "done", "failed", "lost", "waiting")
Groups = dict[str, tuple[frozenset[str], int]]  # of a cell: the names in its group, and how many train together


def work(
    study: Path,
    *,
    train: Train | None = None,
    on_event: OnEvent | None = None,
    retry_failed: bool = False,
    only: Iterable[str] | None = None,
    lease_seconds: float = LEASE_SECONDS,
    should_stop: ShouldStop = lambda: False,
    pack: Pack = NEVER,
    workers: int = 1,
    job: Job = ALONE,
) -> dict[str, list[str]]:
    """Trains cells of a study until every one is finished or failed, here or by other workers.

    Longest first, or in the order of `only`. A cell held elsewhere is waited for, because its worker may die. A branch
    is claimed once its trunk's checkpoint is there, and fails with a trunk that ended without it.

    Args:
        train: `train(config, run_dir, report=...)`, which leaves a result.json (None: llamax.train.loop.train).
        on_event: called as on_event(kind, cell, details), kind one of `EVENTS`.
        retry_failed: forget recorded failures at the start.
        lease_seconds: a lease without a heartbeat for so long is taken over; beats come six times as often.
        should_stop: polled between cells and at every report.
        pack: which cells train together, then always in llamax's own loop (see packing.py).
        workers: how many share the study, for the size of a population.
        job: the processes of this worker, of which this is the leader: it tells the others each cell.

    Returns:
        `{"done": [...], "failed": [...]}`, the cells this call brought to an end.

    Raises:
        UserError: `study` is no study, or a name of `only` no cell.
        KeyboardInterrupt: interrupted; the lease is released and the same call continues.
        SystemExit: one of several processes, and the cell failed or was lost: all are to be started again.
    """
    study, emit = at_hand(study), on_event or _silent
    poll = POLL_SECONDS if address_of(study) is None else BUCKET_POLL_SECONDS
    names = None if only is None else list(only)
    ended: dict[str, list[str]] = {"done": [], "failed": []}
    if retry_failed:
        clear_failures(study, select(read_study(study), names))
    run = train or default_train()
    group = _grouped(study, pack, workers)
    waiting = False
    while True:
        refresh(study, float("inf"))
        plan = read_study(study)
        todo = [c for c in select(plan, names) if not is_settled(study, c)]
        if not todo:
            return ended
        if should_stop():
            raise Stopped
        try:
            held = _claim_next(study, [c for c in todo if can_begin(study, c.config)], lease_seconds, group)
        except StorageError:  # the next look waits until the bucket is back, and says so
            continue
        if not held and (lost := _give_up(study, plan, todo, emit)):
            ended["failed"] += lost
            continue
        if not held:
            if not waiting:
                emit("waiting", todo[0].name, {"cells": len(todo)})
            waiting = True
            time.sleep(poll)
            continue
        waiting = False
        with ExitStack() as leases:
            for lease, cell in held:
                leases.enter_context(lease)
                job.agree(cell.name)
            try:
                outcomes = train_cells(study, held, run, emit, should_stop)
            except StorageError as error:
                print(f"waiting: {error}", file=sys.stderr, flush=True)
                outcomes = ["away"] * len(held)
        for (_, cell), outcome in zip(held, outcomes, strict=True):
            if outcome in ended:
                ended[outcome].append(cell.name)
        if job.count > 1 and outcomes != ["done"]:
            sys.exit(AGAIN)


def default_train(one_cpu: bool = False) -> Train:
    """llamax's own training loop; importing it starts JAX. `one_cpu`: of simulated CPU devices, on the first."""
    from llamax.train.loop import train

    if not one_cpu:
        return train
    import jax

    return partial(train, devices=jax.devices()[:1]) if jax.default_backend() == "cpu" else train


def _give_up(study: Path, plan: Plan, todo: Sequence[Cell], emit: OnEvent) -> list[str]:
    """The branches whose trunk came to its end without their checkpoint, recorded as failed."""
    lost = [(cell.name, why) for cell in todo if (why := orphaned(study, plan, cell)) is not None]
    for name, why in lost:
        record_failure(study, name, UserError(why))
        emit("failed", name, {"error": why})
    return [name for name, _ in lost]


def _claim_next(study: Path, todo: Sequence[Cell], lease_seconds: float, group: Groups) -> list[tuple[Lease, Cell]]:
    """The first free cell, and free ones of its population up to its size; empty if none is free."""
    for cell in todo:
        names, size = group.get(cell.name, ((cell.name,), 1))
        mates = [cell, *(other for other in todo if other.name in names and other is not cell)]
        held: list[tuple[Lease, Cell]] = []
        for mate in mates:
            lease = claim(study, mate.name, lease_seconds=lease_seconds) if len(held) < size else None
            if lease is not None:
                refresh(study, float("inf"))
            if lease is not None and is_settled(study, mate):  # it ended between the look and the claim
                lease.release()
            elif lease is not None:
                held.append((lease, mate))
            elif not held:
                break
        if held:
            return held
    return []


def _grouped(study: Path, pack: Pack, workers: int) -> Groups:
    """The population each cell belongs to: the names in it, and how many train together."""
    if pack.kind == "never":
        return {}
    import jax

    devices = jax.local_devices() if jax.default_backend() != "cpu" else []
    memory = [stats["bytes_limit"] for device in devices if (stats := device.memory_stats())]
    found = groups(read_study(study).cells, pack, workers=workers, cores=len(cores()), accelerators=memory)
    return {name: (frozenset(group.cells), group.size) for group in found for name in group.cells}


def _silent(kind: str, cell: str, details: dict[str, Any]) -> None:
    pass


# ---------------------------------------------------------------- the process
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m llamax.sweep.worker STUDY`.

    Exit code 0: all settled; 143: asked to stop, saved; 3: to be started again; 75: another process of this worker
    died; 2: bad input.
    """
    gc.set_threshold(100_000)  # as the command line does
    parser = argparse.ArgumentParser(prog="python -m llamax.sweep.worker", description="Train the cells of a study.")
    parser.add_argument("study", type=Path)
    parser.add_argument("--cores", help="comma-separated cores to run on")
    parser.add_argument("--parent", type=int, help="end when this process does")
    parser.add_argument("--train", help="module:function to train with")
    parser.add_argument("--only", help="comma-separated cells, in order")
    parser.add_argument("--retry-failed", action="store_true")
    parser.add_argument("--pack", default="never", help="auto, never, or the most members of a population")
    parser.add_argument("--workers", type=int, default=1, help="how many share the study")
    args = parser.parse_args(argv)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    if args.parent is not None:
        die_with(args.parent, lambda: os.kill(os.getpid(), signal.SIGTERM))
    if args.cores:
        pin([int(core) for core in args.cores.split(",")])
    try:
        plan = find_processes()
        facts = {} if plan is None else {"the study": str(args.study), **versions()}
        with start_processes(plan, facts) as job:
            return _run(args, Crew(job, stopping))
    except KeyboardInterrupt:
        return ASKED
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, crew: Crew) -> int:
    """This process's part until nothing is left, or until it is asked to stop: the exit code."""
    several = crew.job.count > 1
    pack = NEVER if args.train or several else parse_pack(args.pack)
    train = _named(args.train) if args.train else default_train(_simulate_devices(args.study, pack, args.workers))
    if not crew.job.leader:
        return crew.follow(args.study, train)
    try:
        work(
            args.study,
            train=crew.trains(train),
            only=args.only.split(",") if args.only else None,
            retry_failed=args.retry_failed,
            should_stop=crew.should_stop,
            pack=pack,
            workers=args.workers,
            job=crew.job,
        )
    except Stopped:
        return crew.job.agree(ASKED)
    return crew.job.agree(0)


def _simulate_devices(study: Path, pack: Pack, workers: int) -> bool:
    """Before JAX starts: a CPU device a core, where populations are to be trained and the user has not said otherwise.

    A small member leaves most of a second core idle; one device a core gives each its own members.
    """
    available = len(cores())
    found = [] if available == 1 else groups(read_study(study).cells, pack, workers=workers, cores=available)
    return any(group.size > 1 for group in found) and simulate_devices(available)


def _named(train: str) -> Train:
    module, _, function = train.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    sys.exit(main())
