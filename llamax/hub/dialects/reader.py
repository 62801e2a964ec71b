"""Reading a transformers config.json: every field typed, bounded, and with transformers' own default."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llamax.errors import UserError

MAX_LAYERS = 512  # the deepest published model has 126
_MISSING: Any = object()


class Hf:
    """The fields of a config.json. `defaults` are those of transformers for this model_type: hub files leave fields
    out that equal them."""

    def __init__(self, data: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.data, self.where, self.defaults = data, where, dict(defaults or {})

    def refuse(self, field: str, value: Any, fix: str) -> UserError:
        """The error for a value that we cannot take."""
        shown = repr(value)
        return UserError(f"{self.where}: {field} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {fix}")

    def get(self, *names: str) -> Any:
        """The first of these fields (spellings of one) that the file gives, null too; else transformers' default."""
        for source in (self.data, self.defaults):
            for name in names:
                if name in source:
                    return source[name]
        return None

    def count(self, *names: str, default: Any = _MISSING) -> int:
        """A positive integer; `default` where the field is null or absent."""
        value = self.get(*names)
        if value is None and default is not _MISSING:
            return default
        if value is None:
            raise UserError(f"{self.where}: {names[0]} is missing; give it")
        if type(value) is not int or not 0 < value < 2**40:
            raise self.refuse(names[0], value, "give a positive integer")
        return value

    def number(self, *names: str, default: Any = _MISSING) -> float:
        """A positive finite number; `default` where the field is null or absent."""
        value = self.get(*names)
        if value is None and default is not _MISSING:
            return default
        if value is None:
            raise UserError(f"{self.where}: {names[0]} is missing; give it")
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.refuse(names[0], value, "give a positive number")
        return float(value)

    def flag(self, *names: str) -> bool:
        """A truth value; null and absence are false. An integer counts as one (early Llama 4 files)."""
        value = self.get(*names)
        if value is not None and type(value) not in (bool, int):
            raise self.refuse(names[0], value, "give true or false")
        return bool(value)

    def choice(self, name: str, table: Mapping[Any, Any]) -> Any:
        """The meaning of a field that has one of a few values."""
        value = self.get(name)
        if not isinstance(value, str | int | float | None) or value not in table:
            raise self.refuse(name, value, f"llamax has only {', '.join(map(str, table))} here")
        return table[value]

    def mapping(self, name: str) -> dict[str, Any]:
        """A nested object, empty where it is null or absent."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(name, value, "give an object of fields")
        return dict(value or {})

    def sequence(self, name: str) -> list[Any] | None:
        """A list, None where it is null or absent."""
        value = self.get(name)
        if value is not None and not isinstance(value, list):
            raise self.refuse(name, value, "give a list")
        return value

    @property
    def layers(self) -> int:
        """Number of decoder layers, bounded: everything a layer is made of is built before a tensor is looked at."""
        layers = self.count("num_hidden_layers", "n_layers")
        if layers > MAX_LAYERS:
            raise self.refuse("num_hidden_layers", layers, f"at most {MAX_LAYERS} layers are read")
        return layers

    def per_layer(self, name: str, table: Mapping[Any, Any], default: Sequence[Any]) -> list[Any]:
        """One meaning a layer from a list of values, or `default` where the file has none.

        A longer list is cut, as transformers does.
        """
        values = self.sequence(name)
        if not values:
            return list(default)
        if len(values) < len(default):
            raise self.refuse(name, values, f"it has {len(values)} entries for {len(default)} layers")
        for value in values:
            if not isinstance(value, str | int) or value not in table:
                raise self.refuse(name, value, f"a layer is one of {', '.join(map(str, table))}")
        return [table[value] for value in values[: len(default)]]


# ---------------------------------------------------------------- rotary embedding
_ROPE_FIELDS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
    "short_factor", "long_factor", "short_mscale", "long_mscale", "truncate", "finetuned",
}  # fmt: skip
_KINDS = {"default": None, "linear": "linear", "llama3": "llama3", "yarn": "yarn", "longrope": "longrope"}
_KINDS |= {"su": "longrope"}  # the first name of Phi-3's


def read_rope(
    hf: Hf,
    *,
    layer_type: str | None = None,
    layout: str = "half",
    partial: bool = False,
    mscale: bool = False,
    local: bool = False,
) -> dict[str, Any]:
    """The `position` of a config in either spelling: rope_theta and rope_scaling, or rope_parameters (transformers 5).

    `layer_type` chooses in a rope_parameters nested by it; `partial` and `mscale` say that the family honours
    partial_rotary_factor and YaRN's mscale pair; `local` reads Gemma 3's rope_local_base_freq instead.
    """
    fields = hf.mapping("rope_parameters")
    nested = fields.get(layer_type) if layer_type else None
    if isinstance(nested, dict):
        fields = nested
    elif any(isinstance(value, dict) for value in fields.values()):
        raise hf.refuse("rope_parameters", sorted(fields), f"one set of parameters, or one for {layer_type}, is read")
    scaling = {} if local else hf.mapping("rope_scaling")
    inner = Hf({**fields, **scaling}, f"{hf.where}: rope_scaling")
    if unknown := sorted(set(inner.data) - _ROPE_FIELDS):
        raise inner.refuse(unknown[0], inner.data[unknown[0]], "llamax has no rotary embedding with this field")
    theta = inner.number("rope_theta", default=None)
    if theta is None:
        theta = hf.number("rope_local_base_freq" if local else "rope_theta", default=10000.0)
    fraction = inner.number("partial_rotary_factor", default=None) or hf.number("partial_rotary_factor", default=1.0)
    if fraction != 1.0 and not partial:
        raise hf.refuse("partial_rotary_factor", fraction, "this family turns whole heads; set 1.0")
    return {
        "kind": "rope",
        "theta": theta,
        "fraction": fraction,
        "layout": layout,
        "scaling": _scaling(hf, inner, mscale),
    }


def _scaling(hf: Hf, inner: Hf, mscale: bool) -> dict[str, Any] | None:
    name = "rope_type" if inner.get("rope_type") is not None else "type"
    kind = inner.choice(name, _KINDS) if inner.get(name) is not None else None
    if kind is None:
        return None
    scaling: dict[str, Any] = {"kind": kind}
    longest = hf.count("max_position_embeddings", "max_seq_len")
    original = hf.count("original_max_position_embeddings", default=None)
    original = original or inner.count("original_max_position_embeddings", default=longest)
    if kind == "longrope":
        return _longrope(inner, longest, original)
    if inner.get("attention_factor") is not None:
        raise inner.refuse("attention_factor", inner.get("attention_factor"), "llamax computes it; remove it")
    if kind == "yarn":
        scaling["factor"] = inner.number("factor", default=longest / original)
        scaling |= {"beta_fast": inner.number("beta_fast", default=32.0)}
        scaling |= {"beta_slow": inner.number("beta_slow", default=1.0), "original_max_len": original}
        if inner.get("truncate") is False:
            raise inner.refuse("truncate", False, "llamax rounds YaRN's ramp outwards; set true")
        pair = [inner.get("mscale"), inner.get("mscale_all_dim")]
        if pair != [None, None]:
            if not mscale or None in pair:
                raise inner.refuse("mscale", pair, "mscale and mscale_all_dim come together, and with latent attention")
            scaling |= {"mscale": inner.number("mscale"), "mscale_all_dim": inner.number("mscale_all_dim")}
        return scaling
    scaling["factor"] = inner.number("factor")
    if kind == "llama3":
        scaling |= {name: inner.number(name) for name in ("low_freq_factor", "high_freq_factor")}
        scaling["original_max_len"] = original
    return scaling


def _longrope(inner: Hf, longest: int, original: int) -> dict[str, Any]:
    """cos and sin are multiplied by sqrt(1 + ln(factor) / ln(original)); a file that gives the product itself
    (attention_factor, or Phi-3.5-MoE's pair of mscales) gives the factor by it."""
    factor = inner.number("factor", default=max(longest / original, 1.0))
    pair = [inner.number(name, default=None) for name in ("short_mscale", "long_mscale")]
    if pair[0] != pair[1]:
        raise inner.refuse("short_mscale", pair, "short_mscale and long_mscale must be equal")
    if (product := inner.number("attention_factor", default=pair[0])) is not None:
        if not 1.0 <= product < 100.0 or original < 2:
            raise inner.refuse("attention_factor", product, "give a number from 1 to 100")
        exponent = (product * product - 1.0) * math.log(original)
        if exponent > 700.0:
            raise inner.refuse("attention_factor", product, "give a smaller number")
        factor = math.exp(exponent)
    return {
        "kind": "longrope",
        "short": inner.sequence("short_factor") or [],
        "long": inner.sequence("long_factor") or [],
        "original_max_len": original,
        "factor": factor,
    }
