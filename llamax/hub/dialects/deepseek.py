"""DeepSeek-V2, V3 (R1), V3.2 and GLM-5: latent attention, fine-grained experts, the last two with an indexer."""

from __future__ import annotations

from typing import Any

from llamax.config.model import ModelConfig
from llamax.hub.dialects.base import (
    ACTS,
    Data,
    Dialect,
    assemble,
    block,
    common_fields,
    gated,
    layer_rows,
    mlp_rows,
    rms,
    rope_fields,
    top_rows,
)
from llamax.hub.dialects.llama import NORMS, routed
from llamax.hub.dialects.reader import Hf, read_rope
from llamax.hub.layouts import SAME, Row

NORM = {"kind": "rmsnorm", "eps": 1e-6}  # of the latents: transformers' own default, whatever the config's eps is
_MLA = layer_rows(
    ("self_attn.q_proj.weight", "attention.query"),
    ("self_attn.q_a_proj.weight", "attention.q_down"),
    ("self_attn.q_a_layernorm.weight", "attention.q_norm.scale"),
    ("self_attn.q_b_proj.weight", "attention.q_up"),
    ("self_attn.kv_a_proj_with_mqa.weight", "attention.kv_down"),
    ("self_attn.kv_a_layernorm.weight", "attention.kv_norm.scale"),
    ("self_attn.kv_b_proj.weight", "attention.kv_up"),
    ("self_attn.o_proj.weight", "attention.out"),
    ("mlp.gate.weight", "mlp.router"),
    Row("mlp.gate.e_score_correction_bias", ("mlp.router_bias",), SAME),
)
_EXPERTS = mlp_rows("mlp.experts.{expert}", "mlp.experts") + mlp_rows("mlp.shared_experts", "mlp.shared")
ROWS = top_rows() + NORMS + _MLA + mlp_rows() + _EXPERTS
# A multi-token module stands after the last layer: layer 61 of DeepSeek-V3. Its copies of the embedding and of the
# head are the model's own.
MTP = layer_rows(
    ("enorm.weight", "mtp.embed_norm.scale"),
    ("hnorm.weight", "mtp.stream_norm.scale"),
    ("eh_proj.weight", "mtp.project"),
    ("shared_head.norm.weight", "mtp.norm.scale"),
)
INDEXER = layer_rows(
    ("self_attn.indexer.wq_b.weight", "attention.indexer.query"),
    ("self_attn.indexer.wk.weight", "attention.indexer.key"),
    ("self_attn.indexer.k_norm.weight", "attention.indexer.key_norm.scale"),
    ("self_attn.indexer.k_norm.bias", "attention.indexer.key_norm.bias"),
    ("self_attn.indexer.weights_proj.weight", "attention.indexer.weights"),
)
IGNORED = (r".*rotary_emb\.inv_freq", r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")
FIXED: dict[str, tuple[Any, ...]] = {"attention_bias": (None, False), "mlp_bias": (None, False)}
V3_FIXED = FIXED | {"scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc")}


def _mla(hf: Hf, indexer: Data | None) -> Data:
    return {
        "kind": "mla",
        "heads": hf.count("num_attention_heads"),
        "q_rank": hf.count("q_lora_rank", default=None),
        "kv_rank": hf.count("kv_lora_rank"),
        "nope_dim": hf.count("qk_nope_head_dim"),
        "rope_dim": hf.count("qk_rope_head_dim"),
        "value_dim": hf.count("v_head_dim"),
        "norm": NORM,
        "indexer": indexer,
    }


def _sparse(hf: Hf) -> list[bool]:
    """Which layers are mixtures: mlp_layer_types, or those from first_k_dense_replace on, every moe_layer_freq-th."""
    first, every = hf.get("first_k_dense_replace"), hf.count("moe_layer_freq", default=1)
    if type(first) is not int or first < 0:
        raise hf.refuse("first_k_dense_replace", first, "give a number of layers")
    default = [i >= first and i % every == 0 for i in range(hf.layers)]
    return hf.per_layer("mlp_layer_types", {"sparse": True, "dense": False}, default)


