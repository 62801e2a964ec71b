"""Phi-1, 1.5 and 2 (parallel, LayerNorm, biases everywhere), Phi-3 (fused projections), Phi-3-small (block-sparse
attention, GEGELU, muP factors), Phi-3.5-MoE (SparseMixer)."""

from __future__ import annotations

import math
from typing import Any

from llamax.config.components import Rope
from llamax.config.model import ModelConfig
from llamax.config.rotary import RopeLinear, RopeLongrope
from llamax.hub.dialects.base import (
    ACTS,
    Data,
    Dialect,
    assemble,
    attention_rows,
    block,
    gated,
    gqa,
    gqa_fields,
    layer_rows,
    norm_rows,
    rms,
    rope_fields,
    top_rows,
)
from llamax.hub.dialects.llama import MIXTRAL_EXPERTS, NORMS, routed
from llamax.hub.dialects.reader import Hf, read_rope
from llamax.hub.layouts import DEALT, DEALT_FLAT, MATRIX, Row


# ---------------------------------------------------------------- phi
def _phi(hf: Hf) -> Data:
    norm = {"kind": "layernorm", "eps": hf.number("layer_norm_eps"), "bias": True}
    attention = gqa(hf, qkv_bias=True, out_bias=True, qk_norm=norm if hf.flag("qk_layernorm") else None)
    kind = hf.choice("hidden_act", {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "silu": "silu"})
    mlp = {"kind": kind, "d_ff": hf.count("intermediate_size"), "bias": True}
    one = block(attention, read_rope(hf, partial=True), mlp, norm, residual="parallel")
    return assemble(hf, "phi", [one] * hf.layers, norm=norm, head={"bias": True})


def _phi_hf(config: ModelConfig) -> Data:
    last = config.layers[-1]
    return gqa_fields(config) | {
        "hidden_act": {"gelu": "gelu_new"}.get(last.mlp.kind, last.mlp.kind),
        "intermediate_size": getattr(last.mlp, "d_ff", None),
        "layer_norm_eps": getattr(config.norm, "eps", None),
        "qk_layernorm": getattr(last.attention, "qk_norm", None) is not None,
        **rope_fields(config, last.position, partial=True),
    }


