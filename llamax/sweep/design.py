"""Choosing an isoFLOP study: of all the designs a budget can pay for, the one with the least expected error.

spec with a `design` axis -> candidates (budgets, sizes, seeds that cost the total) -> expected error of each, by
derivatives -> the best few simulated -> the same spec with an `isoflop` and a `seeds` axis, and the report
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamax.accounting import count_params
from llamax.config.load import load_run, run_from_data
from llamax.config.run import RunConfig
from llamax.config.sweep import Axis, Design, Isoflop, Prior, Seeds, SweepConfig
from llamax.errors import UserError
from llamax.sweep.design_report import report, tokens_per_param
from llamax.sweep.expand import axis_points
from llamax.sweep.rules import whole_steps

if TYPE_CHECKING:
    from llamax.scaling.design import Errors, Runs
    from llamax.scaling.laws import Law

FINALISTS = 3  # designs that are simulated
SECTIONS = {"chinchilla": "approach3", "coupled": "coupled"}  # of the laws in the output of `llamax fit --json`
FAILED = 0.05  # a design in which an approach fails more often than this is not chosen
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Ladder:
    """The sizes a study may use: their names, and N of each, rising."""

    names: tuple[str, ...]
    n: np.ndarray
    base: RunConfig

    def around(self, centre: float, width: float, count: int) -> tuple[int, ...] | None:
        """Indices of `count` sizes nearest to an even grid in log N from centre / width to centre · width.

        None where the ladder has not that many different ones, or does not reach 3/4 of the way to either side.
        """
        wanted = np.log(centre) + np.linspace(-1, 1, count) * math.log(width)
        log_n = np.log(self.n)
        found = np.unique(np.argmin(np.abs(log_n[:, None] - wanted), axis=0))
        reach = 0.75 * math.log(width)
        if (
            len(found) < count
            or math.log(centre) - log_n[found[0]] < reach
            or log_n[found[-1]] - math.log(centre) < reach
        ):
            return None
        return tuple(int(i) for i in found)


@dataclass(frozen=True)
class Candidate:
    """One design: budgets (FLOPs), the sizes at each, seeds; the factor its sizes reach to either side of the best."""

    budgets: tuple[float, ...]
    sizes: tuple[tuple[str, ...], ...]
    replicates: int
    width: float
    decades: float
    runs: Runs
    cost: float

    @property
    def shape(self) -> tuple[int, int]:
        """Budgets and seeds: what sorts of design there are."""
        return len(self.budgets), self.replicates

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        sizes = [list(row) for row in self.sizes]
        own = {"budgets": list(self.budgets), "sizes": sizes, "replicates": self.replicates, "width": self.width}
        return own | {"decades": self.decades, "runs": len(self.runs.n), "flops_6n": self.cost}


@dataclass(frozen=True)
class Judged:
    """A candidate and its error: root mean square over the deciding approaches and over places of the optimum.

    `errors`: of every approach with the optimum where the prior has it. `simulated`: the same by simulation, and the
    error that then decides, where this was done.
    """

    candidate: Candidate
    error: float
    errors: Mapping[int, Errors]
    simulated: Mapping[int, Errors] | None = None
    simulated_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        from llamax.scaling.laws import plain

        own = self.candidate.as_dict() | {"error": self.error, "simulated_error": plain(self.simulated_error)}
        for name, errors in (("expected", self.errors), ("simulated", self.simulated)):
            own[name] = errors and {f"approach{k}": e.as_dict() for k, e in errors.items()}
        return own


def resolve_design(spec: SweepConfig, progress: OnProgress | None = None) -> tuple[SweepConfig, dict[str, Any] | None]:
    """The spec with its `design` axis replaced by the axes of the best design, and the report of the choice.

    Without such an axis: the spec and None. The same spec gives the same design.

    Raises:
        UserError: two designs, other axes that set sizes or seeds, a prior that cannot be read, no design possible.
    """
    designs = [axis for axis in spec.axes if isinstance(axis, Design)]
    if not designs:
        return spec, None
    if len(designs) > 1 or any(axis.kind in ("isoflop", "ladder", "seeds", "horizons") for axis in spec.axes):
        raise UserError(f"sweep {spec.name}: a design chooses budgets, sizes and seeds; drop the other axes that do")
    design, where = designs[0], f"sweep {spec.name}: design"
    others = [len(axis_points(axis)) for axis in spec.axes if axis is not design]
    law = prior_law(design.prior, where)
    share = design.total_flops / math.prod(others)
    ladder = ladder_of(spec, design.sizes)
    judged, considered = judge(design, law, list(candidates(design, law, ladder, spec, share)), progress)
    if not judged:
        raise UserError(
            f"{where}: no design of {share:.3g} FLOPs fits the sizes {ladder.names[0]} to {ladder.names[-1]} and "
            f"{design.min_steps} steps a run; {_what_helps(law, ladder, share)}"
        )
    best = judged[0]
    if not math.isfinite(best.simulated_error or 0.0):
        raise UserError(
            f"{where}: simulated with seed noise {design.seed_noise:g}, studies of the best designs mostly have no "
            f"answer by approach {' and '.join(map(str, design.approaches))}: the noise hides the valleys of this "
            "prior; check its units and seed_noise, or raise total_flops"
        )
    chosen: list[Axis] = [Isoflop(kind="isoflop", budgets=best.candidate.budgets, sizes=best.candidate.sizes)]
    if best.candidate.replicates > 1:
        chosen.append(Seeds(kind="seeds", count=best.candidate.replicates))
    at = next(i for i, axis in enumerate(spec.axes) if axis is design)
    update: dict[str, Any] = {"axes": (*spec.axes[:at], *chosen, *spec.axes[at + 1 :])}
    if "optimum_tokens_per_param" not in spec.model_fields_set:
        update["optimum_tokens_per_param"] = tokens_per_param(law, best.candidate.budgets)
    return spec.model_copy(update=update), report(design, law, share, judged, considered)


def _what_helps(law: Law, ladder: Ladder, total: float) -> str:
    from llamax.scaling.laws import optimal_allocation

    best = float(optimal_allocation(law, total).n)
    if best > ladder.n[-1]:
        return f"the prior's best size for all of it in one run has N = {best:.3g}: lower total_flops, or add sizes"
    return "raise total_flops, lower min_steps, or widen sizes, budgets or width"


def prior_law(prior: Prior | str, where: str) -> Law:
    """The law of a prior: its parameters, or those of the law that the named fit predicts with."""
    from llamax.scaling.laws import ChinchillaLaw, CoupledLaw

    if isinstance(prior, Prior):
        values = prior.as_dict()
        gamma = values.pop("gamma")
        return ChinchillaLaw(**values) if gamma == 1 else CoupledLaw(**values, gamma=gamma)
    try:
        data = json.loads(Path(prior).expanduser().read_text(encoding="utf-8"))
        data = data.get("fit", data)
        part = data.get(SECTIONS.get(data.get("law_that_predicts"), data.get("law") or ""), data)
        params = {k: float(v) for k, v in part["params"].items()}
        if not all(0 < v < math.inf for v in params.values()):
            raise UserError(
                f"{where}.prior = {prior!r}: its parameters {params} are not all positive; refit or give them"
            )
        return (CoupledLaw if "gamma" in params else ChinchillaLaw)(**params)
    except OSError as error:
        raise UserError(
            f"{where}.prior = {prior!r}: {error.strerror or error}; give parameters or a fit's JSON"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{where}.prior = {prior!r}: no fitted law with params E, A, B, alpha, beta in it; give the output of "
            "`llamax fit --json` or the parameters themselves"
        ) from None


def ladder_of(spec: SweepConfig, sizes: str | Sequence[str]) -> Ladder:
    """N of every size under the sweep's base and overrides.

    A ladder's name stands for its widths of at most four significant bits (64, 72, ... 120, 128, 144, ...): 7 to 13 %
    apart in width from 64 on, and multiples that hardware likes.
    """
    names = _widths(sizes) if isinstance(sizes, str) else tuple(sizes)
    configs = [_config(spec, name) for name in names]
    rows = sorted(zip([count_params(c.model).active_matmul for c in configs], names, strict=True))
    return Ladder(tuple(name for _, name in rows), np.array([n for n, _ in rows], float), configs[0])


@lru_cache
def _widths(ladder: str) -> tuple[str, ...]:
    from llamax.config.ladder import ladder_names

    name, at, style = ladder.partition("@")
    listed = [int(size.rpartition("/d")[2]) for size in ladder_names() if size.startswith(f"{name}/")]
    if not listed:
        known = sorted({size.partition("/")[0] for size in ladder_names()})
        raise UserError(f"design.sizes = {ladder!r}: no such ladder; use {', '.join(known)} or a list of models")
    widths = [w for w in range(8, max(listed) + 1, 8) if w % (1 << max(0, w.bit_length() - 4)) == 0]
    return tuple(f"{name}/d{width}{at}{style}" for width in widths)


def _config(spec: SweepConfig, size: str) -> RunConfig:
    texts = (*spec.overrides, f"model.base={size}")
    return load_run(spec.base, texts) if isinstance(spec.base, str) else run_from_data(spec.base, texts, where="base")


# ---------------------------------------------------------------- candidates
def candidates(design: Design, law: Law, ladder: Ladder, spec: SweepConfig, total: float) -> Iterator[Candidate]:
    """Every design of the grid that `total` FLOPs pay for: each spends it all, on budgets even in log C."""
    from llamax.scaling.laws import optimal_allocation

    tried = itertools.product(design.budgets, design.decades, design.sizes_per_budget, design.width, design.replicates)
    seen = set()
    for count, decades, sizes, width, replicates in tried:
        steps = np.linspace(-decades, 0, count)
        largest = total / (replicates * sizes * float(np.sum(10**steps)))
        for _ in range(4):  # whole steps may cost a little more than the budgets say
            budgets = tuple(_down(c) for c in largest * 10**steps)
            found = [ladder.around(float(optimal_allocation(law, c).n), width, sizes) for c in budgets]
            runs = _runs(design, ladder, spec, budgets, found, replicates)
            if runs is None or runs.flops() <= total:
                break
            largest *= 0.999 * total / runs.flops()
        key = (budgets, tuple(found), replicates)
        if runs is None or runs.flops() > total or key in seen:
            continue
        seen.add(key)
        names = tuple(tuple(ladder.names[i] for i in row or ()) for row in found)
        yield Candidate(budgets, names, replicates, width, decades, runs, runs.flops())


def _down(flops: float) -> float:
    """Three digits, rounded down."""
    unit = 10 ** (math.floor(math.log10(flops)) - 2)
    return float(f"{math.floor(flops / unit + 1e-9) * unit:.3g}")


def _runs(
    design: Design,
    ladder: Ladder,
    spec: SweepConfig,
    budgets: Sequence[float],
    sizes: Sequence[tuple[int, ...] | None],
    replicates: int,
) -> Runs | None:
    """N, D and budget of every run, D in whole steps; None where a run is too short or too long."""
    from llamax.scaling.design import Runs

    rows: list[tuple[float, int, float]] = []
    for budget, row in zip(budgets, sizes, strict=True):
        if row is None:
            return None
        for i in row:
            n = int(ladder.n[i])
            steps, tokens = whole_steps(ladder.base.train, spec.rules, n, budget)
            if steps < design.min_steps or tokens > (design.max_tokens or math.inf):
                return None
            rows += [(n, tokens, budget)] * replicates
    n, d, label = np.array(rows, float).T
    return Runs(n, d, label)


# ---------------------------------------------------------------- judging
def judge(
    design: Design, law: Law, found: Sequence[Candidate], progress: OnProgress | None = None
) -> tuple[list[Judged], int]:
    """The best designs, best first, and how many had an answer at all.

    The first are the finalists, simulated and sorted by that (one in which a deciding approach fails in more than
    `FAILED` of the studies comes last of them); then the best of every other number of budgets and seeds.
    """
    from llamax.scaling.design import expected_errors, moved, simulate_errors

    factor, noise, target = design.centre_factor, design.seed_noise, design.target_flops
    laws = [law, moved(law, factor), moved(law, 1 / factor)] if factor > 1 else [law]
    say = progress or (lambda *_: None)
    scored: list[tuple[float, float, Candidate]] = []
    for i, one in enumerate(found, 1):
        errors = [expected_errors(truth, one.runs, noise, target, approaches=design.approaches) for truth in laws]
        if math.isfinite(error := _error(design, errors)):
            scored.append((error, one.cost, one))
        say("designs", i, len(found))
    scored.sort(key=lambda row: row[:2])
    finalists = []
    for i, (error, _, best) in enumerate(scored[:FINALISTS], 1):
        simulated = [simulate_errors(truth, best.runs, noise, target, draws=design.draws) for truth in laws]
        expected = expected_errors(law, best.runs, noise, target)
        finalists.append(Judged(best, error, expected, simulated[0], _error(design, simulated)))
        say("simulated", i, min(FINALISTS, len(scored)))
    finalists.sort(key=lambda one: _simulated(design, one))
    seen = {one.candidate.shape for one in finalists}
    others = []
    for error, _, one in scored[FINALISTS:]:
        if one.shape not in seen:
            seen.add(one.shape)
            others.append(Judged(one, error, expected_errors(law, one.runs, noise, target)))
    return finalists + others, len(scored)


def _error(design: Design, errors: Sequence[Mapping[int, Errors]]) -> float:
    values = [part[k].rms(design.minimize) for part in errors for k in design.approaches]
    return math.sqrt(sum(v**2 for v in values) / len(values))


def _simulated(design: Design, judged: Judged) -> tuple[bool, float]:
    failed = max((judged.simulated or judged.errors)[k].failed for k in design.approaches)
    return failed > FAILED, judged.simulated_error or math.inf
