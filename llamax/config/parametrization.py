"""How starts, forward multipliers and AdamW's numbers follow width and depth: one field, `model.parametrization`.

Everything is relative to a base model, whose numbers are the standard ones: a learning rate found at the base is used
at every width (muP) and depth (CompleteP). m_N = d_model / base_width, m_L = layers / base_depth. What is multiplied by
what is the table `WIDTH` and the methods here; `llamax/model/parametrize.py` applies it to the parameters.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, PositiveInt

from llamax.config.base import Frozen

Role = Literal["input", "hidden", "vector", "output", "router"]


class Factors(NamedTuple):
    """What one parameter's numbers are multiplied by, beside the base model's: std at the start, and AdamW's three."""

    std: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


# Exponents of m_N (arXiv:2505.01618, table 1, column muP; arXiv:2203.03466, table 8, for Adam). `input`: embeddings;
# `hidden`: matrices from width to width, experts among them; `vector`: norms and biases; `output`: the head, whose
# product is multiplied by 1 / m_N. AdamW's eps follows the gradients, all of which the head's multiplier makes 1 / m_N
# as large. A router is an output layer (arXiv:2508.09752) without a multiplier: W / m_N in place of W, the same
# function and, with these exponents, the same training.
WIDTH: dict[Role, Factors] = {
    "input": Factors(0.0, 0.0, 0.0, -1.0),
    "hidden": Factors(-0.5, -1.0, 1.0, -1.0),
    "vector": Factors(0.0, 0.0, 0.0, -1.0),
    "output": Factors(0.0, 0.0, 0.0, -1.0),
    "router": Factors(-1.0, -1.0, 1.0, 0.0),
}


class Standard(Frozen):
    """Numbers are what the config says at every size."""

    kind: Literal["standard"] = "standard"


class _Scaled(Frozen):
    base_width: PositiveInt
    base_head_dim: PositiveInt | None = None

    def widths(self, d_model: int) -> float:
        """m_N."""
        return d_model / self.base_width

    def depths(self, layers: int) -> float:
        """m_L; 1 where depth is not the parametrization's business."""
        return 1.0

    def factors(self, role: Role, in_block: bool, d_model: int, layers: int) -> Factors:
        """What a parameter of `role` is multiplied by; `in_block`: it is part of a residual branch."""
        return Factors(*(self.widths(d_model) ** power for power in WIDTH[role]))

    def output_factor(self, d_model: int) -> float:
        """What the head's product is multiplied by."""
        return 1 / self.widths(d_model)

    def residual_factor(self, layers: int) -> float:
        """What a residual branch is multiplied by before it joins the stream."""
        return 1.0

    def gain_layers(self, layers: int) -> int:
        """The number of layers that `init.depth_scaling` shrinks residual matrices by."""
        return layers

    def logit_factor(self, head_dim: int) -> float:
        """Beside head_dim ** -0.5 on attention logits: 1 / head_dim in all, or sqrt(base_head_dim) / head_dim."""
        return ((self.base_head_dim or 1) / head_dim) ** 0.5


class MuP(_Scaled):
    """Maximal update parametrization (arXiv:2203.03466, table 8, Adam); weight decay and eps as in arXiv:2505.01618.

    Against the base: matrices start at 1 / sqrt(m_N) of its std and learn at 1 / m_N of its rate, decayed m_N times as
    much; the head's product is divided by m_N, eps too. d_ff, heads x head_dim and experts' widths are to grow with
    d_model. Attention logits are q k / head_dim; with `base_head_dim` sqrt(base_head_dim) times that, so that a model
    of the base's width is the standard model.
    """

    kind: Literal["mup"]


class CompleteP(_Scaled):
    """muP in width, and residual branches multiplied by m_L ** -alpha in depth (arXiv:2505.01618, table 1).

    Learning rates of everything inside a block follow m_L ** (alpha - 1), its eps m_L ** -alpha; `init.depth_scaling`
    keeps to `base_depth`. alpha = 1 is CompleteP, 0.5 the square root of other depth rules.
    """

    kind: Literal["completep"]
    base_depth: PositiveInt
    alpha: Annotated[float, Field(ge=0.5, le=1.0)] = 1.0

    def depths(self, layers: int) -> float:
        """m_L."""
        return layers / self.base_depth

    def factors(self, role: Role, in_block: bool, d_model: int, layers: int) -> Factors:
        """muP's, times what depth asks of a residual branch."""
        width, m_l = super().factors(role, in_block, d_model, layers), self.depths(layers)
        if not in_block:
            return width
        return width._replace(lr=width.lr * m_l ** (self.alpha - 1), eps=width.eps * m_l**-self.alpha)

    def residual_factor(self, layers: int) -> float:
        """m_L ** -alpha."""
        return self.depths(layers) ** -self.alpha

    def gain_layers(self, layers: int) -> int:
        """The base's: depth enters by the multiplier alone."""
        return self.base_depth


Parametrization = Annotated[Standard | MuP | CompleteP, Field(discriminator="kind")]
