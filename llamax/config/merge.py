"""Merging plain config data: how a file, a base and an override become one mapping."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from llamax.errors import UserError

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mappings key by key, anything else replaced.

    Where `over` changes a component's `kind`, the fields of the old kind are dropped except those whose name the
    override gives again: `{kind: alibi}` over a rope does not inherit `theta`. The one field a change of kind keeps is
    `d_ff`, so that switching the activation of an MLP keeps its width.
    """
    result = dict(base)
    if "kind" in over and "kind" in base and over["kind"] != base["kind"]:
        result = {"d_ff": base["d_ff"]} if "d_ff" in base and over["kind"] != "moe" else {}
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return result


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`a.b.c=value` as (path, value); the value is YAML, so numbers, null, lists and {mappings} work.

    Raises:
        UserError: no `=`, an empty path, or a value that is not YAML.
    """
    path, equals, raw = text.partition("=")
    keys = tuple(path.strip().split("."))
    if not equals or not all(keys):
        raise UserError(f"override {text!r}: expected a.b.c=value, for example train.steps=100")
    return keys, parse_scalar(raw, where=f"override {text!r}")


def parse_scalar(raw: str, where: str) -> Any:
    """A YAML value; 1e-3, which YAML 1.1 reads as text, is a number here."""
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise UserError(
            f"{where}: the value is not YAML ({str(error).splitlines()[0]}); quote it or fix the brackets"
        ) from None
    return numbers(value)


def numbers(value: Any) -> Any:
    """Text that is plainly a number in exponent form (`3e-4`, `1e9`) as a number, everywhere inside `value`.

    A whole one becomes an integer, which float fields also take, so that `train.steps=1e3` works.
    """
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        number = float(value)
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    return value


def apply_override(
    data: Mapping[str, Any], keys: Sequence[str], value: Any, where: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A copy of `data` with `value` at the dotted path; list entries are addressed by index. `where` is the path of
    `data`.

    Raises:
        UserError: the path goes through something that is not a mapping or list, or an index is out of range.
    """
    head, rest = keys[0], keys[1:]
    if rest:
        return {**data, head: _descend(data.get(head), rest, value, (*where, head))}
    if head == "kind":
        return merge(data, {"kind": value})
    old = data.get(head)
    both = isinstance(old, Mapping) and isinstance(value, Mapping)
    return {**data, head: merge(old, value) if both else value}  # type: ignore[arg-type]


def _descend(node: Any, keys: Sequence[str], value: Any, where: tuple[str, ...]) -> Any:
    path = ".".join(where)
    if isinstance(node, Sequence) and not isinstance(node, str):
        items = list(node)
        if not keys[0].isdigit() or int(keys[0]) >= len(items):
            raise UserError(
                f"{path}.{keys[0]}: {path} is a list of {len(items)}; give an index from 0 to {len(items) - 1}"
            )
        i = int(keys[0])
        items[i] = _descend(items[i], keys[1:], value, (*where, keys[0])) if len(keys) > 1 else value
        return items
    if isinstance(node, str) and where == ("model",):
        node = {"base": node}
    if node is not None and not isinstance(node, Mapping):
        raise UserError(f"{path}.{'.'.join(keys)}: {path} is {node!r}, which has no fields; drop .{'.'.join(keys)}")
    return apply_override(node or {}, keys, value, where)
