"""Scaling laws: fits, bootstrap intervals, allocation and prediction, as pure functions on arrays and DataFrames.

`fit_frame` (a table of runs to all fits), `fit_approach3` and `fit_law` (one law by itself), `target_parametric` and
`regret` (the optimum at a compute and what a wrong one costs), `profile_law` (profile likelihood), `recommend` and
`predict` (a fit to a claim), `score` (the claim against the run), `register` and `read_predictions` (the ledger of
claims, a hash chain), `align_curves` and what follows it (loss curves).

`law` and `LAWS` are the registry of laws; `served_allocation`, `limited_allocation` and `allocate` say what to train
when training is not all; `approach2_bias` what an isoFLOP design gets wrong without any noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from llamax.scaling.effects import Ablation, ablation
    from llamax.scaling.engine import Objective
    from llamax.scaling.fit import Parametric, ScalingFit, fit_frame
    from llamax.scaling.lawfit import LawDraws, LawFit, bootstrap_law, fit_law
    from llamax.scaling.laws import (
        Allocation,
        ChinchillaLaw,
        Cost,
        CoupledLaw,
        optimal_allocation,
        optimal_allocation_under,
    )
    from llamax.scaling.lawspec import COLUMNS, LawSpec, Parameter
    from llamax.scaling.prediction import Prediction, Recommendation, Score, predict, recommend, score
    from llamax.scaling.profile import Profile, profile_law, profile_parametric
    from llamax.scaling.reading import read_table
    from llamax.scaling.records import read_predictions, register, scores
    from llamax.scaling.registry import LAWS, formula_law, law
    from llamax.scaling.target import Regret, Target, regret, target_approach2, target_parametric
    from llamax.scaling.traces import annealing_columns, power_columns
    from llamax.scaling.transfer import Shift, lr_optima, lr_shift, transfer_summary

__all__ = [
    "COLUMNS",
    "LAWS",
    "Ablation",
    "Allocation",
    "Approach1Fit",
    "Approach2Bias",
    "Approach2Fit",
    "ChinchillaLaw",
    "Collapse",
    "Cost",
    "CoupledLaw",
    "LawDraws",
    "LawFit",
    "LawSpec",
    "LimitedAllocation",
    "NoiseScale",
    "Objective",
    "Parameter",
    "Parametric",
    "ParametricFit",
    "Prediction",
    "Profile",
    "Recommendation",
    "Regret",
    "ScalingFit",
    "Score",
    "ServedAllocation",
    "Shift",
    "Spike",
    "Target",
    "ablation",
    "align_curves",
    "allocate",
    "annealing_columns",
    "approach2_bias",
    "beyond_training",
    "bootstrap_approach2",
    "bootstrap_law",
    "bootstrap_parametric",
    "collapse_curves",
    "ema",
    "find_spikes",
    "fit_approach1",
    "fit_approach2",
    "fit_approach3",
    "fit_coupled",
    "fit_frame",
    "fit_law",
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
    "profile_law",
    "profile_parametric",
    "read_predictions",
    "read_table",
    "recommend",
    "register",
    "regret",
    "running_median",
    "score",
    "scores",
    "served_allocation",
    "target_approach2",
    "target_parametric",
    "transfer_summary",
]

# Resolved on first use, each by its module: `llamax ablate plan` and the plan of a sweep need a few that import no JAX.
_LAZY = {
    "effects": ("Ablation", "ablation"),
    "allocation": (
        "LimitedAllocation",
        "ServedAllocation",
        "allocate",
        "beyond_training",
        "limited_allocation",
        "served_allocation",
    ),
    "approach1": ("Approach1Fit", "fit_approach1"),
    "approach2": ("Approach2Fit", "fit_approach2"),
    "approach3": ("ParametricFit", "fit_approach3", "fit_coupled"),
    "bias": ("Approach2Bias", "approach2_bias", "isoflop_runs"),
    "bootstrap": ("bootstrap_approach2", "bootstrap_parametric"),
    "curves": (
        "Collapse",
        "NoiseScale",
        "Spike",
        "align_curves",
        "collapse_curves",
        "ema",
        "find_spikes",
        "noise_scale",
        "running_median",
    ),
    "engine": ("Objective",),
    "fit": ("Parametric", "ScalingFit", "fit_frame"),
    "lawfit": ("LawDraws", "LawFit", "bootstrap_law", "fit_law"),
    "laws": ("Allocation", "ChinchillaLaw", "Cost", "CoupledLaw", "optimal_allocation", "optimal_allocation_under"),
    "lawspec": ("COLUMNS", "LawSpec", "Parameter"),
    "prediction": ("Prediction", "Recommendation", "Score", "predict", "recommend", "score"),
    "profile": ("Profile", "profile_law", "profile_parametric"),
    "reading": ("read_table",),
    "records": ("read_predictions", "register", "scores"),
    "registry": ("LAWS", "formula_law", "law"),
    "target": ("Regret", "Target", "regret", "target_approach2", "target_parametric"),
    "traces": ("annealing_columns", "power_columns"),
    "transfer": ("Shift", "lr_optima", "lr_shift", "transfer_summary"),
}
_HOMES = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"llamax.scaling.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'llamax.scaling' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
