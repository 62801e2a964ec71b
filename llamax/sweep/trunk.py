"""One trunk, many horizons: a point of a sweep becomes a trunk and a branch for each horizon."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llamax.accounting import horizon
from llamax.config.run import RunConfig
from llamax.config.sweep import Horizons
from llamax.errors import UserError
from llamax.sweep.expand import exponent, number

Build = Callable[[Sequence[str]], RunConfig]
TAGS = {"flops": "budget"}  # of the ledger, for horizons in that field; else the field's own name
RULES = {
    "trunk": "a trunk warms up and holds the peak lr up to where its last branch starts",
    "branch": "a branch takes its trunk's state at T - decay x T and decays to T; its D and FLOPs are of all T steps, "
    "as if trained from scratch, its time and trained FLOPs of its own steps",
}


class Draft(NamedTuple):
    """A trunk or a branch before it is costed: name, overrides on the base, tags, rules, and a Cell's `trunk`."""

    label: str
    texts: tuple[str, ...]
    tags: dict[str, Any]
    rules: dict[str, str]
    trunk: str | None


def drafts(axis: Horizons, label: str, texts: Sequence[str], build: Build, min_steps: int | None) -> list[Draft]:
    """The trunk and the branches of the run that `texts` (all but its horizon) make of the sweep's base.

    Raises:
        UserError: a horizon too short for its warmup, its decay or `min_steps`, or two of the same number of steps.
    """
    asked = [f"train.{axis.field}={json.dumps(value)}" for value in axis.values]
    base = [build([*texts, text]) for text in asked]
    totals = [horizon(config).steps for config in base]
    schedule = base[-1].schedule
    if totals[0] < (min_steps or 1):
        raise UserError(
            f"horizons {axis.field}={axis.values[0]:g}: {totals[0]:,} steps are fewer than rules.min_steps={min_steps} "
            "at the batch of the longest horizon, which a trunk has for all; lower the batch, or raise the horizon"
        )
    warmup, why = schedule.phases(totals[0])[0], "as given"
    if schedule.warmup_steps is None:
        why = f"{schedule.warmup:g} x the {totals[0]:,} steps of the shortest horizon"
    why = f"warmup = {warmup:,} steps in the trunk and so in every branch, {why}"
    starts = [_start(axis, value, total, warmup) for value, total in zip(axis.values, totals, strict=True)]
    for (a, b), (x, y) in zip(itertools.pairwise(totals), itertools.pairwise(axis.values), strict=True):
        if a >= b:
            raise UserError(f"horizons {axis.field}={x:g} and {y:g} are both {b:,} steps; drop one or lower the batch")
    own = {"kind": "wsd", "warmup": schedule.warmup, "warmup_steps": warmup, "final": schedule.final}

    def phases(decay: float) -> str:
        return f"schedule={json.dumps(own | {'decay': decay})}"

    steps = sorted(set(starts))
    trunk_texts = (*texts, f"train.steps={starts[-1]}", phases(0.0), f"checkpoint.branch_steps={json.dumps(steps)}")
    trunk = f"{label}-trunk"
    directory = f"{trunk}-{build(trunk_texts).hash8}"
    kept = "a checkpoint at each start of a branch: steps " + ", ".join(f"{step:,}" for step in steps)
    found = [Draft(trunk, trunk_texts, {}, {"warmup": why, "trunk": kept}, None)]
    for text, value, total, start in zip(asked, axis.values, totals, starts, strict=True):
        branch = "branch=" + json.dumps({"trunk": directory, "step": start})
        rule = f"starts at {total:,} - {axis.decay:g} x {total:,} = step {start:,} of {trunk}, lr falls from there"
        tags, rules = {TAGS.get(axis.field, axis.field): value}, {"warmup": why, "branch": rule}
        found.append(
            Draft(f"{label}-{_mark(axis, value)}", (*texts, text, phases(axis.decay), branch), tags, rules, trunk)
        )
    return found


def _start(axis: Horizons, value: float, total: int, warmup: int) -> int:
    """The step at which the branch to a horizon starts."""
    decay = round(axis.decay * total)
    if decay < 1 or total - decay < max(warmup, 1):
        raise UserError(
            f"horizons {axis.field}={value:g}: {total:,} steps are too few for a warmup of {warmup:,} and a decay of "
            f"{axis.decay:g} x {total:,} = {decay:,} steps; raise the horizon, or lower decay, batch or "
            "schedule.warmup_steps"
        )
    return total - decay


def _mark(axis: Horizons, value: float) -> str:
    """The part of a name that says the horizon: t20, C1e11, D1e6, T800."""
    letter = {"tokens_per_param": "t", "flops": "C", "tokens": "D", "steps": "T"}[axis.field]
    return letter + (exponent(value) if axis.field in ("flops", "tokens") else number(value))
