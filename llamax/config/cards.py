"""The museum: one card a family of published models, `configs/models/<family>.yaml`.

A card file has `card` (what it is), `model` (the architecture all sizes share) and `sizes`, each with its hub id, exact
parameter count, what differs in its architecture, and what differs in its card.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, PositiveInt

from llamax.config.base import Frozen
from llamax.config.files import read_yaml, shipped


class Card(Frozen):
    """Where a model comes from. `open` is `open-source` where the weights carry a licence the OSI approves,
    `open-weight` where they can be had under other terms; `restrictions` says those in a line."""

    title: str
    licence: str
    open: Literal["open-source", "open-weight"]
    restrictions: str
    date: str = Field(pattern=r"^\d{4}-\d{2}$")
    paper: str | None
    new: str
    tokenizer: str


class Size(Frozen):
    """One published size: `params` is the exact count of its weights, a tied table once."""

    hub_id: str | None
    params: PositiveInt
    card: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any]


class Family(Frozen):
    """A whole card file."""

    card: Card
    model: dict[str, Any]
    sizes: dict[str, Size]


@lru_cache
def read_card(family: str) -> dict[str, Any]:
    """The plain data of one shipped card file."""
    return read_yaml(shipped("models")[family])


def card_names() -> list[str]:
    """Every shipped size, `family/size`."""
    return [f"{family}/{size}" for family in shipped("models") for size in read_card(family)["sizes"]]


def find_size(name: str) -> tuple[str, str] | None:
    """(family, size) of `family/size` or of a hub id, in any case; None if no card has it."""
    family, _, size = name.partition("/")
    if family in shipped("models") and size in read_card(family)["sizes"]:
        return family, size
    for family in shipped("models"):
        for size, data in read_card(family)["sizes"].items():
            if (data["hub_id"] or "").casefold() == name.casefold():
                return family, size
    return None


def card_of(family: str, size: str) -> dict[str, Any]:
    """The card of one size: the family's, with what the size's own replaces, and its hub id and published count."""
    data = read_card(family)
    own = data["sizes"][size]
    return {**data["card"], **own.get("card", {}), "hub_id": own["hub_id"], "params": own["params"]}
