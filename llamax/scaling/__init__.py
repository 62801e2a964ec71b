"""Scaling laws: fits, bootstrap intervals, allocation and prediction, as pure functions on arrays and DataFrames.

`fit_frame` (a table of runs to both fits), `recommend` and `predict` (a fit to a claim), `score` (the claim against the
run).
"""

from llamax.scaling.approach2 import Approach2Fit, fit_approach2
from llamax.scaling.approach3 import Approach3Fit, fit_approach3
from llamax.scaling.bootstrap import bootstrap_approach2, bootstrap_approach3
from llamax.scaling.fit import ScalingFit, fit_frame
from llamax.scaling.laws import Allocation, ChinchillaLaw, Cost, optimal_allocation, optimal_allocation_under
from llamax.scaling.predict import Prediction, Recommendation, Score, predict, recommend, score
from llamax.scaling.table import read_table

__all__ = [
    "Allocation",
    "Approach2Fit",
    "Approach3Fit",
    "ChinchillaLaw",
    "Cost",
    "Prediction",
    "Recommendation",
    "ScalingFit",
    "Score",
    "bootstrap_approach2",
    "bootstrap_approach3",
    "fit_approach2",
    "fit_approach3",
    "fit_frame",
    "optimal_allocation",
    "optimal_allocation_under",
    "predict",
    "read_table",
    "recommend",
    "score",
]
