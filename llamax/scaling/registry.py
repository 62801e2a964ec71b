"""The registry of laws: every law that `llamax fit --law` knows, by name."""

from __future__ import annotations

from llamax.errors import UserError
from llamax.scaling.lawbook import CHINCHILLA, COUPLED
from llamax.scaling.lawspec import COLUMNS, LawSpec, Parameter

__all__ = ["COLUMNS", "LAWS", "LawSpec", "Parameter", "law"]

LAWS: dict[str, LawSpec] = {spec.name: spec for spec in (CHINCHILLA, COUPLED)}


def law(name: str) -> LawSpec:
    """The law of that name. Raises UserError listing the names."""
    if name not in LAWS:
        raise UserError(f"law {name!r}: no such law; choose from {', '.join(LAWS)}")
    return LAWS[name]
