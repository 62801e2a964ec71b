"""Names, files and overrides in, one validated config out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import ValidationError

from llamax.config.base import Frozen
from llamax.config.cards import card_names, find_size, size_model
from llamax.config.files import find, read_yaml, unknown
from llamax.config.horizons import HORIZONS
from llamax.config.ladder import ladder_model, ladder_names, restyle
from llamax.config.merge import apply_override, merge, parse_override
from llamax.config.messages import explain
from llamax.config.model import ModelConfig
from llamax.errors import UserError

if TYPE_CHECKING:
    from llamax.config.run import Corpus, RunConfig

C = TypeVar("C", bound=Frozen)
_RUN_DEFAULTS: dict[str, Any] = {"optimizer": {"kind": "adamw"}, "data": {"tokenizer": {"kind": "bytes"}}}
_MODEL_DEFAULTS: dict[str, Any] = {"norm": {"kind": "rmsnorm"}, "attention": {"kind": "gqa"}}


def validate(cls: type[C], data: Any, where: str) -> C:
    """`data` as a `cls`, or one message that lists each wrong field with its value.

    Raises:
        UserError: unknown key, wrong type, impossible combination.
    """
    try:
        return cls.model_validate_json(_json(data, where))  # JSON mode: strict, yet lists become tuples and 1 a float
    except ValidationError as error:
        lines = explain(cls, data, error)
        raise UserError("\n".join(f"{where}: {line}" for line in lines)) from None


def load_run(name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run config from a shipped name (`tiny`) or a YAML path, with `a.b.c=value` overrides.

    Raises:
        UserError: unknown name, bad YAML, bad override, or an invalid config.
    """
    path = find("train", str(name), "config")
    data = read_yaml(path)
    return run_from_data(data, overrides, where=str(name))


def run_from_data(data: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config") -> RunConfig:
    """A run config from plain data as a file holds it; `base:` names a config it starts from, `model:` may be a
    name.

    Overrides that choose a base or a model come first whatever their order, then a style (`style=gemma3`, short for
    `model.style=gemma3`), then those that adjust.
    """
    parsed = [parse_override(text) for text in overrides]
    parsed = [(("model", *keys), value) if keys == ("style",) else (keys, value) for keys, value in parsed]
    style = [item for item in parsed if item[0] == ("model", "style")]
    choose = [item for item in parsed if item[0] in (("base",), ("model",), ("model", "base"))]
    adjust = [item for item in parsed if item not in choose and item not in style]
    data = dict(data)
    for keys, value in [*choose, *style]:
        data = apply_override(data, keys, value)
    data = merge(_RUN_DEFAULTS, _resolve_base(data, where))
    if "model" in data:
        data["model"] = model_data(data["model"])
    for keys, value in adjust:
        if keys[0] == "train" and len(keys) == 2 and keys[1] in HORIZONS:
            data = _replace_horizon(
                data, [k[1] for k, v in adjust if k[0] == "train" and len(k) == 2 and v is not None]
            )
        data = apply_override(data, keys, value)
    from llamax.config.run import RunConfig  # a tenth of the time in which `llamax model list` answers without it

    return validate(RunConfig, data, where)


def _replace_horizon(data: dict[str, Any], given: list[str]) -> dict[str, Any]:
    """Setting one horizon on the command line takes the place of the file's; two on the command line stay an error."""
    train = data.get("train")
    if not isinstance(train, Mapping):
        return data
    return {**data, "train": {k: v for k, v in train.items() if k in given or k not in HORIZONS}}


def _resolve_base(data: dict[str, Any], where: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    base = data.pop("base", None)
    if base is None:
        return data
    if base in seen:
        raise UserError(f"{where}: base {base!r} leads back to itself; remove the loop {' -> '.join((*seen, base))}")
    below = _resolve_base(read_yaml(find("train", str(base), "config")), str(base), (*seen, base))
    if isinstance(below.get("model"), str) and isinstance(data.get("model"), Mapping):
        below["model"] = {"base": below["model"]}
    if isinstance(data.get("model"), Mapping) and "base" in data["model"]:
        below.pop("model", None)
    train = data.get("train")
    if isinstance(train, Mapping) and any(horizon in train for horizon in HORIZONS):
        below = _replace_horizon(below, [])
    return merge(below, data)


# ---------------------------------------------------------------- models
def model_data(model: Any) -> dict[str, Any]:
    """Plain model data from a name, or from a mapping whose `base:` is a name.

    `style:` in the mapping rebuilds all of it in a family's style but what `style.KEPT` names, so that its other
    architecture fields give way; to change a styled model name it as the base (`base: ladder/d64@gemma3`).
    """
    if isinstance(model, str):
        model = {"base": model}
    if not isinstance(model, Mapping):
        raise UserError(f"model: expected a name such as llama3/8b or a mapping, found {model!r}")
    own = dict(model)
    base, style = own.pop("base", None), own.pop("style", None)
    below = merge(_MODEL_DEFAULTS, named_model(base)) if base is not None else _MODEL_DEFAULTS
    data = merge(below, own)
    return data if style is None else merge(_MODEL_DEFAULTS, restyle(data, base, style))


def named_model(name: str) -> dict[str, Any]:
    """The data of one shipped model: `ladder/d64`, `ladder/d64@gemma3`, `llama3/8b`, or a hub id such as
    `meta-llama/Meta-Llama-3-8B`.

    Raises:
        UserError: unknown family, size or hub id, or a size that was announced and never released.
    """
    data = ladder_model(name)
    if data is not None:
        return data
    found = find_size(name)
    if found is None:
        raise UserError(unknown("model", name, model_names()))
    shared, own = size_model(*found)
    return merge(shared, own)


def model_names() -> list[str]:
    """Every shipped model, `family/size`, ladders last; none that was only announced."""
    return card_names() + ladder_names()


def load_model(name: str) -> ModelConfig:
    """One shipped model by name. Raises UserError if it is not known."""
    return validate(ModelConfig, model_data(name), name)


def load_corpus(name: str) -> Corpus:
    """A corpus by name (configs/corpora) or YAML path. Raises UserError."""
    from llamax.config.run import Corpus

    return validate(Corpus, read_yaml(find("corpora", name, "corpus")), name)


def dump_yaml(config: Frozen) -> str:
    """The resolved config as YAML, every field present, in the order the sections are declared."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False, width=100)


def diff(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The dotted fields in which two resolved configs differ, with both values (None where absent)."""
    rows: list[tuple[str, Any, Any]] = []
    for key in [*a, *(k for k in b if k not in a)]:
        left, right, path = a.get(key), b.get(key), f"{prefix}{key}"
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            rows += diff(left, right, path + ".")
        elif left != right:
            rows.append((path, left, right))
    return rows


# ---------------------------------------------------------------- messages
def _json(data: Any, where: str) -> str:
    try:
        return json.dumps(data, allow_nan=False)
    except (TypeError, ValueError):
        path, value = _not_plain(data, ())
        raise UserError(
            f"{where}: {'.'.join(path)} = {value!r} cannot be in a config; use finite numbers, text, lists and mappings"
        ) from None


def _not_plain(node: Any, path: tuple[str, ...]) -> tuple[tuple[str, ...], Any]:
    """The first value that JSON cannot hold (infinity, NaN, a date), with its path."""
    inside = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, item in inside:
        try:
            json.dumps(item, allow_nan=False)
        except (TypeError, ValueError):
            return _not_plain(item, (*path, str(key)))
    return path, node
