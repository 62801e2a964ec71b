"""The museum: one card a family of published models, `configs/models/<family>.yaml`.

A card file has `card` (what it is), `model` (the architecture all sizes share) and `sizes`, each with its hub id, exact
parameter count, what differs in its architecture, and what differs in its card.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from llamax.config.base import Frozen
from llamax.config.files import read_yaml, shipped
from llamax.errors import UserError


class Card(Frozen):
    """Where a model comes from. `open` is `open-source` where the weights carry a licence the OSI approves,
    `open-weight` where they can be had under other terms, `unreleased` where they cannot; `restrictions` says those in
    a line. `not_built` says what the released model has and the config here has not, `disagreement` where sources
    differ and which figure stands here, `unverified` which figures rest on memory or on one weak source."""

    title: str
    licence: str
    open: Literal["open-source", "open-weight", "unreleased"]
    restrictions: str
    date: str = Field(pattern=r"^\d{4}-\d{2}$")
    paper: str | None
    new: str
    tokenizer: str
    not_built: str | None = None
    disagreement: str | None = None
    unverified: str | None = None


class Vision(Frozen):
    """Elements of a multimodal checkpoint beside its text stack: the vision `tower` with its projector, and what the
    text side gained for images, `cross_attention` layers and rows of the `embedding`."""

    tower: PositiveInt
    cross_attention: NonNegativeInt = 0
    embedding: NonNegativeInt = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.tower + self.cross_attention + self.embedding


class Size(Frozen):
    """One published size: `params` is the exact count of its weights, a tied table once, the vision side included.

    An `announced` size was never released in any form: it has that sentence, and neither params nor model.
    """

    hub_id: str | None
    params: PositiveInt | None
    announced: str | None = None
    vision: Vision | None = None
    card: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] | None

    @model_validator(mode="after")
    def _known(self) -> Size:
        if len({self.params is None, self.model is None, self.announced is not None}) != 1:
            raise ValueError("a size has params and a model, or it has announced; give one or the other")
        return self


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
    """Every shipped size that has an architecture, `family/size`."""
    return [name for name in listed_names() if _size(*name.split("/"))["model"] is not None]


def listed_names() -> list[str]:
    """Every size on a card, those only announced too."""
    return [f"{family}/{size}" for family in shipped("models") for size in read_card(family)["sizes"]]


def find_size(name: str) -> tuple[str, str] | None:
    """(family, size) of `family/size` or of a hub id, in any case; None if no card has it."""
    return _index().get(name.casefold())


def size_model(family: str, size: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The architecture of one size: what its family shares, and what is its own.

    Raises:
        UserError: a size that was announced and never released.
    """
    own = _size(family, size)
    if own["model"] is None:
        raise UserError(
            f"{family}/{size} was announced and never released ({own['announced']}); choose a released model, "
            "`llamax model list` has them"
        )
    return read_card(family)["model"], own["model"]


def card_of(family: str, size: str) -> dict[str, Any]:
    """The card of one size: the family's, with what the size's own replaces, and its hub id, published count, and the
    part of it that is no text model (`vision`, None for a text model)."""
    own = _size(family, size)
    same = {key: own.get(key) for key in ("hub_id", "params", "announced", "vision")}
    return {**dict.fromkeys(Card.model_fields), **read_card(family)["card"], **own.get("card", {}), **same}


def vision_of(family: str, size: str) -> Vision | None:
    """What the checkpoint of one size holds beside its text stack, if anything."""
    own = _size(family, size).get("vision")
    return None if own is None else Vision.model_validate(own)


@lru_cache
def _index() -> dict[str, tuple[str, str]]:
    """Every name and hub id, in lower case."""
    found: dict[str, tuple[str, str]] = {}
    for name in listed_names():
        family, size = name.split("/")
        hub_id = _size(family, size)["hub_id"]
        found |= {key.casefold(): (family, size) for key in (name, hub_id) if key}
    return found


def _size(family: str, size: str) -> dict[str, Any]:
    return read_card(family)["sizes"][size]
