"""The ladder: Llama-style models of every size by one width rule, d_model -> everything else."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from llamax.config.files import find, read_yaml, shipped
from llamax.errors import UserError

LADDER = re.compile(r"^(?P<ladder>[a-z0-9_]+)/d(?P<width>\d+)$")


def ladder_model(name: str) -> dict[str, Any] | None:
    """The model data of `ladder/d64` and the like (any width the rule divides), or None if `name` is no ladder size.

    The rule, with the numbers of configs/ladders/<ladder>.yaml: layers = max(min, round(a * d ** b)),
    head_dim = the entry of the table for that width, d_ff = d_ff_ratio * d rounded up to `multiple`.

    Raises:
        UserError: a width the rule cannot divide into heads.
    """
    match = LADDER.match(name)
    if match is None:
        return None
    rule = _rule(match["ladder"])
    d_model = int(match["width"])
    multiple = rule["width_multiple"]
    if d_model < multiple or d_model % multiple:
        near = max(multiple, round(d_model / multiple) * multiple)
        raise UserError(f"ladder width d{d_model}: widths are multiples of {multiple}; the nearest is d{near}")
    layers = max(rule["layers"]["min"], round(rule["layers"]["a"] * d_model ** rule["layers"]["b"]))
    head_dim = next(
        row["head_dim"] for row in rule["head_dims"] if d_model >= row["from_width"] and d_model % row["head_dim"] == 0
    )
    step = rule["d_ff"]["multiple"]
    d_ff = -(-int(rule["d_ff"]["ratio"] * d_model) // step) * step
    heads = d_model // head_dim
    model = dict(rule["model"])
    model["d_model"] = d_model
    model["segments"] = [{"repeat": layers}]
    model["attention"] = {**model.get("attention", {}), "heads": heads, "kv_heads": heads, "head_dim": head_dim}
    model["mlp"] = {**model["mlp"], "d_ff": d_ff}
    return model


@lru_cache
def _rule(ladder: str) -> dict[str, Any]:
    return read_yaml(find("ladders", ladder, "ladder"))


def ladder_names() -> list[str]:
    """The listed sizes of every shipped ladder; other widths of the rule work too."""
    return [f"{name}/d{width}" for name in shipped("ladders") for width in _rule(name)["widths"]]
