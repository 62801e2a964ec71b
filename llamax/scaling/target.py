"""A fitted law at one compute: the best N and D, the loss there, their intervals, and what a wrong choice costs."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llamax.scaling.approach2 import Approach2Fit
from llamax.scaling.approach3 import ParametricFit
from llamax.scaling.bootstrap import Approach2Draws, Interval, ParametricDraws, as_list, interval
from llamax.scaling.laws import Cost, CoupledLaw, Law, Scalar, check_flops, optimal_allocation, plain


@dataclass(frozen=True)
class Target:
    """The optimum at `flops` training FLOPs: `n_opt` parameters, `d_opt` tokens, `loss` (nats per token; None where no
    frontier could be fitted), percentile intervals by name, the rule that made them, and the regret where it is known.
    """

    flops: float
    n_opt: float
    d_opt: float
    loss: float | None
    intervals: dict[str, Interval | None]
    rule: str
    regret: "Regret | None" = None

    @property
    def tokens_per_param(self) -> float:
        return self.d_opt / self.n_opt

    def as_dict(self) -> dict[str, Any]:
        """Plain values: `n_opt, d_opt, tokens_per_param, loss, intervals, regret`."""
        head = {name: getattr(self, name) for name in ("flops", "n_opt", "d_opt", "tokens_per_param", "loss", "rule")}
        bounds = {name: as_list(pair) for name, pair in self.intervals.items()}
        return head | {"intervals": bounds, "regret": self.regret.as_dict() if self.regret else None}


@dataclass(frozen=True)
class Regret:
    """What spending the budget at one (n, d) costs against the true optimum, were each bootstrap draw the truth.

    extra_loss: nats per token above the draw's optimum. wasted_compute: the share of the budget that the draw's own
    optimum would not have needed for the same loss. Medians, and the ends that 95 % of draws stay below.
    """

    extra_loss: float
    extra_loss_95: float
    wasted_compute: float
    wasted_compute_95: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values under the field names."""
        return {name: plain(value) for name, value in vars(self).items()}


def target_parametric(
    fit: ParametricFit, draws: ParametricDraws | None, flops: Scalar, cost: Cost, level: float = 0.95
) -> Target:
    """The closed-form optimum of a parametric law. The loss interval is the law's, without the scatter of single runs.

    Raises UserError when `flops` is not a positive number.
    """
    best = optimal_allocation(fit.law, flops, cost)
    rule = f"{fit.law.label}: minimum of the fitted law where {cost.rule} = {flops:.4g} FLOPs"
    values = {"n_opt": best.n, "d_opt": best.d, "loss": best.loss}
    n, d, loss = (float(values[name]) for name in ("n_opt", "d_opt", "loss"))
    if draws is None or not draws.draws:
        return Target(float(flops), n, d, loss, {}, rule)
    many = optimal_allocation(draws.law, flops, cost)
    bounds = {
        "n_opt": interval(many.n, level),
        "d_opt": interval(many.d, level),
        "tokens_per_param": interval(many.tokens_per_param, level),
        "loss": interval(many.loss, level),
    }
    return Target(float(flops), n, d, loss, bounds, rule, regret(draws.law, flops, n, d, cost))


def target_approach2(
    fit: Approach2Fit, draws: Approach2Draws | None, flops: Scalar, level: float = 0.95
) -> Target | None:
    """The two power laws at `flops`, and the frontier's loss where there is one. None without both power laws."""
    check_flops(flops)
    if fit.n is None or fit.d is None:
        return None
    n, d = float(fit.n.at(flops)), float(fit.d.at(flops))
    loss = fit.frontier.loss(flops) if fit.frontier else None
    bounds: dict[str, Interval | None] = {}
    if draws:
        n_draws, d_draws = np.asarray(draws.n.at(flops)), np.asarray(draws.d.at(flops))
        bounds = {
            "n_opt": interval(n_draws, level),
            "d_opt": interval(d_draws, level),
            "tokens_per_param": interval(d_draws / n_draws, level),
        }
        if fit.frontier and draws.frontier:
            bounds["loss"] = interval(draws.frontier.loss(flops), level)
    return Target(float(flops), n, d, loss, bounds, "approach 2: the power laws of N and of D at this budget")


def regret(draws: Law, flops: Scalar, n: float, d: float, cost: Cost = Cost()) -> Regret | None:
    """Regret of `n` parameters on `d` tokens at `flops`, over a law whose fields are `[draws]`; None with no draw.

    On the optimum the loss above E falls as C^-g with g = alpha·beta / (alpha + s·beta) for a cost k·N^s·D (and gamma
    times that of the coupled law), so that the compute which would have sufficed is a closed form.
    """
    best = optimal_allocation(draws, flops, cost)
    spent, least = np.asarray(draws.loss(n, d)), np.asarray(best.loss)
    power = np.asarray(draws.alpha * draws.beta / (draws.alpha + cost.n_exponent * draws.beta))
    if isinstance(draws, CoupledLaw):
        power = power * draws.gamma
    with np.errstate(divide="ignore", invalid="ignore"):
        enough = ((least - draws.E) / (spent - draws.E)) ** (1 / power)
    extra, wasted = np.maximum(spent - least, 0.0), 1 - np.clip(enough, 0, 1)
    kept = np.isfinite(extra) & np.isfinite(wasted)
    if not kept.any():
        return None
    ends = [np.quantile(v[kept], q) for v in (extra, wasted) for q in (0.5, 0.95)]
    return Regret(*map(float, ends))
