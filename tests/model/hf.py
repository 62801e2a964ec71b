"""Hugging Face checkpoints as llamax models: the smallest reader that serves as a test oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from llamax.config.model import ModelConfig
from llamax.model.transformer import Transformer

Tensors = dict[str, np.ndarray]


def read_fixture(folder: Path) -> tuple[Transformer, np.ndarray, np.ndarray]:
    """(the model with the folder's weights, its input ids [batch, seq], its logits [batch, seq, vocab])."""
    hf = json.loads((folder / "config.json").read_text())
    saved = np.load(folder / "logits.npz")
    model = fill(model_config(hf), load_file(folder / "model.safetensors"), one_plus="gemma" in hf["model_type"])
    return model, saved["input_ids"], saved["logits"]


# ---------------------------------------------------------------- config
def model_config(hf: dict[str, Any]) -> ModelConfig:
    """The llamax config of a transformers 5 `config.json`."""
    kind, layers = hf["model_type"], hf["num_hidden_layers"]
    gemma, phi = kind.startswith("gemma"), kind == "phi"
    norm = {"kind": "layernorm", "eps": hf["layer_norm_eps"]} if phi else {"kind": "rmsnorm", "eps": hf["rms_norm_eps"]}
    attention: dict[str, Any] = {
        "kind": "gqa",
        "heads": hf["num_attention_heads"],
        "kv_heads": hf["num_key_value_heads"],
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        "qkv_bias": kind in ("qwen2", "phi"),
        "out_bias": phi,
        "softcap": hf.get("attn_logit_softcapping"),
        "scale": hf["query_pre_attn_scalar"] ** -0.5 if "query_pre_attn_scalar" in hf else None,
        "qk_norm": norm if kind.startswith(("qwen3", "gemma3")) else None,
    }
    unit: list[dict[str, Any]] = [{}] * layers
    ropes = hf["rope_parameters"]
    if kind.startswith(("gemma2", "gemma3")):
        window = {"sliding_attention": hf["sliding_window"], "full_attention": None}
        unit = [{"attention": {"window": window[layer]}} for layer in hf["layer_types"]]
    elif hf.get("sliding_window") and hf.get("use_sliding_window", True):
        attention["window"] = hf["sliding_window"]
    if "full_attention" in ropes:
        unit = [{**part, "position": rope(ropes[layer])} for part, layer in zip(unit, hf["layer_types"], strict=True)]
        ropes = ropes["full_attention"]
    segments = [{"repeat": layers}] if all(part == {} for part in unit) else [{"repeat": 1, "unit": unit}]
    return ModelConfig.model_validate(
        {
            "vocab_size": hf["vocab_size"],
            "d_model": hf["hidden_size"],
            "max_seq_len": hf["max_position_embeddings"],
            "segments": segments,
            "attention": attention,
            "position": rope(ropes),
            "mlp": mlp(hf),
            "norm": norm,
            "placement": "sandwich" if kind.startswith(("gemma2", "gemma3")) else "pre",
            "residual": "parallel" if phi else "sequential",
            "embedding": {"scale": "sqrt_d_model" if gemma else "none"},
            "head": {
                "tied": hf["tie_word_embeddings"],
                "bias": phi,
                "softcap": hf.get("final_logit_softcapping"),
            },
        }
    )


def rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """transformers' `rope_parameters` as a llamax position."""
    scaling: dict[str, Any] | None = None
    if (kind := parameters["rope_type"]) != "default":
        scaling = {"kind": kind, "factor": parameters["factor"]}
        if kind == "llama3":
            scaling |= {name: parameters[name] for name in ("low_freq_factor", "high_freq_factor")}
            scaling["original_max_len"] = parameters["original_max_position_embeddings"]
    return {
        "kind": "rope",
        "theta": parameters["rope_theta"],
        "fraction": parameters.get("partial_rotary_factor", 1.0),
        "scaling": scaling,
    }


def mlp(hf: dict[str, Any]) -> dict[str, Any]:
    """The feed-forward part of a transformers config."""
    if hf["model_type"] == "phi":
        return {"kind": "gelu", "d_ff": hf["intermediate_size"], "bias": True}
    act = hf.get("hidden_activation") or hf["hidden_act"]
    dense = {"kind": {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}[act], "d_ff": hf["intermediate_size"]}
    if "num_local_experts" not in hf:
        return dense
    dense["d_ff"] = hf.get("moe_intermediate_size", hf["intermediate_size"])
    return {
        "kind": "moe",
        "experts": hf["num_local_experts"],
        "top_k": hf["num_experts_per_tok"],
        "expert": dense,
    }


# ---------------------------------------------------------------- weights
def fill(config: ModelConfig, tensors: Tensors, *, one_plus: bool) -> Transformer:
    """A model of `config` with every parameter taken from `tensors`, and every tensor used."""
    model = jax.eval_shape(lambda key: Transformer(config, key=key), jax.random.key(0))
    left = dict(tensors)
    layer_values: list[dict[str, np.ndarray]] = [
        layer_weights(left, i, block, one_plus) for i, block in enumerate(config.layers)
    ]
    first = 0
    for stack, (repeat, unit) in zip(model.stacks, config.blocks, strict=True):
        for i, block in enumerate(stack.blocks):
            rows = layer_values[first + i : first + repeat * len(unit) : len(unit)]
            put(block, {name: np.stack([row[name] for row in rows]) for name in rows[0]})
        first += repeat * len(unit)
    plus = 1.0 if one_plus else 0.0
    top = {"embedding": left.pop("model.embed_tokens.weight")}
    for name in ("model.norm", "model.final_layernorm"):
        if f"{name}.weight" in left:
            top["norm.scale"] = left.pop(f"{name}.weight") + plus
        if f"{name}.bias" in left:
            top["norm.bias"] = left.pop(f"{name}.bias")
    if not config.head.tied:
        top["head"] = left.pop("lm_head.weight").T
    if config.head.bias:
        top["head_bias"] = left.pop("lm_head.bias")
    put(model, top, skip="stacks")
    assert not left, f"unused tensors: {sorted(left)}"
    return model


def put(module: Any, values: dict[str, np.ndarray], skip: str = "-") -> None:
    """Set every parameter under `module` from dotted names; both sides must name the same set."""
    found = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(module):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        if not name.startswith(skip):
            found[name] = path
    assert set(found) == set(values), (sorted(found), sorted(values))
    for name, value in values.items():
        target = module
        for part in name.split("."):
            target = getattr(target, part)
        assert target.get_value().shape == value.shape, (name, target.get_value().shape, value.shape)
        target.set_value(jnp.asarray(value))


def layer_weights(left: Tensors, i: int, block: Any, one_plus: bool) -> dict[str, np.ndarray]:
    """Layer i's tensors, taken out of `left`, under our names and layouts."""
    attention, plus = block.attention, 1.0 if one_plus else 0.0
    here = f"model.layers.{i}."
    heads = {"query": attention.heads, "key": attention.kv_heads, "value": attention.kv_heads}
    out: dict[str, np.ndarray] = {}

    def take(name: str) -> np.ndarray:
        return left.pop(here + name)

    def has(name: str) -> bool:
        return here + name in left

    for ours, n in heads.items():
        theirs = f"self_attn.{ours[0]}_proj"
        out[f"attention.{ours}"] = take(f"{theirs}.weight").T.reshape(-1, n, attention.head_dim)
        if attention.qkv_bias:
            out[f"attention.{ours}_bias"] = take(f"{theirs}.bias").reshape(n, attention.head_dim)
    o = "self_attn.dense" if has("self_attn.dense.weight") else "self_attn.o_proj"
    out["attention.out"] = take(f"{o}.weight").T.reshape(attention.heads, attention.head_dim, -1)
    if attention.out_bias:
        out["attention.out_bias"] = take(f"{o}.bias")
    if attention.qk_norm is not None:
        out["attention.query_norm.scale"] = take("self_attn.q_norm.weight") + plus
        out["attention.key_norm.scale"] = take("self_attn.k_norm.weight") + plus

    sandwich = block.placement == "sandwich"
    norms = {"attention_norm": "input_layernorm"}
    if block.residual == "sequential":
        norms["mlp_norm"] = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
    if sandwich:
        norms |= {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
    for ours, theirs in norms.items():
        out[f"{ours}.scale"] = take(f"{theirs}.weight") + plus
        if block.norm.kind == "layernorm" and block.norm.bias:
            out[f"{ours}.bias"] = take(f"{theirs}.bias")

    if block.mlp.kind == "moe":
        mixtral = has("block_sparse_moe.gate.weight")
        moe = "block_sparse_moe" if mixtral else "mlp"
        names = (
            {"gate": "w1", "up": "w3", "down": "w2"} if mixtral else {n: f"{n}_proj" for n in ("gate", "up", "down")}
        )
        out["mlp.router"] = take(f"{moe}.gate.weight").T
        for ours, theirs in names.items():
            out[f"mlp.{ours}"] = np.stack(
                [take(f"{moe}.experts.{e}.{theirs}.weight").T for e in range(block.mlp.experts)]
            )
        return out
    names = (
        {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"} if block.mlp.gated else {"up": "fc1", "down": "fc2"}
    )
    for ours, theirs in names.items():
        out[f"mlp.{ours}"] = take(f"mlp.{theirs}.weight").T
        if block.mlp.bias:
            out[f"mlp.{ours}_bias"] = take(f"mlp.{theirs}.bias")
    return out
