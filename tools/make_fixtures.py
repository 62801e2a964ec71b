"""Make tests/hub/fixtures: tiny checkpoints of every family with the logits transformers gives, float32.

    python tools/make_fixtures.py [--out tests/hub/fixtures] [NAME]...      (needs llamax[torch])

Every size, depth, window and count of experts is odd on purpose, and so are the fields that published models leave at
their defaults. A folder holds config.json as transformers 5 writes it, config.hub.json as files on the hub are spelled
(both checked to give the same logits), model.safetensors, and logits.npz with its inputs.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

SEQ, VOCAB = 21, 40
LAYERS = "num_hidden_layers"


def base(**other: Any) -> dict[str, Any]:
    """The fields most families share."""
    return {
        "vocab_size": VOCAB, "hidden_size": 12, "intermediate_size": 20, LAYERS: 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        **other,
    }  # fmt: skip


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """`fields` without some."""
    return {name: value for name, value in fields.items() if name not in names}


def yarn(mscale: float) -> dict[str, Any]:
    """A YaRN whose ramp lies inside four frequencies."""
    return {"rope_type": "yarn", "factor": 3.0, "beta_fast": 4.0, "beta_slow": 0.25, "mscale": mscale,
            "mscale_all_dim": mscale, "original_max_position_embeddings": 32}  # fmt: skip


LLAMA3 = {"rope_type": "llama3", "factor": 5.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
          "original_max_position_embeddings": 24}  # fmt: skip
MLA = base(
    kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5, q_lora_rank=10, moe_intermediate_size=8,
    num_key_value_heads=2, attention_bias=False,
)  # fmt: skip
TANH = "gelu_pytorch_tanh"
GEMMA = without(
    base(tie_word_embeddings=True, head_dim=10, num_attention_heads=3, hidden_activation=TANH), "hidden_act"
)
LOCAL, WIDE = "sliding_attention", "full_attention"

# Sixteen heads in an indexer: with few, keys for which every head's score is cut to zero tie for the last place.
FIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", base(num_hidden_layers=5, head_dim=10, num_attention_heads=3, attention_bias=True, mlp_bias=True,
                            tie_word_embeddings=True, rope_scaling=LLAMA3)),
    "mistral": ("mistral", base(sliding_window=5, num_attention_heads=6)),
    "mixtral": ("mixtral", base(num_local_experts=5, num_experts_per_tok=3, sliding_window=7)),
    "qwen2": ("qwen2", base(num_hidden_layers=5, use_sliding_window=True, sliding_window=6, max_window_layers=2)),
    "qwen2_moe": ("qwen2_moe", base(num_hidden_layers=5, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8,
                                    shared_expert_intermediate_size=14, norm_topk_prob=True, decoder_sparse_step=2,
                                    mlp_only_layers=[3])),
    "qwen3": ("qwen3", base(num_hidden_layers=4, head_dim=8, attention_bias=True, use_sliding_window=True,
                            sliding_window=4, layer_types=[WIDE, LOCAL, LOCAL, WIDE])),
    "qwen3_moe": ("qwen3_moe", base(head_dim=8, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=8,
                                    norm_topk_prob=False, mlp_only_layers=[0], decoder_sparse_step=1)),
    "gemma": ("gemma", base(head_dim=10, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh")),
    "gemma2": ("gemma2", {**GEMMA, LAYERS: 5, "num_key_value_heads": 3, "sliding_window": 5,
                          "query_pre_attn_scalar": 7, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 2.5}),
    "gemma3_text": ("gemma3_text", {**GEMMA, LAYERS: 8, "sliding_window": 6, "sliding_window_pattern": 3,
                                    "query_pre_attn_scalar": 11, "rope_theta": 1e6, "rope_local_base_freq": 5000.0,
                                    "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "deepseek_v2": ("deepseek_v2", {**MLA, "n_routed_experts": 9, "n_shared_experts": 2, "num_experts_per_tok": 4,
                                    "first_k_dense_replace": 0, "n_group": 3, "topk_group": 2,
                                    "topk_method": "group_limited_greedy", "norm_topk_prob": False,
                                    "routed_scaling_factor": 3.0, "rope_scaling": yarn(0.707)}),
    "deepseek_v3": ("deepseek_v3", {**MLA, LAYERS: 4, "q_lora_rank": None, "n_routed_experts": 10,
                                    "n_shared_experts": 3, "num_experts_per_tok": 3, "first_k_dense_replace": 2,
                                    "n_group": 5, "topk_group": 3, "norm_topk_prob": True,
                                    "routed_scaling_factor": 1.7, "rope_interleave": False}),
    "deepseek_v32": ("deepseek_v32", {**MLA, "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2,
                                      "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
                                      "norm_topk_prob": False, "routed_scaling_factor": 1.3, "index_topk": 6,
                                      "index_head_dim": 12, "index_n_heads": 16, "rope_scaling": yarn(1.0)}),
    "glm_moe_dsa": ("glm_moe_dsa", {**MLA, "n_routed_experts": 5, "n_shared_experts": 1, "num_experts_per_tok": 2,
                                    "mlp_layer_types": ["sparse", "dense", "sparse"], "n_group": 1, "topk_group": 1,
                                    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "index_topk": 5,
                                    "index_head_dim": 10, "index_n_heads": 16}),
    "dbrx": ("dbrx", {"d_model": 12, "n_heads": 3, "n_layers": 2, "max_seq_len": 64, "vocab_size": VOCAB,
                      "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
                      "attn_config": {"clip_qkv": 0.7, "kv_n_heads": 1, "rope_theta": 10000.0},
                      "ffn_config": {"hidden_size": 12, "ffn_hidden_size": 10, "moe_num_experts": 5, "moe_top_k": 2,
                                     "moe_normalize_expert_weights": None, "ffn_act_fn": {"name": "silu"}}}),
    "cohere": ("cohere", without(base(layer_norm_eps=1e-4, num_attention_heads=3, head_dim=4, logit_scale=0.3,
                                      use_qk_norm=True, attention_bias=True, tie_word_embeddings=True),
                                 "rms_norm_eps", "head_dim")),
    "phi": ("phi", without(base(hidden_act="gelu_new", layer_norm_eps=1e-4, partial_rotary_factor=0.7,
                                qk_layernorm=True, num_key_value_heads=2), "rms_norm_eps")),
    "phi3": ("phi3", base(num_attention_heads=3, partial_rotary_factor=0.5, hidden_size=24, sliding_window=64,
                          original_max_position_embeddings=16,
                          rope_scaling={"type": "longrope", "short_factor": [1.0, 1.3], "long_factor": [1.1, 2.7]})),
    "phimoe": ("phimoe", base(num_attention_heads=6, num_key_value_heads=3, num_local_experts=5, attention_bias=True,
                              num_experts_per_tok=2, lm_head_bias=True, router_jitter_noise=0.2, sliding_window=9,
                              input_jitter_noise=0.0)),
    "llama4_text": ("llama4_text", base(num_hidden_layers=6, head_dim=6, intermediate_size_mlp=22, rope_theta=5e5,
                                        num_local_experts=3, num_experts_per_tok=2, attention_chunk_size=7,
                                        interleave_moe_layer_step=3, no_rope_layers=[1, 0, 1, 1, 1, 0],
                                        attn_temperature_tuning=True, floor_scale=5, attn_scale=0.3, use_qk_norm=True,
                                        attention_bias=False)),
}  # fmt: skip
EAGER_EXPERTS = {"mixtral", "deepseek_v2", "deepseek_v3", "deepseek_v32", "qwen2_moe", "qwen3_moe", "glm_moe_dsa",
                 "phimoe", "dbrx"}  # fmt: skip


def fill(model: Any, name: str) -> None:
    """Draw every parameter anew, from a stream of its own: nothing is left at an initial one or zero."""
    tensors = [*model.named_parameters(), *(pair for pair in model.named_buffers() if "correction_bias" in pair[0])]
    with torch.no_grad():
        for path, tensor in tensors:
            noise = np.random.default_rng(zlib.crc32(f"hub/{name}/{path}".encode())).standard_normal(tensor.shape)
            if "norm" in path.lower() and path.endswith("weight"):
                value = 0.3 * noise + (0.0 if name.startswith("gemma") else 1.0)
            elif tensor.ndim < 2:
                value = 0.3 * noise
            elif "embed" in path or "wte" in path:
                value = 0.7 * noise
            else:
                value = 1.3 * noise / np.sqrt(tensor.shape[-1])
            tensor.copy_(torch.from_numpy(value.astype(np.float32)))
    model.tie_weights()


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Float32 logits [batch, seq, vocab]."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.from_numpy(ids), use_cache=False).logits.float().numpy()


def make(name: str, out: Path) -> None:
    """Write one fixture."""
    kind, fields = FIXTURES[name]
    config = transformers.CONFIG_MAPPING[kind](**copy.deepcopy(fields))
    more = {"experts_implementation": "eager"} if kind in EAGER_EXPERTS else {}
    auto = transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager", **more).float()
    fill(model, name)
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    hub = {**fields, "model_type": kind, "architectures": [type(model).__name__], "torch_dtype": "float32"}
    ids = np.random.default_rng(zlib.crc32(name.encode())).integers(3, VOCAB, (2, SEQ))
    ids[:, 0] = 1
    found = logits(model, ids)
    new = (folder / "config.json").read_text()
    for text in (new, json.dumps(hub, indent=1)):
        (folder / "config.json").write_text(text)
        again = auto.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, **more)
        assert np.array_equal(logits(again, ids), found), f"{name}: another spelling, other logits"
    (folder / "config.json").write_text(new)
    (folder / "config.hub.json").write_text(json.dumps(hub, indent=1) + "\n")
    np.savez_compressed(folder / "logits.npz", input_ids=ids.astype(np.int32), logits=found)
    print(name, f"{sum(p.stat().st_size for p in folder.iterdir()):,} bytes, logits std {found.std():.2f}")


def main() -> None:
    """Make the fixtures named on the command line, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIXTURES))
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "tests/hub/fixtures")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in arguments.names or FIXTURES:
        make(name, arguments.out)


if __name__ == "__main__":
    main()
