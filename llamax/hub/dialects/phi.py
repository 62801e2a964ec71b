"""Phi-1, 1.5 and 2 (parallel, LayerNorm, biases everywhere), Phi-3 (fused projections), Phi-3.5-MoE (SparseMixer)."""

from __future__ import annotations

import math
from typing import Any

from llamax.config.model import ModelConfig
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
from llamax.hub.layouts import MATRIX, Row


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

DIALECTS = (PHI, PHI3, PHIMOE)