_PHI_ROWS = layer_rows(
    ("mlp.fc1.weight", "mlp.up"),
    ("mlp.fc2.weight", "mlp.down"),
    ("mlp.fc1.bias", "mlp.up_bias"),
    ("mlp.fc2.bias", "mlp.down_bias"),
    ("self_attn.q_layernorm.weight", "attention.query_norm.scale"),
    ("self_attn.q_layernorm.bias", "attention.query_norm.bias"),
    ("self_attn.k_layernorm.weight", "attention.key_norm.scale"),
    ("self_attn.k_layernorm.bias", "attention.key_norm.bias"),
)
_SIZES = {"tie_word_embeddings": False, "max_position_embeddings": 2048, "num_attention_heads": 32}
PHI = Dialect(
    "phi", "PhiForCausalLM", _phi, _phi_hf,
    top_rows("model.final_layernorm") + norm_rows(attention_norm="input_layernorm") + _PHI_ROWS
    + tuple(row for row in attention_rows("dense") if "norm" not in row.hub),
    {**_SIZES, "vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
     "hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
)  # fmt: skip


# ---------------------------------------------------------------- phi3
def _phi3(hf: Hf) -> Data:
    attention = gqa(hf, window=hf.count("sliding_window", default=None))
    one = block(attention, read_rope(hf, partial=True), gated(hf), rms(hf))
    return assemble(hf, "phi3", [one] * hf.layers, norm=rms(hf))


def _phi3_hf(config: ModelConfig) -> Data:
    last = config.layers[-1]
    return gqa_fields(config) | {
        "hidden_act": ACTS.get(last.mlp.kind),
        "intermediate_size": getattr(last.mlp, "d_ff", None),
        "rms_norm_eps": getattr(config.norm, "eps", None),
        "sliding_window": getattr(last.attention, "window", None),
        "pad_token_id": None,  # transformers' own default lies outside a small vocabulary
        **rope_fields(config, last.position, partial=True, outside=True),
    }


_FUSED = layer_rows(
    Row("self_attn.qkv_proj.weight", ("attention.query", "attention.key", "attention.value"), MATRIX),
    ("self_attn.o_proj.weight", "attention.out"),
    Row("mlp.gate_up_proj.weight", ("mlp.gate", "mlp.up"), MATRIX),
    ("mlp.down_proj.weight", "mlp.down"),
)
PHI3 = Dialect(
    "phi3", "Phi3ForCausalLM", _phi3, _phi3_hf, top_rows() + NORMS + _FUSED,
    {**_SIZES, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
     "hidden_act": "silu", "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
     "rms_norm_eps": 1e-5},
)  # fmt: skip


# ---------------------------------------------------------------- phi3small
def _phi3small(hf: Hf) -> Data:
    if dummies := hf.sequence("dummy_token_indices"):
        raise hf.refuse("dummy_token_indices", dummies, "llamax leaves no token out of the logits; remove the field")
    norm = {"kind": "layernorm", "eps": hf.number("layer_norm_epsilon"), "bias": True}
    attention = gqa(hf, qkv_bias=True, out_bias=True)
    if hf.flag("mup_use_scaling"):
        attention["scale"] = hf.number("mup_attn_multiplier") / attention["head_dim"]
    pattern = {
        "size": hf.count("blocksparse_block_size"),
        "local": hf.count("blocksparse_num_local_blocks"),
        "stride": hf.count("blocksparse_vert_stride"),
        "heads": "alike" if hf.flag("blocksparse_homo_head_pattern") else "shifted",
    }
    every = hf.count("dense_attention_every_n_layers", default=None)
    patterns = [None if every and (i + 1) % every == 0 else pattern for i in range(hf.layers)]
    scaling = _small_scaling(hf)
    position = {"kind": "rope", "theta": hf.number("rope_embedding_base"), "scaling": scaling}
    mlp = {
        "kind": hf.choice("hidden_act", {"gegelu": "quick_geglu"}),
        "d_ff": _small_width(hf),
        "bias": True,
        "limit": hf.number("gegelu_limit", default=None),
        "linear": "one_plus",
    }
    width = hf.number("mup_width_multiplier", default=None)
    return assemble(
        hf,
        "phi3small",
        [block({**attention, "block_sparse": found}, position, mlp, norm) for found in patterns],
        norm=norm,
        embedding_scale=hf.number("mup_embedding_multiplier", default="none"),
        head={"scale": None if width is None else 1 / width},
    )


def _small_width(hf: Hf) -> int:
    """The width of the feed-forward block, given, or by a multiple of two thirds of hidden_size."""
    width, multiple = (hf.count(name, default=None) for name in ("ff_intermediate_size", "ff_dim_multiplier"))
    if (width is None) == (multiple is None):
        raise hf.refuse("ff_dim_multiplier", multiple, f"give it or ff_intermediate_size = {width!r}, the other null")
    if width is not None:
        return width
    width = multiple * (hf.count("hidden_size") // 3) * 2
    return -(-width // 256) * 256 if hf.flag("gegelu_pad_to_256") else width


_SMALL_ROPE = {"type", "rope_type", "short_factor", "long_factor", "original_max_position_embeddings"}
_SMALL_ROPE |= {"short_mscale", "long_mscale"}


def _small_scaling(hf: Hf) -> Data | None:
    """LongRoPE whose factors on cos and sin are given one by one, that of short sequences 1 by default; or positions
    multiplied by rope_position_scale, which LongRoPE overrides."""
    inner = Hf(hf.mapping("rope_scaling"), f"{hf.where}: rope_scaling")
    if not inner.data:
        scale = hf.number("rope_position_scale")
        return None if scale == 1.0 else {"kind": "linear", "factor": 1 / scale}
    if unknown := sorted(set(inner.data) - _SMALL_ROPE):
        raise inner.refuse(unknown[0], inner.data[unknown[0]], "this family's LongRoPE has no such field; remove it")
    original = inner.count("original_max_position_embeddings")

    def mscale(name: str, default: float | None) -> float | None:
        return default if inner.get(name) == -1 else inner.number(name, default=default)  # -1 stands for the default

    return {
        "kind": inner.choice(
            "type" if "type" in inner.data else "rope_type", {"longrope": "longrope", "su": "longrope"}
        ),
        "short": inner.sequence("short_factor") or [],
        "long": inner.sequence("long_factor") or [],
        "original_max_len": original,
        "factor": max(hf.count("max_position_embeddings") / original, 1.0),
        "short_mscale": mscale("short_mscale", 1.0),
        "long_mscale": mscale("long_mscale", None),
    }


def _phi3small_hf(config: ModelConfig) -> Data:
    last: Any = config.layers[-1]
    patterns = [getattr(layer.attention, "block_sparse", None) for layer in config.layers]
    pattern = next((found for found in patterns if found is not None), None)
    scale = getattr(last.attention, "scale", None)
    fields = gqa_fields(config) | {
        "hidden_act": "gegelu",
        "ff_intermediate_size": getattr(last.mlp, "d_ff", None),
        "gegelu_limit": getattr(last.mlp, "limit", None),
        "layer_norm_epsilon": getattr(config.norm, "eps", None),
        "mup_use_scaling": scale is not None,
        "mup_attn_multiplier": None if scale is None else scale * last.attention.head_dim,
        "mup_embedding_multiplier": config.embedding.scale if isinstance(config.embedding.scale, float) else None,
        "mup_width_multiplier": _inverse(config.head.scale),
        "dense_attention_every_n_layers": patterns.index(None) + 1 if None in patterns else None,
        **_small_rope_fields(last.position),
    }
    if pattern is not None:
        fields |= {
            "blocksparse_block_size": pattern.size,
            "blocksparse_triton_kernel_block_size": pattern.size,
            "blocksparse_num_local_blocks": pattern.local,
            "blocksparse_vert_stride": pattern.stride,
            "blocksparse_homo_head_pattern": pattern.heads == "alike",
        }
    return {name: value for name, value in fields.items() if name != "head_dim"}


def _small_rope_fields(rope: Any) -> Data:
    scaling = rope.scaling if isinstance(rope, Rope) else None
    factor = scaling.factor if isinstance(scaling, RopeLinear) else 1.0
    fields: Data = {"rope_embedding_base": getattr(rope, "theta", None), "rope_position_scale": _inverse(factor)}
    if isinstance(scaling, RopeLongrope):
        mscales = {"short_mscale": scaling.short_mscale, "long_mscale": scaling.long_mscale}
        fields["rope_scaling"] = {
            "type": "longrope",
            "short_factor": list(scaling.short),
            "long_factor": list(scaling.long),
            "original_max_position_embeddings": scaling.original_max_len,
            **{name: value for name, value in mscales.items() if value is not None},
        }
    return fields


def _inverse(factor: float | None) -> float | None:
    """1 / factor, the whole number where it is one but for rounding."""
    if factor is None:
        return None
    whole = round(1 / factor)
    return float(whole) if whole and 1 / whole == factor else 1 / factor


_SMALL_ROWS = layer_rows(
    Row("self_attn.query_key_value.weight", ("attention.query", "attention.key", "attention.value"), DEALT),
    Row(
        "self_attn.query_key_value.bias",
        ("attention.query_bias", "attention.key_bias", "attention.value_bias"),
        DEALT_FLAT,
    ),
    ("self_attn.dense.weight", "attention.out"),
    ("self_attn.dense.bias", "attention.out_bias"),
    Row("mlp.up_proj.weight", ("mlp.gate", "mlp.up"), DEALT),
    Row("mlp.up_proj.bias", ("mlp.gate_bias", "mlp.up_bias"), DEALT_FLAT),
    ("mlp.down_proj.weight", "mlp.down"),
    ("mlp.down_proj.bias", "mlp.down_bias"),
)
PHI3SMALL = Dialect(
    "phi3small", "Phi3SmallForCausalLM", _phi3small, _phi3small_hf,
    top_rows("model.final_layernorm") + NORMS + _SMALL_ROWS,
    {"vocab_size": 100352, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
     "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": True, "hidden_act": "gegelu",
     "gegelu_limit": 20.0, "gegelu_pad_to_256": True, "ff_intermediate_size": 14336, "layer_norm_epsilon": 1e-5,
     "blocksparse_block_size": 64, "blocksparse_num_local_blocks": 16, "blocksparse_vert_stride": 8,
     "blocksparse_homo_head_pattern": False, "dense_attention_every_n_layers": 2, "rope_embedding_base": 1e6,
     "rope_position_scale": 1.0, "mup_use_scaling": True, "mup_attn_multiplier": 1.0,
     "mup_embedding_multiplier": 10.0, "mup_width_multiplier": 8.0},
)  # fmt: skip


# ---------------------------------------------------------------- phimoe
def _phimoe(hf: Hf) -> Data:
    norm = {"kind": "layernorm", "eps": hf.number("rms_norm_eps"), "bias": True}
    bias = hf.flag("attention_bias")
    router = {"score": "sparsemixer", "normalize": False, "jitter": hf.number("router_jitter_noise")}
    moe = {**routed(hf, **router), "expert": gated(hf)}
    attention = gqa(hf, qkv_bias=bias, out_bias=bias, window=hf.count("sliding_window", default=None))
    one = block(attention, read_rope(hf), moe, norm)
    return assemble(hf, "phimoe", [one] * hf.layers, norm=norm, head={"bias": hf.flag("lm_head_bias")})


def _phimoe_hf(config: ModelConfig) -> Data:
    last: Any = config.layers[-1]
    expert, router = getattr(last.mlp, "expert", None), getattr(last.mlp, "router", None)
    fields = gqa_fields(config) | {
        "hidden_act": ACTS.get(expert.kind if expert else ""),
        "intermediate_size": expert.d_ff if expert else None,
        "num_local_experts": getattr(last.mlp, "experts", None),
        "num_experts_per_tok": getattr(last.mlp, "top_k", None),
        "router_jitter_noise": router.jitter if router else None,
        "input_jitter_noise": 0.0,
        "rms_norm_eps": getattr(config.norm, "eps", None),
        "attention_bias": getattr(last.attention, "out_bias", None),
        "lm_head_bias": config.head.bias,
        "sliding_window": getattr(last.attention, "window", None),
        **rope_fields(config, last.position),
    }
    scaling = fields.get("rope_scaling")
    if scaling and scaling["rope_type"] == "longrope":
        original = scaling["original_max_position_embeddings"]
        product = math.sqrt(1 + math.log(scaling.pop("factor")) / math.log(original))
        scaling |= {"short_mscale": product, "long_mscale": product}
    return fields


PHIMOE = Dialect(
    "phimoe", "PhimoeForCausalLM", _phimoe, _phimoe_hf, top_rows() + attention_rows() + NORMS + MIXTRAL_EXPERTS,
    {**_SIZES, "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32,
     "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
     "rope_theta": 1e6, "num_experts_per_tok": 2, "num_local_experts": 16, "router_jitter_noise": 0.01,
     "attention_bias": False, "lm_head_bias": False},
)  # fmt: skip

DIALECTS = (PHI, PHI3, PHI3SMALL, PHIMOE)
