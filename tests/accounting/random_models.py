"""Small models of random components, for tests that must hold for every combination."""

from __future__ import annotations

import random
from typing import Any

from llamax.config.load import validate
from llamax.config.model import ModelConfig


def random_model(seed: int) -> ModelConfig:
    """A small model of randomly chosen components, one to three segments with a unit of up to two different blocks."""
    rng = random.Random(seed)

    def flag() -> bool:
        return rng.random() < 0.5

    def norm() -> dict[str, Any]:
        return rng.choice([{"kind": "rmsnorm"}, {"kind": "layernorm", "bias": flag()}, {"kind": "none"}])

    def dense(bias: bool) -> dict[str, Any]:
        kind = rng.choice(["swiglu", "geglu", "reglu", "relu2", "gelu", "silu"])
        return {"kind": kind, "d_ff": rng.choice([24, 40]), "bias": bias}

    def mlp() -> dict[str, Any]:
        if flag():
            return dense(flag())
        shared = {"shared": dense(flag())} if flag() else {}
        return {"kind": "moe", "experts": 4, "top_k": rng.choice([1, 2]), "expert": dense(False), **shared}

    def block() -> dict[str, Any]:
        part: dict[str, Any] = {"norm": norm()} if flag() else {}
        if flag():
            part["mlp"] = mlp()
        if flag():
            part["attention"] = {"window": rng.choice([3, 5]), "qkv_bias": flag()}
        return part

    residual = rng.choice(["sequential", "parallel"])
    heads = rng.choice([2, 4])
    attention = {"heads": heads, "kv_heads": rng.choice([1, 2, heads]), "qkv_bias": flag(), "out_bias": flag()}
    if flag():
        attention["head_dim"] = 10
    if flag():
        attention["qk_norm"] = norm()
    position = rng.choice(["rope", "learned", "sinusoidal", "alibi", "nope"])
    segments = [
        {"repeat": rng.choice([1, 2, 3]), "unit": [block() for _ in range(rng.choice([1, 2]))]}
        for _ in range(rng.choice([1, 2, 3]))
    ]
    data = {
        "vocab_size": rng.choice([32, 48]),
        "d_model": 16,
        "max_seq_len": 24,
        "segments": segments,
        "attention": attention,
        "position": {"kind": position},
        "mlp": mlp(),
        "norm": norm(),
        "placement": "pre" if residual == "parallel" else rng.choice(["pre", "post", "sandwich"]),
        "residual": residual,
        "head": {"tied": flag(), "bias": flag()},
    }
    return validate(ModelConfig, data, f"random model {seed}")
