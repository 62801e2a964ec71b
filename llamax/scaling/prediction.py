"""From a fit to a claim that can be wrong: where to spend a budget, the loss to expect, and the score afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llamax.errors import UserError
from llamax.scaling.approach3 import residual_scale
from llamax.scaling.bootstrap import Interval, as_list, interval, loss_draws, mixture_interval
from llamax.scaling.caveats import FEWEST_DRAWS, distance_words
from llamax.scaling.fit import Parametric, ScalingFit
from llamax.scaling.laws import Scalar, check_flops, optimal_allocation, plain

DISAGREE = 1.5  # approaches whose optimal sizes differ by more than this factor are reported


@dataclass(frozen=True)
class Recommendation:
    """Where to spend `flops`: `n` parameters, `d` tokens, their intervals, and the rule that chose them in words."""

    flops: float
    n: float
    d: float
    n_interval: Interval | None
    d_interval: Interval | None
    approach: int
    rule: str
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with tokens_per_param."""
        return _plain(self) | {"tokens_per_param": self.d / self.n}


@dataclass(frozen=True)
class Prediction:
    """The loss claimed for a run of `n` parameters on `d` tokens, before it is trained (nats per token).

    interval: where one new run should land (uncertainty of the fit plus scatter of runs). interval_mean: where the law
    itself lies (uncertainty of the fit alone). law: `approach3` or `coupled`, which answered; loss_by_law: what each
    of them says. loss_frontier: the same question answered from approach 2's valleys, for comparison.
    """

    flops: float
    n: float
    d: float
    loss: float
    interval: Interval | None
    interval_mean: Interval | None
    level: float
    law: str
    loss_by_law: dict[str, float]
    rule: str
    loss_frontier: float | None
    recommendation: Recommendation
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; `recommendation` is nested."""
        return _plain(self) | {"recommendation": self.recommendation.as_dict()}


@dataclass(frozen=True)
class Score:
    """How a prediction did. miss_percent = 100 · |measured / predicted - 1|; inside is None without an interval."""

    loss: float
    measured: float
    miss_percent: float
    inside: bool | None
    words: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values under the field names."""
        return asdict(self)


def recommend(fit: ScalingFit, flops: Scalar) -> Recommendation:
    """Best N and D for `flops` training FLOPs, in the convention of the fit's flops column.

    Approach 2 decides when at least three budgets have an interior minimum and its exponent is between 0 and 1, because
    it assumes no formula for the loss; otherwise the parametric law that predicts does (`approach` is then 3, and the
    rule names the law). D is what the budget leaves for N tokens' worth of
    cost, so that N and D together spend exactly `flops`. Raises UserError when neither approach can answer.
    """
    check_flops(flops)
    two, words = fit.approach2, list[str]()
    chosen = fit.choose()[1] if fit.laws else None
    why_not = _why_not_approach2(fit)
    n_two = float(two.n.at(flops)) if two and two.n else None
    n_three = float(optimal_allocation(chosen.fit.law, flops, fit.cost).n) if chosen else None
    if why_not is None and two and two.n and n_two is not None:
        n, approach = n_two, 2
        rule = (
            f"approach 2: N* = {math.exp(two.n.log_coefficient):.3g}·C^{two.n.exponent:.3g}, because "
            f"{two.interior_minima} of {len(two.budgets)} budgets have an interior minimum; D* spends the rest"
        )
        n_draws = fit.approach2_draws.n.at(flops) if fit.approach2_draws else np.array([])
        d_fit = float(two.d.at(flops)) if two.d else None
        if d_fit is not None and abs(math.log(d_fit / float(fit.cost.tokens(flops, n)))) > math.log(1.2):
            words.append(f"the separate fit of D gives D* = {d_fit:.3g}, more than 20 % from what the budget leaves")
    elif n_three is not None and chosen:
        n, approach = n_three, 3
        rule = f"{chosen.fit.law.label}: the closed-form minimum of the fitted law at this budget, because {why_not}"
        law = chosen.draws.law if chosen.draws else None
        n_draws = np.asarray(optimal_allocation(law, flops, fit.cost).n) if law else np.array([])
    else:
        raise UserError(f"fit: no allocation can be recommended; {why_not}, and approach 3 was not fitted")
    if n_two and n_three and chosen and not 1 / DISAGREE < n_two / n_three < DISAGREE:
        words.append(
            f"N* is {n_two:.3g} by approach 2, {n_three:.3g} by {chosen.fit.law.label}: they disagree by "
            f"more than {DISAGREE}x"
        )
    words += distance_words(fit.runs, flops)
    d_draws = np.asarray(fit.cost.tokens(flops, n_draws))
    bounds = interval(n_draws, fit.level), interval(d_draws, fit.level)
    return Recommendation(float(flops), n, float(fit.cost.tokens(flops, n)), *bounds, approach, rule, tuple(words))