def _model(hf: Hf, name: str, router: Data, layout: str, indexer: Data | None = None) -> Data:
    width = hf.count("moe_intermediate_size")
    moe = {**routed(hf, **router), "expert": gated(hf, "moe_intermediate_size")}
    if shared := hf.count("n_shared_experts", default=0):
        moe["shared"] = {**gated(hf, "moe_intermediate_size"), "d_ff": width * shared}
    position = read_rope(hf, layout=layout, mscale=True)
    dense, norm, attention = gated(hf), rms(hf), _mla(hf, indexer)
    blocks = [block(attention, position, moe if sparse else dense, norm) for sparse in _sparse(hf)]
    mtp = hf.get("num_nextn_predict_layers", "num_mtp_layers") or 0
    if type(mtp) is not int or not 0 <= mtp < 16:
        raise hf.refuse("num_nextn_predict_layers", mtp, "give a number of modules from 0 to 15")
    return assemble(hf, name, blocks, norm=norm, mtp=mtp)


def _groups(hf: Hf, by: str) -> Data | None:
    """Groups of experts; one group is none."""
    count = hf.count("n_group", default=1)
    return {"count": count, "keep": hf.count("topk_group", default=count), "by": by} if count > 1 else None


def _fields(config: ModelConfig) -> Data:
    layers = config.layers
    last: Any = layers[-1].attention
    moe: Any = next((layer.mlp for layer in layers if layer.mlp.kind == "moe"), None)
    dense: Any = next((layer.mlp for layer in layers if layer.mlp.kind != "moe"), None)
    routers: Any = moe.router if moe else None
    kinds = [layer.mlp.kind == "moe" for layer in layers]
    first = kinds.index(True) if True in kinds else len(kinds)
    shared = moe.shared.d_ff if moe and moe.shared else 0
    fields: Data = common_fields(config) | {
        "num_key_value_heads": last.heads,
        "hidden_act": ACTS.get((moe.expert if moe else dense).kind),
        "intermediate_size": dense.d_ff if dense else 4 * config.d_model,
        "moe_intermediate_size": moe.expert.d_ff if moe else None,
        "n_routed_experts": moe.experts if moe else None,
        "n_shared_experts": shared // moe.expert.d_ff if moe else None,
        "num_experts_per_tok": moe.top_k if moe else 1,
        "n_group": routers.groups.count if routers and routers.groups else 1,
        "topk_group": routers.groups.keep if routers and routers.groups else 1,
        "norm_topk_prob": routers.normalize if routers else None,
        "routed_scaling_factor": routers.scale if routers else None,
        "first_k_dense_replace": first,
        "moe_layer_freq": 1,
        "rms_norm_eps": getattr(config.norm, "eps", None),
        "attention_bias": False,
        "num_nextn_predict_layers": config.mtp,
        **rope_fields(config, layers[-1].position),
    }
    theirs = {"q_lora_rank": "q_rank", "kv_lora_rank": "kv_rank", "qk_nope_head_dim": "nope_dim",
              "qk_rope_head_dim": "rope_dim", "v_head_dim": "value_dim"}  # fmt: skip
    fields |= {name: getattr(last, ours, None) for name, ours in theirs.items()}
    if kinds != [i >= first for i in range(len(kinds))]:
        fields["mlp_layer_types"] = ["sparse" if sparse else "dense" for sparse in kinds]
    if indexer := getattr(last, "indexer", None):
        fields |= {"index_n_heads": indexer.heads, "index_head_dim": indexer.head_dim, "index_topk": indexer.top_k}
    return fields


# ---------------------------------------------------------------- v2
def _v2(hf: Hf) -> Data:
    limited = hf.choice("topk_method", {"greedy": False, "group_limited_greedy": True})
    if hf.get("norm_topk_prob"):
        # DeepSeek's own code then leaves routed_scaling_factor out, transformers normalizes nothing: no one meaning.
        raise hf.refuse("norm_topk_prob", True, "DeepSeek-V2 weighs by plain probabilities; set false")
    router = {"normalize": False, "scale": hf.number("routed_scaling_factor")}
    return _model(hf, "deepseek_v2", router | {"groups": _groups(hf, "max") if limited else None}, "interleaved")


