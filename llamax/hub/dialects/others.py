"""Cohere's Command R and R+, Databricks' DBRX, Snowflake's Arctic, Meta's Llama 4 (text)."""

from __future__ import annotations

import warnings
from typing import Any

from llamax.config.model import ModelConfig
from llamax.hub.dialects.base import (
    ACTS,
    Data,
    Dialect,
    assemble,
    attention_rows,
    block,
    common_fields,
    gated,
    gqa,
    gqa_fields,
    layer_rows,
    mlp_rows,
    norm_rows,
    rms,
    rope_fields,
    top_rows,
)
from llamax.hub.dialects.llama import routed
from llamax.hub.dialects.reader import Hf, read_rope
from llamax.hub.layouts import EXPERTS, MATRIX, ROWS_IN_OUT, ROWS_OUT_IN, SAME, Row


# ---------------------------------------------------------------- cohere
def _cohere(hf: Hf) -> Data:
    bias = hf.flag("attention_bias")
    norm = {"kind": "layernorm", "eps": hf.number("layer_norm_eps"), "bias": False}
    attention = gqa(hf, qkv_bias=bias, out_bias=bias)
    if hf.flag("use_qk_norm"):
        attention |= {"qk_norm": norm, "qk_norm_weights": "per_head"}
    one = block(attention, read_rope(hf, layout="interleaved"), gated(hf), norm, residual="parallel")
    return assemble(hf, "cohere", [one] * hf.layers, norm=norm, head={"scale": hf.number("logit_scale")})


def _cohere_hf(config: ModelConfig) -> Data:
    last = config.layers[-1]
    return gqa_fields(config) | {
        "hidden_act": ACTS.get(last.mlp.kind),
        "intermediate_size": getattr(last.mlp, "d_ff", None),
        "layer_norm_eps": getattr(config.norm, "eps", None),
        "attention_bias": getattr(last.attention, "out_bias", None),
        "use_qk_norm": getattr(last.attention, "qk_norm", None) is not None,
        "logit_scale": 1.0 if config.head.scale is None else config.head.scale,
        **rope_fields(config, last.position),
    }


