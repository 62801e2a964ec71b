"""Profile likelihood of the optimum at a compute: N*, D*, tokens per parameter, and the loss there.

Written about its own optimum the Chinchilla law has these as parameters. On C = k N^s D its minimum (N*, D*, L*) has
alpha A / N*^alpha = s beta B / D*^beta, so that with q = E / L*

    L(N, D) = L* [q + (1 - q) (s beta (N / N*)^-alpha + alpha (D / D*)^-beta) / (alpha + s beta)]

and fixing N* or L* while the rest is refitted is an ordinary profile (profile.py). At one compute D* and D* / N* are
functions of N* alone, and their intervals are its ends carried over.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd

from llamax.errors import UserError
from llamax.scaling.approach3 import ParametricFit
from llamax.scaling.engine import Task
from llamax.scaling.lawbook import exponent
from llamax.scaling.lawfit import law_task
from llamax.scaling.laws import ChinchillaLaw, Cost, Scalar, optimal_allocation
from llamax.scaling.lawspec import LawSpec, Parameter, Values
from llamax.scaling.profile import Profile, chi_square_scale, profile, rise_quantile

TARGETS = ("n_opt", "d_opt", "tokens_per_param", "loss")


def _about_the_optimum(p: Values, x: Values) -> Any:
    s, budget = x["n_exponent"], x["log_budget"]  # log C / k
    log_n = jnp.log(p["n_opt"])
    size = jnp.exp(-p["alpha"] * (jnp.log(x["n"]) - log_n))
    data = jnp.exp(-p["beta"] * (jnp.log(x["d"]) - (budget - s * log_n)))
    terms = (s * p["beta"] * size + p["alpha"] * data) / (p["alpha"] + s * p["beta"])
    return p["loss_opt"] * (p["share"] + (1 - p["share"]) * terms)


ABOUT = LawSpec(
    name="chinchilla about its optimum",
    formula="L = L* [q + (1 - q) (s beta (N / N*)^-alpha + alpha (D / D*)^-beta) / (alpha + s beta)]",
    source="the Chinchilla law, arXiv:2203.15556, with equation 4 for A and B",
    columns=("n", "d", "log_budget", "n_exponent"),
    parameters=(
        Parameter("n_opt", 1.0, 1e18, log=True, starts=(1e8,), about="N* at the compute"),
        Parameter("loss_opt", 1e-3, 100.0, log=True, starts=(2.0,), about="the loss there"),
        Parameter("share", 1e-4, 1 - 1e-6, starts=(0.7,), about="E over that loss"),
        exponent("alpha", "of N"),
        exponent("beta", "of D"),
    ),
    loss=_about_the_optimum,
)


@dataclass(frozen=True)
class Optimum:
    """A fit in the coordinates of ABOUT: its task, optimum and objective there, and what a rise of that is read by."""

    task: Task
    u: np.ndarray
    objective: float
    scale: float
    quantile: float


def profile_targets(
    fit: ParametricFit, runs: pd.DataFrame, flops: Scalar, cost: Cost, names: tuple[str, ...] = TARGETS
) -> dict[str, Profile]:
    """95 % profiles of what the fit says at `flops`, by name; `runs` as fitted, columns `n, d, loss`.

    Raises UserError for another name, the coupled law (its prior is no likelihood), or runs exactly on the law.
    """
    if wrong := [name for name in names if name not in TARGETS]:
        raise UserError(f"profile: {wrong[0]!r}; choose from {', '.join(TARGETS)}")
    if not isinstance(fit.law, ChinchillaLaw):
        raise UserError("profile likelihood at a target: of the Chinchilla law alone; the coupled law has a prior")
    peak = optimum(fit, runs, flops, cost)
    found: dict[str, Profile] = {}
    for index, wanted in ((0, ("n_opt", "d_opt", "tokens_per_param")), (1, ("loss",))):
        if not set(wanted) & set(names):
            continue
        one = profile(peak.task, peak.u, peak.objective, index, peak.scale, quantile=peak.quantile)
        own = replace(one, at=np.exp(one.at), interval=_ends(one.interval, np.exp))
        made = {
            "n_opt": own,
            "d_opt": _carried(own, "d_opt", lambda n: cost.tokens(flops, n)),
            "tokens_per_param": _carried(own, "tokens_per_param", lambda n: cost.tokens(flops, n) / n),
            "loss": replace(own, name="loss"),
        }
        found |= {name: made[name] for name in wanted if name in names}
    return found


def optimum(fit: ParametricFit, runs: pd.DataFrame, flops: Scalar, cost: Cost = Cost()) -> Optimum:
    """The fit written about its optimum at `flops`, and minimised in these coordinates."""
    best = optimal_allocation(fit.law, flops, cost)
    constant = {"log_budget": np.log(flops / cost.coefficient), "n_exponent": cost.n_exponent}
    data = {name: runs[name].to_numpy(float) for name in ("n", "d")}
    data |= {name: np.full(len(runs), value) for name, value in constant.items()}
    task, to_u = law_task(ABOUT, data, runs["loss"].to_numpy(float), fit.sums)
    share = float(np.clip(fit.law.E / best.loss, *(1e-4, 1 - 1e-6)))
    begin = to_u(np.array([[best.n, best.loss, share, fit.law.alpha, fit.law.beta]], float))
    us, values = task.minimise(begin)
    scale = chi_square_scale(task, task.describe(us[0])[0], len(ABOUT.names))
    return Optimum(task, us[0], float(values[0]), scale, rise_quantile(len(runs), len(ABOUT.names)))


def _carried(own: Profile, name: str, function: Any) -> Profile:
    """The profile of a falling function of the parameter."""
    low, high = _ends(own.interval, function)
    return Profile(name, function(own.at)[::-1], own.statistic[::-1], (high, low))


def _ends(ends: tuple[float | None, float | None], function: Any) -> tuple[float | None, float | None]:
    low, high = (None if end is None else float(function(end)) for end in ends)
    return low, high
