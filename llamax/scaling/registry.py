"""The registry of laws: every law that `llamax fit --law` knows, by name, and any formula that a user writes."""

from __future__ import annotations

from collections.abc import Iterable

from llamax.errors import UserError
from llamax.scaling import lawbook, lawbook_inputs, traces
from llamax.scaling.formula import formula_law
from llamax.scaling.lawspec import COLUMNS, LawSpec, Parameter

__all__ = ["COLUMNS", "LAWS", "LawSpec", "Parameter", "formula_law", "law"]

LAWS: dict[str, LawSpec] = {
    spec.name: spec
    for spec in (
        lawbook.CHINCHILLA,
        lawbook.COUPLED,
        lawbook.OVERTRAINING,
        lawbook.REPEATED,
        lawbook_inputs.ROUTED,
        lawbook_inputs.GRANULARITY,
        lawbook_inputs.PRECISION,
        lawbook_inputs.QUANTIZED,
        lawbook_inputs.STEP_LR,
        lawbook_inputs.STEP_BATCH,
        lawbook_inputs.DOWNSTREAM,
        traces.ANNEALING,
        traces.MULTIPOWER,
    )
}


def law(name: str, columns: Iterable[str] = ()) -> LawSpec:
    """The law of that name, or the law of a formula such as `E + A / n**alpha` (see `formula_law`).

    columns: names that a formula may read besides those of COLUMNS. Raises UserError listing the names.
    """
    if name in LAWS:
        return LAWS[name]
    if any(sign in name for sign in "+-*/("):
        return formula_law(name, columns=columns)
    raise UserError(f"law {name!r}: no such law; choose from {', '.join(LAWS)}, or write a formula: 'E + A / n**alpha'")