COHERE = Dialect(
    "cohere", "CohereForCausalLM", _cohere, _cohere_hf,
    top_rows() + attention_rows() + norm_rows(attention_norm="input_layernorm") + mlp_rows(),
    {"vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528, "logit_scale": 0.0625,
     "num_hidden_layers": 40, "num_attention_heads": 64, "hidden_act": "silu", "max_position_embeddings": 8192,
     "layer_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 500000.0},
)  # fmt: skip


# ---------------------------------------------------------------- dbrx
def _dbrx_theta(hf: Hf, attention: Hf) -> float | None:
    """Databricks' code and transformers 4 turn by attn_config.rope_theta; transformers 5 reads the common fields alone.

    The two differ for the published file, so the version that wrote a file decides.
    """
    own = attention.number("rope_theta", default=None)
    if own is None or hf.data.get("rope_parameters") or hf.data.get("rope_theta"):
        return None
    if str(hf.data.get("transformers_version") or "5").split(".")[0] < "5":
        return own
    if own != 10000.0:
        warnings.warn(
            f"{hf.where}: attn_config.rope_theta = {own:g} is not read by transformers 5, which turns by 10000, and "
            "neither here; where the weights were trained with it, add transformers_version = 4.40.0 or rope_theta",
            stacklevel=2,
        )
    return None


def _dbrx(hf: Hf) -> Data:
    inner = Hf(hf.mapping("attn_config"), f"{hf.where}: attn_config", {"kv_n_heads": 1})
    sizes = {"ffn_hidden_size": 3584, "moe_num_experts": 4, "moe_top_k": 1, "moe_normalize_expert_weights": 1.0}
    ffn = Hf(hf.mapping("ffn_config"), f"{hf.where}: ffn_config", sizes)
    act = Hf(ffn.mapping("ffn_act_fn") or {"name": "silu"}, f"{ffn.where}: ffn_act_fn")
    norm = {"kind": "layernorm", "eps": 1e-5, "bias": False}
    attention = gqa(hf, clip=inner.number("clip_qkv", default=None)) | {"kv_heads": inner.count("kv_n_heads")}
    position = read_rope(hf)
    position["theta"] = _dbrx_theta(hf, inner) or position["theta"]
    power = ffn.get("moe_normalize_expert_weights")
    if power not in (None, 1, 1.0):
        raise ffn.refuse("moe_normalize_expert_weights", power, "llamax divides by the sum or not at all: 1 or null")
    moe = {
        "kind": "moe",
        "experts": ffn.count("moe_num_experts"),
        "top_k": ffn.count("moe_top_k"),
        "expert": {"kind": act.choice("name", {"silu": "swiglu"}), "d_ff": ffn.count("ffn_hidden_size")},
        "router": {"normalize": power is not None},
    }
    one = block(attention, position, moe, norm)
    return assemble(hf, "dbrx", [one] * hf.layers, norm=norm)


def _dbrx_hf(config: ModelConfig) -> Data:
    last: Any = config.layers[-1]
    moe = last.mlp
    rope = rope_fields(config, last.position)
    expert = getattr(moe, "expert", None)
    router = getattr(moe, "router", None)
    return {
        "d_model": config.d_model,
        "n_heads": last.attention.heads,
        "n_layers": len(config.layers),
        "max_seq_len": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.head.tied,
        "initializer_range": config.init.std,
        "attn_config": {
            "clip_qkv": getattr(last.attention, "clip", None),
            "kv_n_heads": getattr(last.attention, "kv_heads", None),
            "rope_theta": rope.get("rope_theta"),
        },
        "ffn_config": {
            "hidden_size": config.d_model,
            "ffn_hidden_size": getattr(expert, "d_ff", None),
            "moe_num_experts": getattr(moe, "experts", None),
            "moe_top_k": getattr(moe, "top_k", None),
            "moe_normalize_expert_weights": 1.0 if router is None or router.normalize else None,
            "ffn_act_fn": {"name": "silu"},
        },
        **rope,
    }


_DBRX_ROWS = layer_rows(
    Row("norm_attn_norm.attn.Wqkv.weight", ("attention.query", "attention.key", "attention.value"), MATRIX),
    ("norm_attn_norm.attn.out_proj.weight", "attention.out"),
    ("norm_attn_norm.norm_1.weight", "attention_norm.scale"),
    ("norm_attn_norm.norm_2.weight", "mlp_norm.scale"),
    ("ffn.router.layer.weight", "mlp.router"),
    Row("ffn.experts.mlp.w1", ("mlp.experts.gate",), ROWS_OUT_IN),
    Row("ffn.experts.mlp.v1", ("mlp.experts.up",), ROWS_OUT_IN),
    Row("ffn.experts.mlp.w2", ("mlp.experts.down",), ROWS_IN_OUT),
    prefix="transformer.blocks.{layer}.",
)
DBRX = Dialect(
    "dbrx", "DbrxForCausalLM", _dbrx, _dbrx_hf, top_rows("transformer.norm_f", "transformer.wte") + _DBRX_ROWS,
    {"d_model": 2048, "n_heads": 16, "n_layers": 24, "max_seq_len": 2048, "vocab_size": 32000,
     "tie_word_embeddings": False, "attn_config": {}, "ffn_config": {}},
)  # fmt: skip


# ---------------------------------------------------------------- arctic
def _arctic(hf: Hf) -> Data:
    width = hf.count("residual_mlp_intermediate_size", default=None) or hf.count("hidden_size")
    branch = {**routed(hf), "expert": gated(hf)}
    window = hf.count("sliding_window", default=None)
    mlp = {**gated(hf), "d_ff": width}
    one = block(gqa(hf, window=window), read_rope(hf), mlp, rms(hf), branch=branch)
    return assemble(hf, "arctic", [one] * hf.layers, norm=rms(hf))


def _arctic_hf(config: ModelConfig) -> Data:
    last: Any = config.layers[-1]
    expert = last.branch.expert if last.branch else None
    return gqa_fields(config) | {
        "hidden_act": ACTS.get(expert.kind if expert else last.mlp.kind),
        "intermediate_size": expert.d_ff if expert else None,
        "residual_mlp_intermediate_size": getattr(last.mlp, "d_ff", None),
        "num_local_experts": last.branch.experts if last.branch else None,
        "num_experts_per_tok": last.branch.top_k if last.branch else None,
        "rms_norm_eps": getattr(config.norm, "eps", None),
        "sliding_window": getattr(last.attention, "window", None),
        "moe_layer_frequency": 1,
        "parallel_attn_mlp_res": True,
        "use_residual": True,
        **rope_fields(config, last.position),
    }


ARCTIC = Dialect(
    "arctic", "ArcticForCausalLM", _arctic, _arctic_hf,
    top_rows() + attention_rows()
    + norm_rows(attention_norm="input_layernorm", mlp_norm="residual_layernorm",
                branch_norm="post_attention_layernorm")
    + layer_rows(("block_sparse_moe.gate.weight", "branch.router"))
    + mlp_rows("residual_mlp", names=("w1", "w3", "w2"))
    + mlp_rows("block_sparse_moe.experts.{expert}", "branch.experts", ("w1", "w3", "w2")),
    {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
     "num_attention_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
     "num_local_experts": 8, "num_experts_per_tok": 1, "hidden_act": "silu", "tie_word_embeddings": False},
    {"moe_layer_frequency": (1,), "parallel_attn_mlp_res": (True,), "use_residual": (None, True),
     "attention_bias": (None, False)},
)  # fmt: skip


# ---------------------------------------------------------------- llama 4
_CHUNKED = {"chunked_attention": True, "full_attention": False}


def _llama4(hf: Hf) -> Data:
    layers = range(hf.layers)
    interval, step = hf.count("no_rope_layer_interval"), hf.count("interleave_moe_layer_step")
    rope = hf.per_layer("no_rope_layers", {1: True, 0: False}, [(i + 1) % interval != 0 for i in layers])
    chunked = hf.per_layer("layer_types", _CHUNKED, rope)
    sparse = hf.sequence("moe_layers")
    sparse = [i for i in layers if (i + 1) % step == 0] if sparse is None else sparse
    chunk, bias = hf.count("attention_chunk_size", default=None), hf.flag("attention_bias")
    tuned = {"scale": hf.number("attn_scale"), "floor": hf.count("floor_scale")}
    tuned_at_all = hf.flag("attn_temperature_tuning")
    norm = {"kind": "rmsnorm", "eps": hf.number("rms_norm_eps"), "weight": "none"}
    router = {"score": "sigmoid", "normalize": False, "weigh": "input"}
    moe = {**routed(hf, **router), "expert": gated(hf), "shared": gated(hf)}
    dense, position = gated(hf, "intermediate_size_mlp"), read_rope(hf, layout="interleaved")

    def layer(i: int) -> Data:
        attention = gqa(
            hf,
            qkv_bias=bias,
            out_bias=bias,
            chunk=chunk if chunked[i] else None,
            qk_norm=norm if rope[i] and hf.flag("use_qk_norm") else None,
            qk_norm_place="after",
            temperature=tuned if tuned_at_all and not rope[i] else None,
        )
        return block(attention, position if rope[i] else {"kind": "nope"}, moe if i in sparse else dense, rms(hf))

    return assemble(hf, "llama4_text", [layer(i) for i in layers], norm=rms(hf))


def _llama4_hf(config: ModelConfig) -> Data:
    layers: Any = config.layers
    moe: Any = next((layer.mlp for layer in layers if layer.mlp.kind == "moe"), None)
    dense: Any = next((layer.mlp for layer in layers if layer.mlp.kind != "moe"), None)
    ropes = [layer.position.kind == "rope" for layer in layers]
    turned = next((layer for layer in layers if layer.position.kind == "rope"), layers[-1])
    tuned = next((t for layer in layers if (t := getattr(layer.attention, "temperature", None))), None)
    chunks = [getattr(layer.attention, "chunk", None) for layer in layers]
    fields: Data = {
        "hidden_act": ACTS.get(moe.expert.kind if moe else dense.kind),
        "intermediate_size": moe.expert.d_ff if moe else dense.d_ff,
        "intermediate_size_mlp": dense.d_ff if dense else 2 * moe.expert.d_ff,
        "num_local_experts": moe.experts if moe else 1,
        "num_experts_per_tok": moe.top_k if moe else 1,
        "moe_layers": [i for i, layer in enumerate(layers) if layer.mlp.kind == "moe"],
        "interleave_moe_layer_step": 1 if dense is None else 2,
        "no_rope_layers": [int(rope) for rope in ropes],
        "no_rope_layer_interval": 4,
        "layer_types": ["chunked_attention" if chunk else "full_attention" for chunk in chunks],
        "attention_chunk_size": next((chunk for chunk in chunks if chunk), None),
        "use_qk_norm": getattr(turned.attention, "qk_norm", None) is not None,
        "attn_temperature_tuning": tuned is not None,
        "attention_bias": getattr(layers[-1].attention, "out_bias", None),
        "rms_norm_eps": getattr(config.norm, "eps", None),
        **(gqa_fields(config) if hasattr(layers[-1].attention, "kv_heads") else common_fields(config)),
        **rope_fields(config, turned.position),
    }
    return fields | ({"attn_scale": tuned.scale, "floor_scale": tuned.floor} if tuned else {})


def _llama4_rows() -> tuple[Row, ...]:
    norms = norm_rows(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
    moe = layer_rows(
        ("feed_forward.router.weight", "mlp.router"),
        Row("feed_forward.experts.gate_up_proj", ("mlp.experts.gate", "mlp.experts.up"), EXPERTS),
        Row("feed_forward.experts.down_proj", ("mlp.experts.down",), SAME),
    )
    dense = mlp_rows("feed_forward") + mlp_rows("feed_forward.shared_expert", "mlp.shared")
    return top_rows() + attention_rows() + norms + moe + dense


LLAMA4 = Dialect(
    "llama4_text", "Llama4ForCausalLM", _llama4, _llama4_hf, _llama4_rows(),
    {"vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
     "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
     "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
     "num_experts_per_tok": 1, "num_local_experts": 16, "interleave_moe_layer_step": 1, "use_qk_norm": True,
     "no_rope_layer_interval": 4, "attention_chunk_size": 8192, "attn_temperature_tuning": True,
     "floor_scale": 8192, "attn_scale": 0.1, "rope_theta": 500000.0, "attention_bias": False},
)  # fmt: skip

DIALECTS = (COHERE, DBRX, ARCTIC, LLAMA4)
