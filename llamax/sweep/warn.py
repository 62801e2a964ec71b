"""What looks wrong in a plan, in words, before anything is spent."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llamax.config.mesh import load_rules
from llamax.config.sweep import SweepConfig

if TYPE_CHECKING:
    from llamax.sweep.plan import Cell

MIN_STEPS, MIN_SIZES, MAX_EPOCHS = 100, 5, 4.0


def warnings_of(spec: SweepConfig, cells: Sequence[Cell], devices: int | None) -> tuple[str, ...]:
    """Every warning of a plan, worst first."""
    return (
        *_identical(cells),
        *_mesh(cells, devices),
        *(_bracket(cells, spec.optimum_tokens_per_param) if spec.ablate is None else _unmatched(cells)),
        *_steps(cells),
        *_epochs(cells),
    )


def _identical(cells: Sequence[Cell]) -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        groups[cell.hash].append(cell.name)
    return [
        f"identical cells: {', '.join(names)} are one config and would train one run {len(names)} times; vary a field"
        for names in groups.values()
        if len(names) > 1
    ]


def _unmatched(cells: Sequence[Cell]) -> list[str]:
    """Variants of an ablation that matching could not bring within the tolerance."""
    far = dict.fromkeys((c.tags["rung"], c.tags["variant"], c.rules["match"]) for c in cells if not c.tags["matched"])
    return [f"{rung} {variant} could not be matched: {said}" for rung, variant, said in far]


def _mesh(cells: Sequence[Cell], devices: int | None) -> list[str]:
    result = []
    for cell in cells:
        mesh, micro = cell.config.mesh, cell.batch // cell.config.train.grad_accumulation
        sizes, axes = mesh.over(devices or 1), load_rules(mesh.rules)["batch"]
        ways = math.prod(sizes[axis] for axis in axes)
        if micro % ways:
            result.append(
                f"{cell.name}: a microbatch of {micro} sequences does not divide over {' x '.join(axes)} = {ways} "
                f"devices; use a multiple of {ways}"
            )
    return result


def _bracket(cells: Sequence[Cell], optimum: float) -> list[str]:
    """Budgets whose sizes leave the expected optimum outside, or are too few for a parabola."""
    budgets: dict[float, list[Cell]] = defaultdict(list)
    for cell in cells:
        if "budget" in cell.tags:
            budgets[cell.tags["budget"]].append(cell)
    result = []
    for budget, members in sorted(budgets.items()):
        ratios = sorted(cell.tokens_per_param for cell in members)
        sizes = len({cell.n for cell in members})
        if ratios[0] > optimum or ratios[-1] < optimum:
            side, change = ("small", "add larger sizes") if ratios[0] > optimum else ("large", "add smaller sizes")
            result.append(
                f"C = {budget:g}: the optimum is likely off the grid: {ratios[0]:.3g} to {ratios[-1]:.3g} tokens/param "
                f"do not bracket the expected {optimum:g}, so every size is too {side}; {change}"
            )
        if sizes < MIN_SIZES:
            result.append(f"C = {budget:g}: {sizes} sizes; a parabola with a checked vertex needs {MIN_SIZES} or more")
    return result


def _steps(cells: Sequence[Cell]) -> list[str]:
    few = [cell for cell in cells if cell.steps < MIN_STEPS]
    shown = _listed(few, lambda cell: f"{cell.steps}")
    text = f"fewer than {MIN_STEPS} steps, too short to compare: {shown}; lower the batch or drop the size"
    return [text] if few else []


def _epochs(cells: Sequence[Cell]) -> list[str]:
    many = [cell for cell in cells if cell.epochs is not None and cell.epochs > MAX_EPOCHS]
    some = [cell for cell in cells if cell.epochs is not None and 1 < cell.epochs <= MAX_EPOCHS]
    result = []
    if many:
        shown = _listed(many, lambda cell: f"{cell.epochs:.1f}")
        result.append(
            f"more than {MAX_EPOCHS:g} epochs, where repeated tokens stop counting as new (arXiv:2305.16264): {shown}; "
            "use a larger corpus"
        )
    if some:
        shown = _listed(some, lambda cell: f"{cell.epochs:.1f}")
        result.append(f"more tokens than the corpus has, so some repeat (epochs): {shown}")
    return result


def _listed(cells: Sequence[Cell], value: Callable[[Cell], str], most: int = 6) -> str:
    rest = f" and {len(cells) - most} more" if len(cells) > most else ""
    return ", ".join(f"{cell.name} ({value(cell)})" for cell in cells[:most]) + rest
