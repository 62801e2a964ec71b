"""Scaling laws: fits, bootstrap intervals, allocation and prediction, as pure functions on arrays and DataFrames.

`fit_frame` (a table of runs to all fits), `recommend` and `predict` (a fit to a claim), `score` (the claim against the
run), `register` and `read_predictions` (the ledger of claims, a hash chain), `align_curves` and what follows it (loss
curves).
"""

from llamax.scaling.approach2 import Approach2Fit, fit_approach2
from llamax.scaling.approach3 import ParametricFit, fit_approach3, fit_coupled
from llamax.scaling.bootstrap import bootstrap_approach2, bootstrap_parametric
from llamax.scaling.curves import (
    Collapse,
    NoiseScale,
    Spike,
    align_curves,
    collapse_curves,
    ema,
    find_spikes,
    noise_scale,
    running_median,
)
from llamax.scaling.fit import Parametric, ScalingFit, fit_frame
from llamax.scaling.laws import (
    Allocation,
    ChinchillaLaw,
    Cost,
    CoupledLaw,
    optimal_allocation,
    optimal_allocation_under,
)
from llamax.scaling.predict import Prediction, Recommendation, Score, predict, recommend, score
from llamax.scaling.register import read_predictions, register, scores
from llamax.scaling.table import read_table
from llamax.scaling.transfer import Shift, lr_optima, lr_shift, transfer_summary

__all__ = [
    "Allocation",
    "Approach2Fit",
    "ChinchillaLaw",
    "Collapse",
    "Cost",
    "CoupledLaw",
    "NoiseScale",
    "Parametric",
    "ParametricFit",
    "Prediction",
    "Recommendation",
    "ScalingFit",
    "Score",
    "Shift",
    "Spike",
    "align_curves",
    "bootstrap_approach2",
    "bootstrap_parametric",
    "collapse_curves",
    "ema",
    "find_spikes",
    "fit_approach2",
    "fit_approach3",
    "fit_coupled",
    "fit_frame",
    "lr_optima",
    "lr_shift",
    "noise_scale",
    "optimal_allocation",
    "optimal_allocation_under",
    "predict",
    "read_predictions",
    "read_table",
    "recommend",
    "register",
    "running_median",
    "score",
    "scores",
    "transfer_summary",
]
