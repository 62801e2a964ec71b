"""Scaling laws: fits, bootstrap intervals, allocation and prediction, as pure functions on arrays and DataFrames.

`fit_frame` (a table of runs to all fits), `recommend` and `predict` (a fit to a claim), `score` (the claim against the
run), `register` and `read_predictions` (the ledger of claims, a hash chain), `align_curves` and what follows it (loss
curves).

`law` and `LAWS` are the registry of laws; `served_allocation`, `limited_allocation` and `allocate` say what to train
when training is not all; `approach2_bias` what an isoFLOP design gets wrong without any noise.

`law` and `LAWS` are the registry of laws; `served_allocation`, `limited_allocation` and `allocate` say what to train
when training is not all; `approach2_bias` what an isoFLOP design gets wrong without any noise.
"""

from llamax.scaling.allocation import (
    LimitedAllocation,
    ServedAllocation,
    allocate,
    beyond_training,
    limited_allocation,
    served_allocation,
)
from llamax.scaling.approach1 import Approach1Fit, fit_approach1
from llamax.scaling.approach2 import Approach2Fit, fit_approach2
from llamax.scaling.approach3 import ParametricFit, fit_approach3, fit_coupled
from llamax.scaling.bias import Approach2Bias, approach2_bias, isoflop_runs
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
from llamax.scaling.lawspec import COLUMNS, LawSpec, Parameter
from llamax.scaling.predict import Prediction, Recommendation, Score, predict, recommend, score
from llamax.scaling.register import read_predictions, register, scores
from llamax.scaling.registry import LAWS, formula_law, law
from llamax.scaling.table import read_table
from llamax.scaling.traces import annealing_columns, power_columns
from llamax.scaling.transfer import Shift, lr_optima, lr_shift, transfer_summary

__all__ = [
    "COLUMNS",
    "LAWS",
    "Allocation",
    "Approach1Fit",
    "Approach2Bias",
    "Approach2Fit",
    "ChinchillaLaw",
    "Collapse",
    "Cost",
    "CoupledLaw",
    "LawSpec",
    "LimitedAllocation",
    "NoiseScale",
    "Parameter",
    "Parametric",
    "ParametricFit",
    "Prediction",
    "Recommendation",
    "ScalingFit",
    "Score",
    "ServedAllocation",
    "Shift",
    "Spike",
    "align_curves",
    "allocate",
    "annealing_columns",
    "approach2_bias",
    "beyond_training",
    "bootstrap_approach2",
    "bootstrap_parametric",
    "collapse_curves",
    "ema",
    "find_spikes",
    "fit_approach1",
    "fit_approach2",
    "fit_approach3",
    "fit_coupled",
    "fit_frame",
    "formula_law",
    "isoflop_runs",
    "law",
    "limited_allocation",
    "lr_optima",
    "lr_shift",
    "noise_scale",
    "optimal_allocation",
    "optimal_allocation_under",
    "power_columns",
    "predict",
    "read_predictions",
    "read_table",
    "recommend",
    "register",
    "running_median",
    "score",
    "scores",
    "served_allocation",
    "transfer_summary",
]
