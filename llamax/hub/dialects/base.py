"""What a dialect is, and what all of them share: blocks to segments, rotary embeddings and components back to fields.

A dialect translates one transformers model_type: its config.json both ways, and its tensors by one table. Nothing else
in llamax knows a family's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamax.config.components import Rope
from llamax.config.load import validate
from llamax.config.model import Block, ModelConfig
from llamax.hub.dialects.reader import Hf
from llamax.hub.layouts import FLAT, SAME, Row

Data = dict[str, Any]


@dataclass(frozen=True)
class Dialect:
    """One model_type. `fixed` lists fields that must have one of a few values because llamax has no other; `ignored`
    are patterns of tensors that hold no weight of ours."""

    name: str
    architecture: str
    to_model: Callable[[Hf], Data]
    to_hf: Callable[[ModelConfig], Data]
    rows: tuple[Row, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)


# ---------------------------------------------------------------- config: from the hub
def assemble(
    hf: Hf,
    dialect: str,
    blocks: Sequence[Data],
    *,
    norm: Data,
    embedding_scale: str | float = "none",
    head: Data | None = None,
    mtp: int = 0,
) -> Data:
    """Model data from one block a layer: the commonest block is the model's own, segments say where another is."""
    full = [validate(Block, block, hf.where).as_dict() for block in blocks]
    own = max(full, key=lambda block: (full.count(block), -full.index(block)))
    return {
        "vocab_size": hf.count("vocab_size"),
        "d_model": hf.count("hidden_size", "d_model"),
        "max_seq_len": hf.count("max_position_embeddings", "max_seq_len"),
        "segments": segments([difference(own, block) for block in full]),
        **own,
        "norm": norm,
        "embedding": {"scale": embedding_scale},
        "head": {"tied": hf.flag("tie_word_embeddings"), **(head or {})},
        "mtp": mtp,
        "dialect": dialect,
        "init": {"kind": "normal", "std": hf.number("initializer_range", default=0.02), "depth_scaling": "none"},
    }


def block(attention: Data, position: Data, mlp: Data, norm: Data, **other: Any) -> Data:
    """A block, pre-norm and sequential unless `other` says so."""
    return {
        "attention": attention, "position": position, "mlp": mlp, "branch": None, "norm": norm,
        "placement": "pre", "residual": "sequential", **other,
    }  # fmt: skip


def difference(own: Mapping[str, Any], other: Mapping[str, Any]) -> Data:
    """What to merge over `own` to get `other` (both complete); a component of another kind comes whole."""
    found: Data = {}
    for key, value in other.items():
        mine = own.get(key)
        if isinstance(mine, dict) and isinstance(value, dict) and mine.get("kind") == value.get("kind"):
            value = difference(mine, value)
            if value:
                found[key] = value
        elif mine != value:
            found[key] = value
    return found


def segments(parts: Sequence[Data]) -> list[Data]:
    """A list of blocks as few, short repeated units: the cheapest cut, a unit costing its length and a segment one.

    Five local layers and one global one, ten times, then two local ones: [10 x 6 blocks, 2 x 1 block].
    """
    n = len(parts)
    ids = [next(i for i, other in enumerate(parts) if other == part) for part in parts]
    best: list[tuple[int, int, int]] = [(0, 0, 0)] + [(10**9, 0, 0)] * n  # (cost, unit, repeat) of the first k layers
    for start in range(n):
        for unit in range(1, min(n - start, 64) + 1):
            repeat = 1
            while True:
                end = start + unit * repeat
                best[end] = min(best[end], (best[start][0] + unit + 1, unit, repeat))
                if end + unit > n or ids[end : end + unit] != ids[start : start + unit]:
                    break
                repeat += 1
    cuts: list[Data] = []
    end = n
    while end:
        _, unit, repeat = best[end]
        start = end - unit * repeat
        cuts.append({"repeat": repeat, "unit": list(parts[start : start + unit])})
        end = start
    return cuts[::-1]


def gqa(hf: Hf, *, head_dim: int | None = None, **other: Any) -> Data:
    """Grouped-query attention from the fields that nearly all families spell alike."""
    heads = hf.count("num_attention_heads", "n_heads")
    width = hf.count("hidden_size", "d_model")
    if head_dim is None:
        head_dim = hf.count("head_dim", default=None)
    if head_dim is None and width % heads:
        raise hf.refuse("num_attention_heads", heads, f"hidden_size={width} is not a multiple of it; give head_dim")
    kv_heads = hf.count("num_key_value_heads", default=heads)
    return {"kind": "gqa", "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim or width // heads, **other}


def rms(hf: Hf, **other: Any) -> Data:
    """An RMSNorm of the config's eps."""
    return {"kind": "rmsnorm", "eps": hf.number("rms_norm_eps"), **other}


GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "relu": "reglu"}


def gated(hf: Hf, *names: str, bias: bool = False, act: str = "hidden_act") -> Data:
    """A gated feed-forward block whose width is the field `names` (default intermediate_size)."""
    return {"kind": hf.choice(act, GATED), "d_ff": hf.count(*(names or ("intermediate_size",))), "bias": bias}


SLIDING = {"sliding_attention": True, "full_attention": False}


def windows(hf: Hf, default: Sequence[bool], used: bool = True) -> list[int | None]:
    """The window of each layer: sliding_window where layer_types (or `default`) says so."""
    sliding = hf.per_layer("layer_types", SLIDING, default)
    window = hf.get("sliding_window") if used else None
    if any(sliding) and window is None:
        sliding = [False] * len(sliding)
    return [hf.count("sliding_window") if slides else None for slides in sliding]


