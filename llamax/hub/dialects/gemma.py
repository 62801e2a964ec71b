"""Gemma 1, 2 and 3 (text): (1 + w) norms, scaled embeddings, gated GELU; windows and caps from 2 on, QK norm in 3."""

from __future__ import annotations

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
    layer_types,
    mlp_rows,
    norm_rows,
    rms,
    rope_fields,
    top_rows,
    windows,
)
from llamax.hub.dialects.reader import Hf, read_rope

FIXED = {"use_bidirectional_attention": (None, False)}
PLAIN = {
    "vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
}  # fmt: skip
SANDWICH = top_rows() + attention_rows() + mlp_rows() + norm_rows(
    attention_norm="input_layernorm", attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm", mlp_out_norm="post_feedforward_layernorm",
)  # fmt: skip


def _norm(hf: Hf) -> Data:
    return rms(hf, weight="one_plus")


def _attention(hf: Hf, **other: Any) -> Data:
    bias = hf.flag("attention_bias")
    return gqa(hf, qkv_bias=bias, out_bias=bias, **other)


def _fields(config: ModelConfig) -> Data:
    last = config.layers[-1]
    return gqa_fields(config) | {
        "intermediate_size": getattr(last.mlp, "d_ff", None),
        "rms_norm_eps": getattr(config.norm, "eps", None),
        "attention_bias": getattr(last.attention, "out_bias", None),
    }


# ---------------------------------------------------------------- gemma
def _gemma(hf: Hf) -> Data:
    # Early files say `gelu` and mean the tanh form, which transformers also runs.
    act = "hidden_activation" if hf.data.get("hidden_activation") is not None else "hidden_act"
    mlp = {"kind": hf.choice(act, {"gelu_pytorch_tanh": "geglu", "gelu": "geglu", None: "geglu"}),
           "d_ff": hf.count("intermediate_size")}  # fmt: skip
    one = block(_attention(hf), read_rope(hf), mlp, _norm(hf))
    return assemble(hf, "gemma", [one] * hf.layers, norm=_norm(hf), embedding_scale="sqrt_d_model")


def _gemma_hf(config: ModelConfig) -> Data:
    last = config.layers[-1]
    act = ACTS.get(last.mlp.kind)
    return _fields(config) | {"hidden_act": act, "hidden_activation": act, **rope_fields(config, last.position)}


GEMMA = Dialect(
    "gemma", "GemmaForCausalLM", _gemma, _gemma_hf,
    top_rows() + attention_rows() + mlp_rows()
    + norm_rows(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    {**PLAIN, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
     "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
    FIXED,
)  # fmt: skip


# ---------------------------------------------------------------- gemma2, gemma3
def _scale(hf: Hf) -> float:
    return hf.number("query_pre_attn_scalar") ** -0.5


def _scalar(config: ModelConfig) -> float | int | None:
    """query_pre_attn_scalar, which is a whole number in every published file, from the factor on the logits."""
    scale = getattr(config.layers[-1].attention, "scale", None)
    if scale is None:
        return config.layers[-1].attention.head_dim
    return round(scale**-2) if round(scale**-2) ** -0.5 == scale else scale**-2


def _capped(hf: Hf, name: str, sliding: list[bool], positions: dict[bool, Data], qk_norm: Data | None) -> Data:
    cap = hf.number("attn_logit_softcapping", default=None)
    attention = _attention(hf, scale=_scale(hf), softcap=cap, qk_norm=qk_norm)
    mlp = gated(hf, act="hidden_activation")
    blocks = [
        block({**attention, "window": window}, positions[window is not None], mlp, _norm(hf), placement="sandwich")
        for window in windows(hf, sliding)
    ]
    head = {"softcap": hf.number("final_logit_softcapping", default=None)}
    return assemble(hf, name, blocks, norm=_norm(hf), embedding_scale="sqrt_d_model", head=head)


def _capped_fields(config: ModelConfig) -> Data:
    return _fields(config) | layer_types(config) | {
        "hidden_activation": ACTS.get(config.layers[-1].mlp.kind),
        "query_pre_attn_scalar": _scalar(config),
        "attn_logit_softcapping": getattr(config.layers[-1].attention, "softcap", None),
        "final_logit_softcapping": config.head.softcap,
    }  # fmt: skip


def _gemma2(hf: Hf) -> Data:
    position = read_rope(hf)
    alternate = [i % 2 == 0 for i in range(hf.layers)]
    return _capped(hf, "gemma2", alternate, {True: position, False: position}, None)


def _gemma2_hf(config: ModelConfig) -> Data:
    return _capped_fields(config) | rope_fields(config, config.layers[-1].position)


GEMMA2 = Dialect(
    "gemma2", "Gemma2ForCausalLM", _gemma2, _gemma2_hf, SANDWICH,
    {**PLAIN, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
     "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
     "final_logit_softcapping": 30.0},
    FIXED,
)  # fmt: skip


def _gemma3(hf: Hf) -> Data:
    pattern = hf.count("sliding_window_pattern", "_sliding_window_pattern", default=6)
    positions = {
        True: read_rope(hf, layer_type="sliding_attention", local=True),
        False: read_rope(hf, layer_type="full_attention"),
    }
    sliding = [(i + 1) % pattern != 0 for i in range(hf.layers)]
    return _capped(hf, "gemma3_text", sliding, positions, _norm(hf))


def _gemma3_hf(config: ModelConfig) -> Data:
    layers = config.layers
    local = next((layer.position for layer in layers if getattr(layer.attention, "window", None)), None)
    everywhere = next((layer.position for layer in layers if not getattr(layer.attention, "window", None)), None)
    fields = _capped_fields(config) | rope_fields(config, everywhere)
    theta = rope_fields(config, local).get("rope_theta")
    return fields | ({"rope_local_base_freq": theta} if theta else {})


GEMMA3 = Dialect(
    "gemma3_text", "Gemma3ForCausalLM", _gemma3, _gemma3_hf, SANDWICH,
    {**PLAIN, "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
     "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072,
     "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": None,
     "final_logit_softcapping": None, "rope_theta": 1e6, "rope_local_base_freq": 10000.0},
    FIXED | {"attn_logit_softcapping": (None,)},  # transformers reads it and caps nothing
)  # fmt: skip

DIALECTS = (GEMMA, GEMMA2, GEMMA3)
