"""Runs of an ablation from a known law, known gains and known noise."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

E, A, EXPONENT = 0.9, 40.0, 0.2
FLOPS = {"d16": 2e10, "d24": 6e10, "d32": 2e11, "d48": 6e11}


def base_loss(flops: float) -> float:
    """Nats per token of the base at `flops`."""
    return E + A * flops**-EXPONENT


def made_runs(
    gains: dict[str, dict[str, float]] | None = None,
    *,
    seeds: int = 3,
    noise: float = 0.004,
    shared: float = 0.01,
    seed: int = 0,
) -> pd.DataFrame:
    """A row a run; `gains[variant][size]` is the true compute-equivalent gain, `noise` a run's, `shared` a seed's."""
    rng = np.random.default_rng(seed)
    gains = gains or {"gelu": dict.fromkeys(FLOPS, 1.25)}
    rows = []
    for size, flops in FLOPS.items():
        common = shared * rng.standard_normal(seeds)
        for variant, k in itertools.product(["base", *gains], range(seeds)):
            gain = 1.0 if variant == "base" else gains[variant][size]
            loss = base_loss(flops * gain) + common[k] + noise * rng.standard_normal()
            rows.append(
                {
                    "variant": variant,
                    "match": "base" if variant == "base" else "params",
                    "size": size,
                    "seed": k,
                    "status": "done",
                    "fraction": 1.0,
                    "eval_loss": loss,
                    "tokens": 1e6,
                    "flops_causal": flops,
                    "fingerprint": "f" * 8,
                    "params_total": 1000.0,
                }
            )
    return pd.DataFrame(rows)
