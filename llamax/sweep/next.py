"""The next budget of a study, centred on what it has measured so far.

finished runs -> where the best size of the next budget lies, by the best evidence there is -> sizes around it
              -> the expected error at the target with and without them
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llamax.config.sweep import Axis, Isoflop, Seeds, SweepConfig
from llamax.errors import UserError
from llamax.sweep.design import Ladder
from llamax.sweep.expand import exponent
from llamax.sweep.plan import Cell, Plan, make_plan
from llamax.sweep.rules import whole_steps

if TYPE_CHECKING:
    import pandas as pd

    from llamax.scaling.approach2 import Approach2Fit
    from llamax.scaling.design import Errors, Runs
    from llamax.scaling.laws import Law

RATIO = 4.0  # from the largest budget to the next where the study has only one
BEYOND = 4.0  # how far past its grid a valley without a measured bottom is believed
WIDEST = 16.0  # reach of the sizes to either side
LEVEL = 0.95
DRAWS = 400  # bootstrap draws of the interval


@dataclass(frozen=True)
class Centre:
    """The best size at the next budget: `n`, its interval, the sentence behind it, the law believed, noise of a run."""

    n: float
    interval: tuple[float, float] | None
    rule: str
    law: Law | None
    noise: float | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Next:
    """A proposed budget: `flops`, sizes by name with N and planned tokens, seeds, and what they do for the target.

    `before` and `after`: errors at `target` FLOPs of each approach without and with these runs; None where no law can
    be fitted yet.
    """

    flops: float
    centre: Centre
    sizes: tuple[str, ...]
    n: tuple[int, ...]
    tokens: tuple[int, ...]
    replicates: int
    width: float
    target: float
    before: Mapping[int, Errors] | None
    after: Mapping[int, Errors] | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as --json prints them."""
        own: dict[str, Any] = {"flops": self.flops, "n_opt": self.centre.n, "n_interval": self.centre.interval}
        own |= {"sizes": list(self.sizes), "n": list(self.n), "tokens": list(self.tokens), "seeds": self.replicates}
        cost = self.replicates * sum(6 * n * d for n, d in zip(self.n, self.tokens, strict=True))
        own |= {"width": self.width, "cost": cost, "target": self.target, "noise": self.centre.noise}
        for name, errors in (("before", self.before), ("after", self.after)):
            own[name] = errors and {f"approach{k}": e.as_dict() for k, e in errors.items()}
        return own | {"rule": self.centre.rule, "warnings": list(self.centre.warnings)}


def propose(
    runs: pd.DataFrame,
    ladder: Ladder,
    spec: SweepConfig,
    *,
    flops: float | None = None,
    target: float | None = None,
    prior: Law | None = None,
    seed_noise: float | None = None,
    seed: int = 0,
) -> Next:
    """The next budget of a study from its finished `runs`: columns `budget`, `n`, `d`, `flops`, `loss` (nats).

    Sizes are as many as the budgets so far have, and reach as far to either side, or twice as far as the interval of
    N* if that is more. flops: the budget; None goes on by the ratio of the last two. target: where errors are counted;
    None is a hundred times the largest budget measured. prior, seed_noise: of a designed study.

    Raises:
        UserError: no finished runs of a budget, or a ladder that has no such sizes.
    """
    if runs.empty or not (runs["budget"] > 0).all():
        raise UserError("sweep next: no finished run of an isoFLOP budget in this study; train its first budget")
    done = np.sort(runs["budget"].unique().astype(float))
    flops = flops or _three(done[-1] * (done[-1] / done[-2] if len(done) > 1 else RATIO))
    target = target or 100 * float(done[-1])
    centre = find_centre(runs, flops, prior=prior, seed_noise=seed_noise, seed=seed)
    groups = [rows for _, rows in runs.groupby("budget")]
    count = max(3, max(rows["n"].nunique() for rows in groups))
    replicates = max(1, round(float(np.median([len(rows) / rows["n"].nunique() for rows in groups]))))
    width = float(np.median([math.sqrt(rows["n"].max() / rows["n"].min()) for rows in groups]))
    if centre.interval is not None:
        width = max(width, 2 * max(centre.interval[1] / centre.n, centre.n / centre.interval[0]))
    width = float(np.clip(width, 2.0, WIDEST))
    names, n, tokens = _sizes(ladder, spec, centre.n, width, count, flops)
    before = after = None
    if centre.law is not None and centre.noise:
        now, new = _runs(runs), _new_runs(n, tokens, flops, replicates)
        before, after = (_errors(centre.law, part, centre.noise, target) for part in (now, now.join(new)))
    return Next(flops, centre, names, n, tokens, replicates, width, target, before, after)