def predict(fit: ScalingFit, *, flops: Scalar, n: Scalar, d: Scalar) -> Prediction:
    """Predicted loss of the run that will be trained: `n` parameters, `d` tokens, at a budget of `flops`.

    `n` and `d` are the real ones (a ladder size, whole steps), not the recommendation, which the record carries beside
    them. The loss comes from the parametric law that `ScalingFit.choose` takes: only a formula answers away from the
    valley's floor. The intervals hold the doubt about the law too: they mix the draws of both laws by
    `ScalingFit.weights`. Where a law's error on the largest budget, fitted without it, is more than twice its
    residuals, its scatter of single runs is widened by that ratio. Raises UserError without approach 3.
    """
    for axis, value in (("n", n), ("d", d)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{axis}: {value}; give the positive number of the run that will be trained")
    name, chosen, why = fit.choose()
    law = chosen.fit.law
    advice = recommend(fit, flops)
    words = list(advice.warnings)
    loss = float(law.loss(n, d))
    ratio = _inflation(chosen)
    if ratio > 1:
        words.append(
            f"fitted without the largest budget, {law.label} misses it by {100 * (chosen.holdout_error or 0):.2g} % "
            f"against residuals of {100 * residual_scale(chosen.fit):.2g} %: the interval is widened by that ratio"
        )
    for other in fit.laws.values():
        if other.holdout_error is None or chosen.holdout_error is None or other.holdout_error >= chosen.holdout_error:
            continue
        words.append(
            f"the largest budget alone speaks for another law: fitted without it, {other.fit.law.label} misses it by "
            f"{100 * other.holdout_error:.2g} %, {law.label} by {100 * chosen.holdout_error:.2g} %"
        )
    law_only, one_run = _intervals(fit, n, d)
    if one_run is None:
        words.append("too few bootstrap draws: the prediction has no interval")
    frontier = fit.approach2.frontier.loss(flops) if fit.approach2 and fit.approach2.frontier else None
    at_best = float(law.loss(advice.n, advice.d))
    if frontier is not None and abs(frontier / at_best - 1) > 0.02:
        words.append(
            f"at the recommended allocation {law.label} predicts {at_best:.4g}, approach 2's valleys {frontier:.4g}: "
            "more than 2 % apart"
        )
    spent = float(fit.cost.flops(n, d))
    if not 0.8 < spent / flops < 1.25:
        words.append(f"n and d spend about {spent:.3g} FLOPs, not the {flops:.3g} of the budget")
    if not 1 / 2 < n / advice.n < 2:
        words.append(f"n = {n:.3g} is more than a factor of two from the recommended {advice.n:.3g}")
    return Prediction(
        flops=float(flops),
        n=float(n),
        d=float(d),
        loss=loss,
        interval=one_run,
        interval_mean=law_only,
        level=fit.level,
        law=name,
        loss_by_law={key: float(part.fit.law.loss(n, d)) for key, part in fit.laws.items()},
        rule=f"loss: {law.label} at the N and D that will be trained, because {why}; allocation: {advice.rule}",
        loss_frontier=frontier,
        recommendation=advice,
        warnings=tuple(words),
    )


def score(prediction: Prediction | Mapping[str, Any], measured: Scalar) -> Score:
    """Compare a prediction (or its dict, as saved) with the measured loss, nats per token.

    Raises UserError unless both losses are positive numbers.
    """
    record = prediction.as_dict() if isinstance(prediction, Prediction) else prediction
    loss, bounds = float(record["loss"]), record.get("interval")
    for name, value in (("loss", loss), ("measured", measured)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name}: {value}; a score needs two positive losses")
    signed = 100 * (measured / loss - 1)
    inside = None if bounds is None else bool(bounds[0] <= measured <= bounds[1])
    side = "above" if signed > 0 else "below"
    words = f"measured {measured:.4f} against {loss:.4f} predicted: {abs(signed):.2f} % {side}, "
    if bounds is None:
        words += "and there was no interval"
    else:
        where = "inside" if inside else "OUTSIDE"
        words += f"{where} the {100 * record.get('level', 0.95):.0f} % interval [{bounds[0]:.4f}, {bounds[1]:.4f}]"
    return Score(loss, float(measured), abs(signed), inside, words)


def _inflation(part: Parametric) -> float:
    """By what a law's scatter is multiplied: its error on the largest budget over its residuals, if more than 2."""
    scatter = residual_scale(part.fit)
    error = part.holdout_error or 0.0
    return error / scatter if error > 2 * scatter > 0 else 1.0


def _intervals(fit: ScalingFit, n: Scalar, d: Scalar) -> tuple[Interval | None, Interval | None]:
    """Of the law's loss and of one new run, over the draws of both laws in proportion to `ScalingFit.weights`."""
    rng = np.random.default_rng([fit.seed, 4])
    pairs, weights = [], []
    for name, weight in fit.weights().items():
        part = fit.laws[name]
        if part.draws is None or part.draws.draws < FEWEST_DRAWS:  # the scatter of single runs would hide how few
            return None, None
        pairs.append(loss_draws(part.fit, part.draws, n, d, rng, inflate=_inflation(part)))
        weights.append(weight)
    mean, one_run = (mixture_interval(parts, weights, fit.level) for parts in zip(*pairs, strict=True))
    return mean, one_run


def _why_not_approach2(fit: ScalingFit) -> str | None:
    """Why approach 2 may not choose the allocation, in words; None when it may."""
    two = fit.approach2
    if two is None:
        return "approach 2 was not fitted"
    if two.interior_minima < 3:
        return f"only {two.interior_minima} of {len(two.budgets)} budgets have an interior minimum"
    if two.n is None:
        return "approach 2 has no power law for N"
    if not 0 < two.n.exponent < 1:
        return f"approach 2's exponent of N ({two.n.exponent:.3g}) is not between 0 and 1"
    draws = fit.approach2_draws
    if draws and draws.failed > 0.2 * draws.draws:
        return f"approach 2 failed in {draws.failed} of {draws.draws} resamples"
    return None


def _plain(record: Any) -> dict[str, Any]:
    return {
        name: as_list(value) if "interval" in name else list(value) if isinstance(value, tuple) else plain(value)
        for name, value in vars(record).items()
        if not isinstance(value, Recommendation)
    }
