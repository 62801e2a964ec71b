"""Llama 1 to 3.3, Code Llama, Mistral and Mixtral, Qwen 1.5 to 3 dense and MoE: one block, a few switches."""

from __future__ import annotations

from collections.abc import Mapping
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
    layer_types,
    mlp_rows,
    norm_rows,
    rms,
    rope_fields,
    top_rows,
    windows,
)
from llamax.hub.dialects.reader import Hf, read_rope

NORMS = norm_rows(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
ROWS = top_rows() + attention_rows() + NORMS + mlp_rows()
PLAIN = {"num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "tie_word_embeddings": False}


def _dense_fields(config: ModelConfig) -> Data:
    last = config.layers[-1]
    return gqa_fields(config) | {
        "hidden_act": ACTS.get(last.mlp.kind),
        "intermediate_size": getattr(last.mlp, "d_ff", None),
        "rms_norm_eps": getattr(config.norm, "eps", None),
        **rope_fields(config, last.position),
    }


# ---------------------------------------------------------------- llama
def _llama(hf: Hf) -> Data:
    bias = hf.flag("attention_bias")
    one = block(gqa(hf, qkv_bias=bias, out_bias=bias), read_rope(hf), gated(hf, bias=hf.flag("mlp_bias")), rms(hf))
    return assemble(hf, "llama", [one] * hf.layers, norm=rms(hf))


def _llama_hf(config: ModelConfig) -> Data:
    last = config.layers[-1]
    biases = {"attention_bias": getattr(last.attention, "out_bias", None), "mlp_bias": getattr(last.mlp, "bias", None)}
    return _dense_fields(config) | biases


LLAMA = Dialect(
    "llama", "LlamaForCausalLM", _llama, _llama_hf, ROWS,
    {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
     "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, **PLAIN},
)  # fmt: skip


# ---------------------------------------------------------------- mistral, mixtral
def _mistral(hf: Hf) -> Data:
    one = block(gqa(hf, window=hf.count("sliding_window", default=None)), read_rope(hf), gated(hf), rms(hf))
    return assemble(hf, "mistral", [one] * hf.layers, norm=rms(hf))


def _mistral_hf(config: ModelConfig) -> Data:
    return _dense_fields(config) | {"sliding_window": getattr(config.layers[-1].attention, "window", None)}


_MISTRAL_SIZES = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 131072, **PLAIN, "num_key_value_heads": 8,
}  # fmt: skip
MISTRAL = Dialect(
    "mistral", "MistralForCausalLM", _mistral, _mistral_hf, ROWS,
    {**_MISTRAL_SIZES, "rms_norm_eps": 1e-6, "sliding_window": 4096},
)  # fmt: skip


def _mixtral(hf: Hf) -> Data:
    attention = gqa(hf, window=hf.count("sliding_window", default=None))
    one = block(attention, read_rope(hf), {**routed(hf), "expert": gated(hf)}, rms(hf))
    return assemble(hf, "mixtral", [one] * hf.layers, norm=rms(hf))


def routed(hf: Hf, **router: Any) -> Data:
    """A mixture of experts without its expert."""
    experts = hf.count("num_local_experts", "num_experts", "n_routed_experts")
    return {"kind": "moe", "experts": experts, "top_k": hf.count("num_experts_per_tok"), "router": router}


def _mixtral_hf(config: ModelConfig) -> Data:
    mlp = config.layers[-1].mlp
    expert = getattr(mlp, "expert", None)
    return _mistral_hf(config) | {
        "hidden_act": ACTS.get(getattr(expert, "kind", "")),
        "intermediate_size": getattr(expert, "d_ff", None),
        "num_local_experts": getattr(mlp, "experts", None),
        "num_experts_per_tok": getattr(mlp, "top_k", None),
    }


MIXTRAL_EXPERTS = layer_rows(("block_sparse_moe.gate.weight", "mlp.router")) + mlp_rows(
    "block_sparse_moe.experts.{expert}", "mlp.experts", ("w1", "w3", "w2")
)
MIXTRAL = Dialect(
    "mixtral", "MixtralForCausalLM", _mixtral, _mixtral_hf, top_rows() + attention_rows() + NORMS + MIXTRAL_EXPERTS,
    {**_MISTRAL_SIZES, "rms_norm_eps": 1e-5, "sliding_window": None, "rope_theta": 1e6, "num_local_experts": 8,
     "num_experts_per_tok": 2},
)  # fmt: skip


# ---------------------------------------------------------------- qwen
_QWEN = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, **PLAIN,
    "num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    "attention_bias": False,
}  # fmt: skip


def _top_window(hf: Hf) -> list[int | None]:
    """Qwen 2 and 3: the layers from max_window_layers up slide, where sliding windows are used at all."""
    first = hf.get("max_window_layers")
    if type(first) is not int:
        raise hf.refuse("max_window_layers", first, "give an integer")
    used = hf.flag("use_sliding_window")
    return windows(hf, [used and i >= first for i in range(hf.layers)], used)


def _qwen2(hf: Hf) -> Data:
    blocks = [
        block(gqa(hf, window=window, qkv_bias=True), read_rope(hf), gated(hf), rms(hf)) for window in _top_window(hf)
    ]
    return assemble(hf, "qwen2", blocks, norm=rms(hf))


def _qwen_windows(config: ModelConfig) -> Data:
    found = layer_types(config)
    return found | {"use_sliding_window": found["sliding_window"] is not None, "max_window_layers": len(config.layers)}


def _qwen2_hf(config: ModelConfig) -> Data:
    return _dense_fields(config) | _qwen_windows(config)


QWEN2 = Dialect("qwen2", "Qwen2ForCausalLM", _qwen2, _qwen2_hf, ROWS, _QWEN)


def _qwen3(hf: Hf) -> Data:
    bias = hf.flag("attention_bias")
    attention = gqa(hf, qkv_bias=bias, out_bias=bias, qk_norm=rms(hf))
    blocks = [block({**attention, "window": window}, read_rope(hf), gated(hf), rms(hf)) for window in _top_window(hf)]
    return assemble(hf, "qwen3", blocks, norm=rms(hf))


def _qwen3_hf(config: ModelConfig) -> Data:
    return _qwen2_hf(config) | {"attention_bias": getattr(config.layers[-1].attention, "out_bias", None)}


QWEN3 = Dialect("qwen3", "Qwen3ForCausalLM", _qwen3, _qwen3_hf, ROWS, _QWEN | {"head_dim": 128})


# ---------------------------------------------------------------- qwen mixtures
def sparse_layers(hf: Hf) -> list[bool]:
    """Which layers are mixtures: every decoder_sparse_step-th, but those of mlp_only_layers."""
    step, dense = hf.count("decoder_sparse_step"), hf.sequence("mlp_only_layers") or []
    return [i not in dense and (i + 1) % step == 0 for i in range(hf.layers)]


def _qwen_mixture(hf: Hf, attentions: list[Data], shared: Data, name: str) -> Data:
    expert = gated(hf, "moe_intermediate_size")
    moe = {**routed(hf, normalize=hf.flag("norm_topk_prob")), "expert": expert, **shared}
    dense, position, norm = gated(hf), read_rope(hf), rms(hf)
    mlps = [moe if sparse else dense for sparse in sparse_layers(hf)]
    blocks = [block(attention, position, mlp, norm) for attention, mlp in zip(attentions, mlps, strict=True)]
    return assemble(hf, name, blocks, norm=norm)


def _mixture_fields(config: ModelConfig) -> Data:
    """The fields of the two Qwen mixtures; a model without a dense layer leaves intermediate_size to the default."""
    mlps = [layer.mlp for layer in config.layers]
    moe: Any = next((mlp for mlp in mlps if mlp.kind == "moe"), None)
    dense: Any = next((mlp for mlp in mlps if mlp.kind != "moe"), None)
    fields: Data = {
        "num_experts": getattr(moe, "experts", None),
        "num_experts_per_tok": getattr(moe, "top_k", None),
        "moe_intermediate_size": moe.expert.d_ff if moe else None,
        "hidden_act": ACTS.get(moe.expert.kind if moe else ""),
        "norm_topk_prob": moe.router.normalize if moe else None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, mlp in enumerate(mlps) if mlp.kind != "moe"],
        "intermediate_size": dense.d_ff if dense else 4 * config.d_model,
    }
    return _dense_fields(config) | fields


