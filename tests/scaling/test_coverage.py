"""How often the intervals that `llamax fit` prints hold the truth, over many studies drawn from a known law."""

import numpy as np
import pytest
from scipy.stats import binom

from llamax.scaling import (
    Cost,
    bootstrap_approach2,
    bootstrap_parametric,
    fit_approach3,
    optimal_allocation,
    target_parametric,
)
from llamax.scaling.profile_target import profile_targets

from .synthetic import TINY, isoflop

STUDIES, NOISE, FLOPS = 200, 0.005, 9e12  # of 24 runs; the target is three times the largest budget
PARAMETERS, TARGETS = ("alpha", "beta", "n_exponent"), ("n_opt", "d_opt", "loss")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["runs", "seeds", "profile"])
def test_intervals_hold_the_truth_as_often_as_they_say(kind: str) -> None:
    """Resampled runs (measured: 0.94 to 0.99 of 130 studies), drawn seed noise (0.93 to 0.98), profile likelihood (0.96
    and 0.99 of 110). A true rate of 95 % ends below the bound with probability 0.001."""
    best = optimal_allocation(TINY, FLOPS)
    truth = {"alpha": TINY.alpha, "beta": TINY.beta, "n_exponent": TINY.beta / (TINY.alpha + TINY.beta)}
    truth |= {"n_opt": best.n, "d_opt": best.d, "loss": best.loss}
    hits: dict[str, list[bool]] = {}
    for seed in range(STUDIES):
        frame = isoflop(noise=NOISE, seed=seed)
        fit = fit_approach3(*(frame[c].to_numpy(float) for c in ("n", "d", "loss")))
        if kind == "profile":
            found = {name: made.interval for name, made in profile_targets(fit, frame, FLOPS, Cost(), TARGETS).items()}
        else:
            noise = NOISE if kind == "seeds" else None
            draws = bootstrap_parametric(fit, frame, 200, np.random.default_rng(seed), seed_noise=noise)
            two = bootstrap_approach2(frame, 200, np.random.default_rng(seed), seed_noise=noise)
            found = {name: draws.intervals()[name] for name in PARAMETERS}
            found |= target_parametric(fit, draws, FLOPS, Cost()).intervals
            found |= {"approach 2": two.intervals()["n_exponent"]}
        for name, (low, high) in found.items():
            true = truth.get(name, truth["n_exponent"])
            if name != "tokens_per_param":
                hits.setdefault(name, []).append((low is None or low <= true) and (high is None or true <= high))
    least = binom.ppf(0.001, STUDIES, 0.95)
    rates = {name: sum(held) for name, held in hits.items()}
    assert min(rates.values()) >= least, rates
