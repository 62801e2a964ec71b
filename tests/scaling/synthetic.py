"""Runs drawn from a known law: what the fits must give back."""

import numpy as np
import pandas as pd

from llamax.scaling import ChinchillaLaw, CoupledLaw, optimal_allocation

TINY = ChinchillaLaw(E=0.9, A=60.0, B=400.0, alpha=0.38, beta=0.40)  # about the size of the quickstart
CHINCHILLA = ChinchillaLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
# What the quickstart's own runs follow: the slope in D depends on N.
BENT = CoupledLaw(E=0.55, A=150.0, B=5900.0, alpha=0.5, beta=0.65, gamma=0.5)


def isoflop(
    law: ChinchillaLaw | CoupledLaw = TINY,
    budgets: tuple[float, ...] = (3e11, 7e11, 1.5e12, 3e12),
    sizes: int = 6,
    span: float = 4.0,
    noise: float = 0.0,
    seed: int = 0,
    shift: float = 1.0,
) -> pd.DataFrame:
    """One run per budget and size; sizes from N*/span to N*·span, times `shift`; log-normal noise on the loss."""
    rng = np.random.default_rng(seed)
    rows = []
    for budget in budgets:
        best = float(optimal_allocation(law, budget).n) * shift
        for n in np.geomspace(best / span, best * span, sizes):
            d = budget / (6 * n)
            rows.append((budget, n, d, budget, float(law.loss(n, d)) * np.exp(noise * rng.normal())))
    return pd.DataFrame(rows, columns=["budget", "n", "d", "flops", "loss"])
