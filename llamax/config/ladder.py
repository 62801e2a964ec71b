"""The ladder: Llama-style models of every size by one width rule, d_model -> everything else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from llamax.config.files import find, read_yaml, shipped
from llamax.config.style import styled
from llamax.errors import UserError

LADDER = re.compile(r"^(?P<ladder>[a-z0-9_]+)/d(?P<width>\d+)(@(?P<style>[a-z0-9_]+))?$")


def ladder_model(name: str) -> dict[str, Any] | None:
    """The model data of `ladder/d64` and the like (any width the rule divides), or None if `name` is no ladder size.

    `ladder/d64@gemma3` is that size in a style (see `styled`).

    The rule, with the numbers of configs/ladders/<ladder>.yaml: layers = max(min, round(a * d ** b)), heads = the
    count whose head_dim = d / heads is even and nearest in ratio to the target for that width, d_ff = ratio * d
    rounded up to `multiple`.

    Raises:
        UserError: a width that is not a multiple of the ladder's.
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
    target = next(row["target"] for row in rule["head_dims"] if d_model >= row["from_width"])
    choices = [heads for heads in range(1, d_model // 2 + 1) if d_model % (2 * heads) == 0]
    heads = min(choices, key=lambda h: abs(math.log(d_model / h / target)))
    step = rule["d_ff"]["multiple"]
    d_ff = -(-int(rule["d_ff"]["ratio"] * d_model) // step) * step
    model = dict(rule["model"])
    model["d_model"] = d_model
    model["segments"] = [{"repeat": layers}]
    model["attention"] = {**model.get("attention", {}), "heads": heads, "kv_heads": heads, "head_dim": d_model // heads}
    model["mlp"] = {**model["mlp"], "d_ff": d_ff}
    return model if match["style"] is None else styled(model, match["style"], model)


def restyle(model: Mapping[str, Any], base: str | None, style: str) -> dict[str, Any]:
    """Model data built on the ladder size `base`, in `style` whatever style the base has.

    Raises:
        UserError: `base` is no ladder size, whose width the style's rules need.
    """
    match = LADDER.match(base or "")
    if match is None:
        raise UserError(f"model.style={style} rebuilds a ladder size, and model.base is {base!r}; set it to ladder/d64")
    return styled(model, style, ladder_model(f"{match['ladder']}/d{match['width']}") or {})


@lru_cache
def _rule(ladder: str) -> dict[str, Any]:
    return read_yaml(find("ladders", ladder, "ladder"))


def ladder_names() -> list[str]:
    """The listed sizes of every shipped ladder; other widths of the rule work too."""
    return [f"{name}/d{width}" for name in shipped("ladders") for width in _rule(name)["widths"]]