# ---------------------------------------------------------------- config: to the hub
def common_fields(config: ModelConfig) -> Data:
    """The fields every family writes, from the model and its last block."""
    last = config.layers[-1]
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": last.attention.heads,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.head.tied,
        "initializer_range": config.init.std,
    }


def gqa_fields(config: ModelConfig) -> Data:
    """`common_fields` with what grouped-query attention adds."""
    attention = config.layers[-1].attention
    return common_fields(config) | {
        "num_key_value_heads": getattr(attention, "kv_heads", None),
        "head_dim": attention.head_dim,
    }


ACTS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "reglu": "relu"}


def rope_fields(config: ModelConfig, rope: Any, *, partial: bool = False, outside: bool = False) -> Data:
    """rope_theta and rope_scaling, the spelling that every version reads. `outside`: the original length stands beside
    rope_scaling (Phi-3)."""
    if not isinstance(rope, Rope):
        return {}
    fields: Data = {"rope_theta": rope.theta}
    if partial:
        fields["partial_rotary_factor"] = rope.fraction
    if rope.scaling is None:
        return fields | ({"original_max_position_embeddings": config.max_seq_len} if outside else {})
    scaling = {key: value for key, value in rope.scaling.as_dict().items() if value is not None}
    kind = scaling.pop("kind")
    names = {
        "original_max_len": "original_max_position_embeddings", "short": "short_factor", "long": "long_factor",
    }  # fmt: skip
    fields["rope_scaling"] = {"rope_type": kind, "type": kind, **{names.get(k, k): v for k, v in scaling.items()}}
    if outside:
        original = fields["rope_scaling"].pop("original_max_position_embeddings", config.max_seq_len)
        fields["original_max_position_embeddings"] = original
        if fields["rope_scaling"].get("factor") == max(config.max_seq_len / original, 1.0):
            del fields["rope_scaling"]["factor"]
    return fields


def layer_types(config: ModelConfig) -> Data:
    """sliding_window and layer_types of a model whose layers differ in their window."""
    found = [getattr(layer.attention, "window", None) for layer in config.layers]
    window = next((w for w in found if w is not None), None)
    names = {True: "sliding_attention", False: "full_attention"}
    return {"sliding_window": window, "layer_types": [names[w is not None] for w in found]}


# ---------------------------------------------------------------- tensors
LAYER = "model.layers.{layer}."


def layer_rows(*rows: tuple[str, str] | Row, prefix: str = LAYER) -> tuple[Row, ...]:
    """Rows of a block from (hub name after the prefix, our path): a .bias is flat, a norm the same, else a matrix."""
    found = []
    for row in rows:
        if isinstance(row, Row):
            found.append(row._replace(hub=prefix + row.hub))
        else:
            hub, ours = row
            norm = ours.endswith((".scale", ".bias"))
            layout = SAME if norm else FLAT if ours.endswith("_bias") else None
            found.append(Row(prefix + hub, (ours,), layout) if layout else Row(prefix + hub, (ours,)))
    return tuple(found)


def top_rows(norm: str = "model.norm", embedding: str = "model.embed_tokens") -> tuple[Row, ...]:
    """The rows outside the blocks."""
    return (
        Row(f"{embedding}.weight", ("embedding",), SAME),
        Row(f"{norm}.weight", ("norm.scale",), SAME),
        Row(f"{norm}.bias", ("norm.bias",), SAME),
        Row("lm_head.weight", ("head",)),
        Row("lm_head.bias", ("head_bias",), SAME),
    )


def attention_rows(out: str = "o_proj") -> tuple[Row, ...]:
    """Projections with their biases, and norms of queries and keys, as nearly all families name them."""
    return layer_rows(
        ("self_attn.q_proj.weight", "attention.query"),
        ("self_attn.k_proj.weight", "attention.key"),
        ("self_attn.v_proj.weight", "attention.value"),
        (f"self_attn.{out}.weight", "attention.out"),
        ("self_attn.q_proj.bias", "attention.query_bias"),
        ("self_attn.k_proj.bias", "attention.key_bias"),
        ("self_attn.v_proj.bias", "attention.value_bias"),
        (f"self_attn.{out}.bias", "attention.out_bias"),
        ("self_attn.q_norm.weight", "attention.query_norm.scale"),
        ("self_attn.k_norm.weight", "attention.key_norm.scale"),
    )


def norm_rows(**names: str) -> tuple[Row, ...]:
    """Norms of a block: our name = the hub's; scale and bias."""
    pairs = [(f"{hub}.{end}", f"{ours}.{part}") for ours, hub in names.items() for end, part in _ENDS]
    return layer_rows(*pairs)


_ENDS = (("weight", "scale"), ("bias", "bias"))


def mlp_rows(
    theirs: str = "mlp", ours: str = "mlp", names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Row, ...]:
    """A gated feed-forward block (of every expert where `theirs` has {expert})."""
    parts = [(f"{theirs}.{hub}", f"{ours}.{part}") for hub, part in zip(names, ("gate", "up", "down"), strict=True)]
    weights = layer_rows(*((f"{hub}.weight", part) for hub, part in parts))
    biases = layer_rows(*((f"{hub}.bias", f"{part}_bias") for hub, part in parts))
    return weights + (() if "{expert}" in theirs else biases)