def _v2_hf(config: ModelConfig) -> Data:
    fields = _fields(config)
    method = "group_limited_greedy" if fields["n_group"] > 1 else "greedy"
    return fields | {"topk_method": method, "scoring_func": "softmax"}


_V2 = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "first_k_dense_replace": 0, "kv_lora_rank": 512, "q_lora_rank": 1536, "n_routed_experts": 64,
    "n_shared_experts": 2, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "routed_scaling_factor": 1.0,
    "topk_method": "greedy", "v_head_dim": 128, "moe_intermediate_size": 1407,
}  # fmt: skip
V2 = Dialect(
    "deepseek_v2", "DeepseekV2ForCausalLM", _v2, _v2_hf, ROWS, _V2, FIXED | {"scoring_func": (None, "softmax")}, IGNORED
)


# ---------------------------------------------------------------- v3 and after
def _v3_router(hf: Hf) -> Data:
    return {
        "score": "sigmoid",
        "normalize": hf.flag("norm_topk_prob"),
        "scale": hf.number("routed_scaling_factor"),
        "bias": True,
        "groups": _groups(hf, "top2"),
    }


def _v3(hf: Hf) -> Data:
    return _model(hf, "deepseek_v3", _v3_router(hf), "interleaved" if hf.flag("rope_interleave") else "half")


_SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _v3_hf(config: ModelConfig) -> Data:
    layout = getattr(config.layers[-1].position, "layout", "interleaved")
    return _fields(config) | _SIGMOID | {"rope_interleave": layout == "interleaved"}


_V3 = {key: value for key, value in _V2.items() if key != "topk_method"} | {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "norm_topk_prob": True, "max_position_embeddings": 4096, "rope_interleave": True,
}  # fmt: skip
V3 = Dialect("deepseek_v3", "DeepseekV3ForCausalLM", _v3, _v3_hf, ROWS + MTP, _V3, V3_FIXED, IGNORED)


def _indexer(hf: Hf, layout: str) -> Data:
    fields = {"heads": hf.count("index_n_heads"), "head_dim": hf.count("index_head_dim")}
    norm = {"kind": "layernorm", "eps": 1e-6, "bias": True}
    return fields | {"top_k": hf.count("index_topk"), "layout": layout, "norm": norm}


def _v32(hf: Hf) -> Data:
    _every_layer(hf, "layer_types", "indexed_attention")
    return _model(hf, "deepseek_v32", _v3_router(hf), "interleaved", _indexer(hf, "half"))


def _glm(hf: Hf) -> Data:
    _every_layer(hf, "layer_types", "indexed_attention")
    _every_layer(hf, "indexer_types", "full")
    return _model(hf, "glm_moe_dsa", _v3_router(hf), "interleaved", _indexer(hf, "interleaved"))


def _every_layer(hf: Hf, name: str, only: str) -> None:
    for value in hf.sequence(name) or []:
        if value != only:
            raise hf.refuse(name, value, f"llamax has only {only!r} in every layer")


def _sparse_hf(config: ModelConfig) -> Data:
    return _fields(config) | _SIGMOID


_V32 = _V3 | {
    "max_position_embeddings": 163840, "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64,
}  # fmt: skip
_GLM = _V32 | {
    "vocab_size": 154880, "hidden_size": 6144, "intermediate_size": 12288, "num_hidden_layers": 78,
    "num_attention_heads": 64, "q_lora_rank": 2048, "v_head_dim": 256, "qk_nope_head_dim": 192, "n_group": 1,
    "topk_group": 1, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "index_n_heads": 32,
}  # fmt: skip
SHARED_INDEX = {"index_topk_freq": (None, 1), "index_topk_pattern": (None,)}  # later GLMs reuse a layer's choice
_ROWS = ROWS + MTP + INDEXER
V32 = Dialect("deepseek_v32", "DeepseekV32ForCausalLM", _v32, _sparse_hf, _ROWS, _V32, V3_FIXED, IGNORED)
GLM = Dialect("glm_moe_dsa", "GlmMoeDsaForCausalLM", _glm, _sparse_hf, _ROWS, _GLM, V3_FIXED | SHARED_INDEX, IGNORED)

DIALECTS = (V2, V3, V32, GLM)
