"""Phi-3-small once more in plain float64 numpy with loops, after Microsoft's own modeling_phi3_small.py,
positional_embedding.py and triton_flash_blocksparse_attn.py, on tensors as the hub stores them.

transformers 5 has no class for this model_type, so its fixture is made here:

    python -m tests.hub.phi3small     writes tests/hub/fixtures/phi3small
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]
CONFIG: dict[str, Any] = {
    "architectures": ["Phi3SmallForCausalLM"], "model_type": "phi3small", "vocab_size": 40, "hidden_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "hidden_act": "gegelu", "gegelu_limit": 0.9, "ff_intermediate_size": 14, "layer_norm_epsilon": 1e-4,
    "blocksparse_block_size": 4, "blocksparse_num_local_blocks": 2, "blocksparse_vert_stride": 3,
    "blocksparse_triton_kernel_block_size": 4, "blocksparse_homo_head_pattern": False,
    "dense_attention_every_n_layers": 2, "rope_embedding_base": 5000, "rope_position_scale": 0.5,
    "mup_use_scaling": True, "mup_attn_multiplier": 1.75, "mup_embedding_multiplier": 3.0,
    "mup_width_multiplier": 2.5, "tie_word_embeddings": True, "initializer_range": 0.02, "torch_dtype": "float32",
}  # fmt: skip
# Fields of published files that change no logits.
HUB = CONFIG | {
    "attention_bias": False, "attention_dropout_prob": 0.0, "embedding_dropout_prob": 0.1, "ffn_dropout_prob": 0.1,
    "ff_dim_multiplier": None, "gegelu_pad_to_256": True, "reorder_and_upcast_attn": False,
    "pad_sequence_to_multiple_of_64": True, "rope_scaling": None, "bos_token_id": 1, "eos_token_id": 1,
    "use_cache": True,
}  # fmt: skip
SEQ = 21


def block_mask(heads: int, length: int, size: int, local: int, stride: int, alike: bool) -> np.ndarray:
    """Whether query sees key, [heads, length, length]: block by block and head by head, then the causal mask."""
    step = 0 if alike else max(1, int(stride / heads))
    blocks = math.ceil(length / size)
    mask = np.zeros((heads, length, length), bool)
    for head, query, key in itertools.product(range(heads), range(blocks), range(blocks)):
        near, vertical = query - key < local, (key + head * step + 1) % stride == 0
        if key <= query and (near or vertical):
            mask[head, query * size : (query + 1) * size, key * size : (key + 1) * size] = True
    return mask & np.tril(np.ones((length, length), bool))


def gegelu(x: np.ndarray, limit: float | None) -> np.ndarray:
    """[..., 2 n] of pairs (gate, linear) to [..., n]."""
    out = np.zeros((*x.shape[:-1], x.shape[-1] // 2))
    for i in range(out.shape[-1]):
        gate, linear = x[..., 2 * i], x[..., 2 * i + 1]
        if limit is not None:
            gate, linear = np.minimum(gate, limit), np.maximum(np.minimum(linear, limit), -limit)
        out[..., i] = gate / (1 + np.exp(-1.702 * gate)) * (linear + 1)
    return out


def rotary(config: dict[str, Any], length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [length, head_dim / 2]."""
    dim = config["hidden_size"] // config["num_attention_heads"]
    freqs = np.array([config["rope_embedding_base"] ** (-2 * i / dim) for i in range(dim // 2)])
    long = config.get("rope_scaling")
    if not long:
        angles = np.outer(np.arange(length) * config["rope_position_scale"], freqs)
        return np.cos(angles), np.sin(angles)
    original = long["original_max_position_embeddings"]
    if length > original:
        ratio = config["max_position_embeddings"] / original
        factors, given = long["long_factor"], long.get("long_mscale", -1)
        default = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
    else:
        factors, given, default = long["short_factor"], long.get("short_mscale", -1), 1.0
    angles = np.outer(np.arange(length), freqs / np.array(factors))
    mscale = given if given > 0 else default
    return np.cos(angles) * mscale, np.sin(angles) * mscale


def norm(x: np.ndarray, tensors: Tensors, name: str, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def linear(x: np.ndarray, tensors: Tensors, name: str) -> np.ndarray:
    return x @ tensors[f"{name}.weight"].T.astype(np.float64) + tensors[f"{name}.bias"]


def turn(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    a, b = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)


def attention(x: np.ndarray, tensors: Tensors, name: str, layer: int, config: dict[str, Any]) -> np.ndarray:
    """One row [length, hidden]."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    length, dim, share = len(x), config["hidden_size"] // heads, heads // groups
    scale = config["mup_attn_multiplier"] / dim if config["mup_use_scaling"] else dim**-0.5
    every = config["dense_attention_every_n_layers"]
    if every and (layer + 1) % every == 0:
        mask = np.tril(np.ones((heads, length, length), bool))
    else:
        sizes = [config[f"blocksparse_{n}"] for n in ("block_size", "num_local_blocks", "vert_stride")]
        mask = block_mask(heads, length, *sizes, config["blocksparse_homo_head_pattern"])
    cos, sin = rotary(config, length)
    mixed = linear(x, tensors, f"{name}.query_key_value")
    out = np.zeros((length, heads * dim))
    for group in range(groups):  # of each: its queries, its key, its value
        parts = [mixed[:, (group * (share + 2) + i) * dim :][:, :dim] for i in range(share + 2)]
        key, value = turn(parts[-2], cos, sin), parts[-1]
        for i in range(share):
            head, query = group * share + i, turn(parts[i], cos, sin)
            for t in range(length):
                seen = np.flatnonzero(mask[head, t])
                scores = key[seen] @ query[t] * scale
                p = np.exp(scores - scores.max())
                out[t, head * dim : (head + 1) * dim] = p / p.sum() @ value[seen]
    return linear(out, tensors, f"{name}.dense")


def logits(config: dict[str, Any], tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    """[batch, seq, vocab]; the mask of the released tokenizer's unused tokens is left out."""
    eps = config["layer_norm_epsilon"]
    head = tensors["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    rows = []
    for row in ids:
        x = tensors["model.embed_tokens.weight"][row].astype(np.float64) * (config["mup_embedding_multiplier"] or 1.0)
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            y = norm(x, tensors, f"{name}.input_layernorm", eps)
            x = x + attention(y, tensors, f"{name}.self_attn", layer, config)
            y = norm(x, tensors, f"{name}.post_attention_layernorm", eps)
            y = gegelu(linear(y, tensors, f"{name}.mlp.up_proj"), config["gegelu_limit"])
            x = x + linear(y, tensors, f"{name}.mlp.down_proj")
        x = norm(x, tensors, "model.final_layernorm", eps)
        rows.append(x @ head.T.astype(np.float64) / (config["mup_width_multiplier"] or 1.0))
    return np.stack(rows)


def random_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Every tensor of a checkpoint, drawn so that nothing is near an initial one or zero."""
    rng = np.random.default_rng(seed)
    d, width = config["hidden_size"], config["ff_intermediate_size"]
    fused = d // config["num_attention_heads"] * (config["num_attention_heads"] + 2 * config["num_key_value_heads"])
    sizes = {"self_attn.query_key_value": (fused, d), "self_attn.dense": (d, d),
             "mlp.up_proj": (2 * width, d), "mlp.down_proj": (d, width)}  # fmt: skip
    found = {"model.embed_tokens.weight": 0.7 * rng.standard_normal((config["vocab_size"], d))}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = rng.standard_normal((config["vocab_size"], d))
    norms = ["model.final_layernorm"]
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in sizes.items():
            found[f"model.layers.{layer}.{name}.weight"] = 1.3 * rng.standard_normal((rows, columns)) / columns**0.5
            found[f"model.layers.{layer}.{name}.bias"] = 0.3 * rng.standard_normal(rows)
        norms += [f"model.layers.{layer}.{name}" for name in ("input_layernorm", "post_attention_layernorm")]
    for name in norms:
        found[f"{name}.weight"] = 1 + 0.3 * rng.standard_normal(d)
        found[f"{name}.bias"] = 0.3 * rng.standard_normal(d)
    return {name: array.astype(np.float32) for name, array in found.items()}


def write(folder: Path, config: dict[str, Any], seed: int = 0) -> None:
    """A folder as the hub has it, with the logits of two rows."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    found = random_tensors(config, seed)
    ids = np.random.default_rng(seed + 1).integers(3, config["vocab_size"], (2, SEQ))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    np.savez(folder / "logits.npz", input_ids=ids, logits=logits(config, found, ids).astype(np.float32))


if __name__ == "__main__":
    OUT = Path(__file__).parent / "fixtures" / "phi3small"
    write(OUT, CONFIG)
    (OUT / "config.hub.json").write_text(json.dumps(HUB, indent=1) + "\n")