def next_spec(spec: SweepConfig, found: Next, name: str | None = None) -> SweepConfig:
    """The study's spec with only the proposed budget in place of its own budgets and seeds."""
    axes: list[Axis] = [axis for axis in spec.axes if not isinstance(axis, Isoflop | Seeds)]
    axes.insert(0, Isoflop(kind="isoflop", budgets=(found.flops,), sizes=found.sizes))
    if found.replicates > 1:
        axes.append(Seeds(kind="seeds", count=found.replicates))
    return spec.model_copy(update={"axes": tuple(axes), "name": name or spec.name})


def next_cells(plan: Plan, found: Next) -> list[Cell]:
    """The proposed runs as cells to add to the study, tagged `role: next`."""
    cells = make_plan(next_spec(plan.spec, found), corpus_tokens=plan.corpus_tokens).cells
    return [replace(cell, tags={**cell.tags, "role": "next"}) for cell in cells]


def study_sizes(spec: SweepConfig) -> str | tuple[str, ...]:
    """What a study's sizes are drawn from: the ladder of the first, or the listed models where that is no ladder.

    Raises:
        UserError: a sweep without an isoflop axis.
    """
    axis = next((axis for axis in spec.axes if isinstance(axis, Isoflop)), None)
    if axis is None:
        raise UserError(
            f"sweep {spec.name}: no isoflop axis, so there is no next budget; give `sweep next` another study"
        )
    sizes = tuple(dict.fromkeys(size for _, size in axis.pairs))
    ladder, slash, size = sizes[0].partition("/")
    _, at, style = size.partition("@")
    return f"{ladder}{at}{style}" if slash and size[:1] == "d" and size[1:2].isdigit() else sizes


def prior_of(plan: Plan) -> tuple[Law | None, float | None, float | None]:
    """Prior law, seed noise and target of a designed study; three times None of another."""
    from llamax.scaling.laws import ChinchillaLaw, CoupledLaw

    if plan.design is None:
        return None, None, None
    law = plan.design["prior"]
    kind = CoupledLaw if "gamma" in law else ChinchillaLaw
    return kind(**law), plan.design["seed_noise"], plan.design["target"]["flops"]


# ---------------------------------------------------------------- where the best size lies
def find_centre(
    runs: pd.DataFrame, flops: float, *, prior: Law | None = None, seed_noise: float | None = None, seed: int = 0
) -> Centre:
    """The best size at `flops` by the best evidence: three valleys; else the prior's law moved to the runs; else what
    a fit of all runs says; else the valley of the largest budget, carried on as C^0.5.
    """
    from llamax.scaling.approach2 import fit_approach2

    valleys = fit_approach2(runs.reset_index(drop=True))
    if valleys.interior_minima < 3 and prior is not None:
        return _moved_prior(runs, flops, prior, seed_noise)
    if runs["budget"].nunique() >= 3 and len(runs) >= 8:
        return _fitted(runs, flops, seed)
    return _last_valley(runs, valleys, flops, seed_noise)


def _fitted(runs: pd.DataFrame, flops: float, seed: int) -> Centre:
    from llamax.scaling import fit_frame, recommend
    from llamax.scaling.approach3 import residual_scale

    fit = fit_frame(runs, bootstrap=DRAWS, seed=seed)
    advice = recommend(fit, flops)
    chosen = fit.choose()[1].fit
    return Centre(advice.n, advice.n_interval, advice.rule, chosen.law, residual_scale(chosen), advice.warnings)


