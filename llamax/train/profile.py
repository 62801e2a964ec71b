"""A few dispatches of a run with JAX's profiler on: the loop's own step on the loop's own batches, nothing saved.

What is recorded here is read in llamax/report/profile.py.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llamax.accounting.horizon import horizon
from llamax.accounting.params import count_params
from llamax.accounting.peaks import mfu
from llamax.config.run import RunConfig
from llamax.errors import UserError
from llamax.mesh.cpu import cores
from llamax.mesh.rules import batch_sharding
from llamax.train.checkpoints import load_state
from llamax.train.loop import SECONDS_PER_DISPATCH
from llamax.train.precision import begun_with, precision, with_dtype
from llamax.train.setup import Common, batches_of, load_dispatch, share
from llamax.train.state import TrainState, hyper_of, seed_of
from llamax.train.step import make_dispatch

DISPATCHES = 3  # traced by default
SECONDS_TIMED, MANY = 1.0, 20  # before the trace and again after it: about so long, at most so many dispatches

Report = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


@dataclasses.dataclass(frozen=True)
class Recording:
    """What was measured: the optimized program's text, and figures that are JSON data."""

    program: str
    figures: dict[str, Any]


@dataclasses.dataclass
class Timing:
    """Seconds of a number of dispatches, run one ahead of their metrics as the loop does."""

    steps: list[int] = dataclasses.field(default_factory=list)  # of each dispatch
    seconds: list[float] = dataclasses.field(default_factory=list)  # from the metrics before to its own metrics
    load: float = 0.0  # on the host: batches from the store to the device
    call: float = 0.0  # until the call of the program returns
    wait: float = 0.0  # for metrics to arrive
    cpu: float = 0.0  # processor seconds of this process, all threads

    @property
    def step_seconds(self) -> list[float]:
        """Seconds a step, one figure a dispatch."""
        return [seconds / steps for seconds, steps in zip(self.seconds, self.steps, strict=True)]


def record(config: RunConfig, run: Path | None, steps: int | None, trace: Path, report: Report) -> Recording:
    """Compile the step of `config`, time it, and trace `steps` of it into the folder `trace`.

    It goes on from the newest checkpoint of the run directory `run`, which is only read; without a run, or a
    checkpoint in it, from fresh weights.

    Raises:
        UserError: steps < 1, a config that does not fit the data or this machine, a damaged checkpoint, or training
            that has diverged.
    """
    if steps is not None and steps < 1:
        raise UserError(f"--steps={steps}: nothing to trace; give at least 1, or leave it out")
    # A program from the compilation cache would keep the source lines of whoever compiled it first.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    session = _Session(config, run, report)
    count, seconds = session.warm_up()
    steps = steps or DISPATCHES * count
    plan = [min(count, steps - first) for first in range(0, steps, count)]
    plain = [count] * max(DISPATCHES, min(MANY, round(SECONDS_TIMED / seconds)))
    before = session.run("time", plain)
    with jax.profiler.trace(str(trace), profiler_options=_options()):
        traced = session.run("trace", plan)
    after = session.run("time again", plain)
    return Recording(session.program, session.figures(before, traced, after, count))


