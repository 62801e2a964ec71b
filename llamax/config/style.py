"""Styles: a ladder size rebuilt as a family would build it, by rules in the width (configs/styles/<style>.yaml).

A style file has `model` (the architecture: every section but what KEPT names), `pattern` (the blocks that repeat, each
a partial block as in a unit of a segment; default: one plain block) and `first` (blocks before it, one layer each).
A number may be a rule, `{of: heads, times: 0.25, divides: heads}`; see `_number`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from llamax.config.files import find, read_yaml
from llamax.errors import UserError

KEPT = ("vocab_size", "d_model", "max_seq_len", "init", "parametrization")
RULE = frozenset({"of", "times", "multiple", "min", "divides"})


def styled(model: Mapping[str, Any], style: str, size: Mapping[str, Any]) -> dict[str, Any]:
    """Model data in `style`: of `model` only the KEPT fields stay; numbers follow the ladder's `size`.

    Layers are the ladder's. The pattern is laid from the last layer back, so that a model shallower than the pattern
    has the layers that end it (Gemma 3 in two layers: one local, one global).

    Raises:
        UserError: unknown style, or a rule that is none.
    """
    data, where = _read(style), f"style {style}"
    if unknown := sorted(data.keys() - {"model", "pattern", "first"}):
        raise UserError(f"{where}: {unknown[0]} is not a field; use model, pattern and first")
    attention, layers = size["attention"], sum(segment["repeat"] for segment in size["segments"])
    known = {
        "width": size["d_model"],
        "heads": attention["heads"],
        "head_dim": attention["head_dim"],
        "d_ff": size["mlp"]["d_ff"],
        "max_seq_len": model.get("max_seq_len", size["max_seq_len"]),
    }
    first, pattern = (
        resolve_rules(data.get(name, [{}] * (name == "pattern")), known, where) for name in ("first", "pattern")
    )
    whole, part = divmod(max(layers - len(first), 1), len(pattern))
    runs = [(1, first), (1, pattern[len(pattern) - part :]), (whole, pattern)]
    segments = [{"repeat": repeat, "unit": unit} for repeat, unit in runs if repeat and unit]
    kept = {name: model[name] for name in KEPT if name in model}
    return {**kept, **resolve_rules(data["model"], known, where), "segments": segments}


@lru_cache
def _read(style: str) -> dict[str, Any]:
    return read_yaml(find("styles", style, "style"))


def resolve_rules(node: Any, known: Mapping[str, int], where: str) -> Any:
    """`node` with every rule in it replaced by its number; `known` are the quantities a rule may be `of`.

    Raises:
        UserError: a rule that is none, or of an unknown quantity.
    """
    if isinstance(node, Mapping) and "of" in node:
        return _number(node, known, where)
    if isinstance(node, Mapping):
        return {key: resolve_rules(value, known, f"{where}: {key}") for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [resolve_rules(value, known, where) for value in node]
    return node


def _number(rule: Mapping[str, Any], known: Mapping[str, int], where: str) -> int:
    """`times` (1) x the quantity `of`: width, heads, head_dim, d_ff (of the ladder) or max_seq_len, as an integer.

    Rounded up to a `multiple` where given, else to the nearest; at least `min` (1). With `divides` it becomes the
    nearest divisor, in ratio, of that quantity.
    """
    if bad := sorted(rule.keys() - RULE) or [q for q in (rule["of"], rule.get("divides", "width")) if q not in known]:
        raise UserError(
            f"{where}: {bad[0]!r} in the rule {dict(rule)}; fields: {sorted(RULE)}, quantities: {list(known)}"
        )
    exact = rule.get("times", 1) * known[rule["of"]]
    if "divides" in rule:
        total = known[rule["divides"]]
        return min((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(math.log(n / exact)))
    multiple = rule.get("multiple")
    value = -(-exact // multiple) * multiple if multiple else round(exact)
    return max(int(value), rule.get("min", 1))