def _moved_prior(runs: pd.DataFrame, flops: float, prior: Law, seed_noise: float | None) -> Centre:
    """Least squares of log loss over two numbers: how far the prior's optimum is moved, and a factor on the loss.

    The prior knows the valley's shape, so that its bottom is found from one slope; the interval is by derivatives.
    """
    from scipy.optimize import minimize_scalar

    from llamax.scaling.design import moved
    from llamax.scaling.laws import optimal_allocation

    n, d, y = (runs[c].to_numpy(float) for c in ("n", "d", "loss"))

    def off(log_factor: float) -> np.ndarray:
        left = np.log(y / np.asarray(moved(prior, math.exp(log_factor)).loss(n, d)))
        return left - left.mean()

    grid = np.linspace(-math.log(64), math.log(64), 97)
    best = int(np.argmin([np.sum(off(x) ** 2) for x in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, 96)]
    at = float(minimize_scalar(lambda x: float(np.sum(off(x) ** 2)), bounds=bounds, method="bounded").x)
    scatter = math.sqrt(float(np.sum(off(at) ** 2)) / max(len(y) - 2, 1))
    noise = max(scatter, seed_noise or 0.0)
    slope = (off(at + 1e-4) - off(at - 1e-4)) / 2e-4
    sd = noise / max(float(np.linalg.norm(slope)), 1e-12)
    law = moved(prior, math.exp(at))
    centre = float(optimal_allocation(law, flops).n)
    reach = math.exp(min(1.96 * sd, 10.0))
    words = []
    if abs(at) > math.log(2):
        words.append(f"the best sizes are {math.exp(at):.3g} times those of the prior")
    if best in (0, 96):
        words.append("the runs say more than 64 times the prior's best size: check the prior's units and columns")
    rule = (
        f"the prior's law with its best sizes times {math.exp(at):.3g}, the factor that fits the {len(y)} runs best "
        f"(fewer than three budgets have their minimum inside the grid)"
    )
    return Centre(centre, (centre / reach, centre * reach), rule, law, noise, tuple(words))


def _last_valley(runs: pd.DataFrame, valleys: Approach2Fit, flops: float, seed_noise: float | None) -> Centre:
    budget = next((b for b in reversed(valleys.budgets) if b.n.vertex is not None), None)
    if budget is None:
        raise UserError(
            "sweep next: no budget has three different sizes with different losses, so nothing says where the best "
            "size lies; train more sizes of one budget"
        )
    valley, words = budget.n, []
    centre, upward = float(valley.vertex or 0.0), (valley.curvature or 0.0) > 0
    sizes = runs.loc[runs["budget"] == budget.budget, "n"]
    low, high = float(sizes.min()), float(sizes.max())
    if not valley.interior:
        if not upward:  # the vertex is a maximum: the loss falls on the other side of it
            centre = low / BEYOND if (valley.centring or 0.0) > 0 else high * BEYOND
        centre = min(max(centre, low / BEYOND), high * BEYOND)
        words.append(f"the minimum at {exponent(budget.flops)} FLOPs is beyond the sizes {low:.3g} to {high:.3g}")
    n = centre * (flops / budget.flops) ** 0.5
    rule = f"the valley at {budget.flops:.3g} FLOPs (N = {centre:.3g}) times (C / {budget.flops:.3g})^0.5"
    return Centre(n, None, rule, None, seed_noise, tuple(words))


# ---------------------------------------------------------------- sizes and errors
def _sizes(
    ladder: Ladder, spec: SweepConfig, centre: float, width: float, count: int, flops: float
) -> tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]:
    """Names, N and tokens: as many sizes as the ladder allows, from `count` down to three."""
    for fewer in range(count, 2, -1):
        rows = ladder.around(centre, width, fewer)
        if rows is not None:
            n = tuple(int(ladder.n[i]) for i in rows)
            planned = [whole_steps(ladder.base.train, spec.rules, m, flops) for m in n]
            if min(steps for steps, _ in planned) >= 1:
                return tuple(ladder.names[i] for i in rows), n, tuple(tokens for _, tokens in planned)
    raise UserError(
        f"sweep next: the sizes {ladder.names[0]} ({ladder.n[0]:,.0f} parameters) to {ladder.names[-1]} "
        f"({ladder.n[-1]:,.0f}) have no grid around N* = {centre:,.0f} at {flops:.3g} FLOPs; choose another --flops"
    )


def _runs(runs: pd.DataFrame) -> Runs:
    from llamax.scaling.design import Runs

    return Runs(*(runs[c].to_numpy(float) for c in ("n", "d", "budget")))


def _new_runs(n: Sequence[int], tokens: Sequence[int], flops: float, replicates: int) -> Runs:
    from llamax.scaling.design import Runs

    rows = np.repeat(np.array([(*pair, flops) for pair in zip(n, tokens, strict=True)], float), replicates, axis=0)
    return Runs(*rows.T)


def _errors(law: Law, runs: Runs, noise: float, target: float) -> Mapping[int, Errors]:
    from llamax.scaling.design import expected_errors

    return expected_errors(law, runs, noise, target)


def _three(flops: float) -> float:
    return float(f"{flops:.3g}")
