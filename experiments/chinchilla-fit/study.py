"""Writes results/: fits of the runs read off Chinchilla's figure 4, their bootstrap, and what the fits leave over.

    LLAMAX_SCALING_DATA=FOLDER python experiments/chinchilla-fit/study.py

FOLDER holds epoch_chinchilla/svg_extracted_data.csv (github.com/epoch-research/analyzing-chinchilla). Its licence is
not stated, so no run of it is stored here: fitted parameters, bootstrap draws, residuals summed over bins of compute.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from llamax.scaling import ChinchillaLaw, bootstrap_parametric, fit_approach3, optimal_allocation

RESULTS = Path(__file__).parent / "results"
GOPHER = 5.76e23  # FLOPs, the budget Chinchilla was trained for
DRAWS = 4000
# Parameters as printed: arXiv:2203.15556 (rounded in equation 10; with more digits in its LaTeX source), 2404.10102.
PUBLISHED = {
    "Hoffmann 2022, rounded": ChinchillaLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    "Hoffmann 2022, unrounded": ChinchillaLaw(
        E=float(np.exp(0.5267228)),
        A=float(np.exp(6.0073404)),
        B=float(np.exp(6.0179186)),
        alpha=0.33917084,
        beta=0.2849083,
    ),
    "Besiroglu 2024": ChinchillaLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
}


def read_runs(folder: Path) -> pd.DataFrame:
    """Columns `n`, `d`, `loss`, `flops` of the 245 runs; `kept` is False for the five of highest loss."""
    raw = pd.read_csv(folder / "epoch_chinchilla" / "svg_extracted_data.csv")
    n, flops, loss = (raw[name].to_numpy(float) for name in ("Model Size", "Training FLOP", "loss"))
    return pd.DataFrame({"n": n, "d": flops / (6 * n), "loss": loss, "flops": flops, "kept": loss < np.sort(loss)[-5]})


def main() -> None:
    """All three tables."""
    named = os.environ.get("LLAMAX_SCALING_DATA")
    if not named:
        sys.exit("LLAMAX_SCALING_DATA is not set: name the folder that holds epoch_chinchilla/svg_extracted_data.csv")
    runs = read_runs(Path(named))
    kept = runs[runs["kept"]]
    laws, rows = dict(PUBLISHED), []
    for label, part in (("240 runs", kept), ("245 runs", runs)):
        for method in ("huber", "lad", "mse"):
            found = fit_approach3(*(part[name].to_numpy() for name in ("n", "d", "loss")), method=method)
            laws[f"{method}, {label}"] = found.law
    for name, law in laws.items():
        best = optimal_allocation(law, GOPHER)
        values = {key: float(getattr(law, key)) for key in ("E", "A", "B", "alpha", "beta")}
        optimum = {"n_opt": best.n, "d_opt": best.d, "tokens_per_param": best.d / best.n, "loss": best.loss}
        rows.append({"fit": name} | values | {key: float(value) for key, value in optimum.items()})
    RESULTS.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_parquet(RESULTS / "fits.parquet", index=False)

    fit = fit_approach3(*(kept[name].to_numpy() for name in ("n", "d", "loss")))
    draws = bootstrap_parametric(fit, kept, DRAWS, np.random.default_rng(0)).law
    columns = {key: np.asarray(getattr(draws, key), np.float32) for key in ("E", "A", "B", "alpha", "beta")}
    pd.DataFrame(columns).to_parquet(RESULTS / "bootstrap.parquet", index=False)

    edges = np.geomspace(runs["flops"].min() * 0.999, runs["flops"].max() * 1.001, 10)
    parts = []
    for name in ("Hoffmann 2022, rounded", "Hoffmann 2022, unrounded", "huber, 240 runs"):
        left = np.log(kept["loss"] / laws[name].loss(kept["n"].to_numpy(), kept["d"].to_numpy()))
        groups = left.groupby(np.digitize(kept["flops"], edges))
        part = groups.agg(["size", "mean", "std"]).rename_axis("bin").reset_index()
        part["flops"] = np.sqrt(edges[part["bin"] - 1] * edges[part["bin"]])
        parts.append(part.assign(fit=name).drop(columns="bin"))
    pd.concat(parts, ignore_index=True).to_parquet(RESULTS / "residuals.parquet", index=False)


if __name__ == "__main__":
    main()