def _qwen2_moe(hf: Hf) -> Data:
    used, first = hf.flag("use_sliding_window"), hf.get("max_window_layers")
    if type(first) is not int:
        raise hf.refuse("max_window_layers", first, "give an integer")
    # The even layers slide, as transformers has it for this model_type alone.
    found = windows(hf, [used and i % 2 == 0 and i < first for i in range(hf.layers)], used)
    attentions = [gqa(hf, qkv_bias=hf.flag("qkv_bias"), window=window) for window in found]
    shared = {"shared": gated(hf, "shared_expert_intermediate_size"), "shared_gate": True}
    return _qwen_mixture(hf, attentions, shared, "qwen2_moe")


def _qwen2_moe_hf(config: ModelConfig) -> Data:
    moe: Any = next((layer.mlp for layer in config.layers if layer.mlp.kind == "moe"), None)
    shared = getattr(moe, "shared", None)
    return _mixture_fields(config) | _qwen_windows(config) | {
        "shared_expert_intermediate_size": shared.d_ff if shared else None,
        "qkv_bias": getattr(config.layers[-1].attention, "qkv_bias", None),
    }  # fmt: skip


_QWEN_EXPERTS = layer_rows(("mlp.gate.weight", "mlp.router")) + mlp_rows("mlp.experts.{expert}", "mlp.experts")
QWEN2_MOE = Dialect(
    "qwen2_moe", "Qwen2MoeForCausalLM", _qwen2_moe, _qwen2_moe_hf,
    ROWS + _QWEN_EXPERTS + mlp_rows("mlp.shared_expert", "mlp.shared")
    + layer_rows(("mlp.shared_expert_gate.weight", "mlp.shared_gate")),
    {**_QWEN, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
     "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
     "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1, "norm_topk_prob": False, "qkv_bias": True},
)  # fmt: skip


def _qwen3_moe(hf: Hf) -> Data:
    bias, window = hf.flag("attention_bias"), hf.flag("use_sliding_window") and hf.count("sliding_window", default=None)
    attention = gqa(hf, qkv_bias=bias, out_bias=bias, qk_norm=rms(hf), window=window or None)
    return _qwen_mixture(hf, [attention] * hf.layers, {}, "qwen3_moe")


def _qwen3_moe_hf(config: ModelConfig) -> Data:
    attention = config.layers[-1].attention
    window = getattr(attention, "window", None)
    more: Mapping[str, Any] = {"use_sliding_window": window is not None, "sliding_window": window}
    return _mixture_fields(config) | {"attention_bias": getattr(attention, "out_bias", None), **more}


QWEN3_MOE = Dialect(
    "qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe, _qwen3_moe_hf, ROWS + _QWEN_EXPERTS,
    {**_QWEN, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
     "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1,
     "norm_topk_prob": False},
)  # fmt: skip

DIALECTS = (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE)
