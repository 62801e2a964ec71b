"""Several run directories trained as one population; shape.py says which runs can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax

from llamax.config.run import RunConfig
from llamax.errors import Interrupted, UserError
from llamax.mesh.start import start
from llamax.train.loop import run_steps
from llamax.train.mirror import stage
from llamax.train.population import Population, together
from llamax.train.precision import begun_with, with_dtype
from llamax.train.progress import Progress
from llamax.train.setup import share
from llamax.train.shape import fits_one_device, shape_key
from llamax.train.signals import stop_signals

Outcome = dict[str, Any] | BaseException


def train_packed(
    configs: Sequence[RunConfig],
    run_dirs: Sequence[Path],
    *,
    reports: Sequence[Callable[[Progress], None] | None] | None = None,
    devices: list[jax.Device] | None = None,
) -> list[Outcome]:
    """`train` of several runs of one shape in one program; for each, in order, its result or what ended it.

    Every run directory is what `train` would have written, but for what clocks say: its numbers agree to float
    tolerance, it resumes alone or with others, from its own newest checkpoint whatever step the others are at. A
    member that diverges, loses its lease or cannot write ends; the others go on. `devices` share the members (None:
    all); one member never spans two.

    Raises:
        UserError: the runs do not share a shape, or their data does not fit.
        Interrupted: a signal asked to stop; every member was saved, and the same call resumes.
        ProgramFailed: the program they share failed; each can be trained alone.
    """
    start()
    if len({shape_key(config) for config in configs}) != 1:
        raise UserError("these runs do not share a shape, so they cannot train as one population; train them alone")
    if not fits_one_device(configs[0]) or jax.process_count() > 1:
        raise UserError("a member of a population is whole on one device of one process; train these runs alone")
    devices = (jax.devices() if devices is None else devices)[: len(configs)]
    run_dirs = [stage(path, config.branch) for path, config in zip(run_dirs, configs, strict=True)]
    chosen = [begun_with(config, path, devices) for config, path in zip(configs, run_dirs, strict=True)]
    if len({each.dtype for each in chosen}) > 1:
        raise UserError("these runs began with different types of operands (env.json, precision); train them alone")
    common = share(configs[0], devices[:1])
    config = with_dtype(configs[0], chosen[0].dtype)
    population = Population(config, common.rules, common.mesh, common.abstract, devices)
    with stop_signals() as stop:
        runs = [
            run_steps(config, path, common, its, report=report, signals=lambda: nullcontext(stop))
            for config, path, its, report in zip(
                configs, run_dirs, chosen, reports or [None] * len(configs), strict=True
            )
        ]
        ended = together(runs, population)
    for outcome in ended:
        if isinstance(outcome, Interrupted):
            raise outcome
    return ended
