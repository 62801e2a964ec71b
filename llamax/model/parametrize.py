"""A parametrization applied to the parameters of a fresh model: how they start, and what AdamW multiplies by."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from llamax.config.model import ModelConfig
from llamax.config.parametrization import Role, Standard

# The role of each optimizer group, see WIDTH of config/parametrization.py.
ROLES: dict[str, Role] = {
    "embedding": "input",
    "head": "output",
    "matrix": "hidden",
    "router": "router",
    "norm": "vector",
    "bias": "vector",
}


def gain_layers(config: ModelConfig) -> int:
    """The number of layers by which `init.depth_scaling` shrinks what writes to the residual stream."""
    layers, rule = len(config.layers), config.parametrization
    return layers if isinstance(rule, Standard) else rule.gain_layers(layers)


def parametrize(model: nnx.Module, config: ModelConfig) -> None:
    """Multiplies the standard start of each parameter of a model in construction, and notes the multipliers of its
    learning rate, weight decay and eps in its metadata (`lr`, `weight_decay`, `eps`), where they are not 1.

    With init.kind=fan_in a hidden matrix already starts at 1 / sqrt(width), and a head at what the base's head starts.
    """
    rule, layers = config.parametrization, len(config.layers)
    if isinstance(rule, Standard):
        return
    root = rule.widths(config.d_model) ** 0.5
    for path, variable in jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda n: isinstance(n, nnx.Variable)):
        group = variable.get_metadata()["group"]
        if group not in ROLES:
            continue
        factors = rule.factors(ROLES[group], _in_block(path), config.d_model, layers)
        tied = group == "embedding" and config.head.tied
        follows = config.init.kind == "fan_in" and (tied or group in ("head", "matrix", "router"))
        std = factors.std * root if follows else factors.std
        if std != 1.0 and ROLES[group] != "vector":
            variable.set_value(variable.get_value() * std)
        noted = {name: value for name, value in factors._asdict().items() if name != "std" and value != 1.0}
        if noted:
            variable.set_metadata(**noted)


def _in_block(path: Any) -> bool:
    """Whether a parameter is part of a decoder block (of the stack or of a prediction module)."""
    return any(getattr(entry, "name", getattr(entry, "key", None)) in ("blocks", "block") for entry in path)