def _options() -> jax.profiler.ProfileOptions:
    """No events of Python functions: there are thousands, each costs time, and no line of the summary uses them."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options


class _Session:
    """A compiled step with the state it has reached."""

    def __init__(self, config: RunConfig, run: Path | None, report: Report):
        devices, asked = jax.devices(), config.train.compute_dtype
        dtype = (precision(asked, devices) if run is None else begun_with(config, run, devices)).dtype
        self.hash, self.report = config.hash8, report
        self.config = config = with_dtype(config, dtype)
        self.capacity = config.train.steps_per_dispatch
        self.setup = share(config)
        self.batches = batches_of(config, self.setup)
        self.place = batch_sharding(self.setup.rules, self.setup.mesh, leading=1)
        report("restore", 0, 1)
        self.state, self.first, self.weights = _start(config, run, self.setup)
        self.step = self.first
        report("restore", 1, 1)
        report("compile", 0, 1)
        began = time.perf_counter()
        lowered = make_dispatch(config, self.setup.rules, self.setup.mesh, self.setup.abstract).lower(  # type: ignore[attr-defined]
            self.state, self._load(1), jnp.int32(0)
        )
        self.lower_seconds = time.perf_counter() - began
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - began - self.lower_seconds
        self.program: str = self.compiled.as_text()
        report("compile", 1, 1)

    def _load(self, count: int) -> dict[str, jax.Array]:
        return load_dispatch(self.batches, self.step, self.step + count, self.capacity, self.place)

    def warm_up(self) -> tuple[int, float]:
        """(how many steps the loop would put in a dispatch, seconds such a dispatch takes at most)."""
        self.run("warm up", [1])
        timed = self.run("warm up", [1]).seconds[0]
        count = min(self.capacity, max(1, int(SECONDS_PER_DISPATCH / timed)))
        return count, max(self.run("warm up", [count] * DISPATCHES).seconds)

    def run(self, label: str, plan: list[int]) -> Timing:
        """Dispatch after dispatch of `plan` steps each; the batches of the next are loaded while one runs."""
        timing, pending, done = Timing(), None, 0
        cpu, then = time.process_time(), time.perf_counter()
        self.report(label, 0, sum(plan))
        batches = self._load(plan[0])
        for i, count in enumerate(plan):
            marks = [time.perf_counter()]
            self.state, metrics, ran = self.compiled(self.state, batches, jnp.int32(count))
            marks.append(time.perf_counter())
            self.step += count
            batches = self._load(plan[i + 1]) if i + 1 < len(plan) else batches
            marks.append(time.perf_counter())
            for last in [pending] if i + 1 < len(plan) else [pending, (count, metrics, ran)]:
                if last is not None:
                    self._fetch(*last)
                    now, done = time.perf_counter(), done + last[0]
                    timing.steps.append(last[0])
                    timing.seconds.append(now - then)
                    then = now
                    self.report(label, done, sum(plan))
            pending = (count, metrics, ran)
            marks.append(time.perf_counter())
            timing.call += marks[1] - marks[0]
            timing.load += marks[2] - marks[1]
            timing.wait += marks[3] - marks[2]
        timing.cpu = time.process_time() - cpu
        return timing

    def _fetch(self, count: int, metrics: dict[str, jax.Array], ran: jax.Array) -> None:
        """Bring the metrics of a dispatch to the host. Raises UserError if it stopped before its `count` steps."""
        metrics, done = jax.device_get((metrics, ran))
        if int(done) < count:
            raise UserError(
                f"training has diverged (loss {float(metrics['loss'][max(int(done) - 1, 0)]):.4g} after step "
                f"{self.first}), and train.on_divergence=stop ends a dispatch early; profile with "
                "train.on_divergence=skip or another checkpoint"
            )

    def figures(self, before: Timing, traced: Timing, after: Timing, count: int) -> dict[str, Any]:
        """Everything measured, as JSON data; seconds and bytes throughout."""
        config, mesh = self.config, self.setup.mesh
        step = statistics.median(before.step_seconds + after.step_seconds)
        length, tokens = horizon(config), config.train.batch_size * config.train.seq_len
        device, compute = mesh.devices.flat[0], config.train.compute_dtype
        flops = {name: total / length.tokens * tokens for name, total in length.flops.items()}
        used = mfu(flops["causal"] / step, device.device_kind, mesh.size, compute)
        many = sum(before.steps) + sum(after.steps)
        return {
            "hash": self.hash,
            "weights": self.weights,
            "first_step": self.first,
            "device": {"platform": device.platform, "kind": device.device_kind, "count": mesh.size},
            "jax": jax.__version__,
            "model": {
                "parameters": count_params(config.model).total,
                "layers": len(config.model.layers),
                "batch_size": config.train.batch_size,
                "seq_len": config.train.seq_len,
                "compute_dtype": compute,
            },
            "steps_per_dispatch": count,
            "traced_steps": sum(traced.steps),
            "traced_dispatches": len(traced.steps),
            "step_seconds": step,
            "step_seconds_by_dispatch": {"before": before.step_seconds, "after": after.step_seconds},
            "step_seconds_traced": statistics.median(traced.step_seconds),
            "tokens_per_second": tokens / step,
            "flops_per_step": flops,
            "flops_per_second": flops["causal"] / step,
            "mfu": None if used is None else dataclasses.asdict(used),
            "host_seconds_per_step": {
                name: (getattr(before, name) + getattr(after, name)) / many for name in ("load", "call", "wait")
            },
            "processor_seconds_per_step": (before.cpu + after.cpu) / many,
            "cores": len(cores()),
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "compile_seconds": {"lower": self.lower_seconds, "compile": self.compile_seconds},
            "memory_bytes": self._memory(),
        }

    def _memory(self) -> dict[str, int | None]:
        """Bytes of one device the program asks for, what the device's allocator saw, and this process's peak."""
        plan = self.compiled.memory_analysis()
        parts = {name: int(getattr(plan, f"{name}_size_in_bytes")) for name in ("argument", "output", "alias", "temp")}
        code = int(plan.generated_code_size_in_bytes)
        seen = self.setup.mesh.devices.flat[0].memory_stats() or {}
        unit = 1 if sys.platform == "darwin" else 1024
        return {
            **parts,
            "code": code,
            "program": parts["argument"] + parts["output"] - parts["alias"] + parts["temp"] + code,
            "device_peak": seen.get("peak_bytes_in_use"),
            "process_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        }


def _start(config: RunConfig, run: Path | None, setup: Common) -> tuple[TrainState, int, str]:
    """(state, steps it has taken, in words where it is from)."""
    found = None if run is None else load_state(run, setup.abstract)
    if found is not None:
        step, state, _ = found
        return state, step, f"checkpoint of step {step}"
    words = "fresh" if run is None else "fresh, the run has no checkpoint yet"
    return setup.initialize(hyper_of(config, horizon(config).steps), seed_of(config)), 0, words
