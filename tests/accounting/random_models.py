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


def random_family_model(seed: int) -> ModelConfig:
    """A small model of the components that later families brought: latent and sparse attention, windows and chunks,
    QK norms per head, routers with a bias, shared gates, branches, weightless norms, prediction modules."""
    rng = random.Random(1000 + seed)

    def flag() -> bool:
        return rng.random() < 0.5

    def norm() -> dict[str, Any]:
        return rng.choice(
            [{"kind": "rmsnorm", "weight": w} for w in ("one", "one_plus", "none")] + [{"kind": "layernorm"}]
        )

    def dense(kind: str = "swiglu") -> dict[str, Any]:
        more = {"limit": 0.5, "linear": "one_plus"} if kind.endswith("glu") and flag() else {}
        return {"kind": kind, "d_ff": rng.choice([24, 40]), **more}

    def moe() -> dict[str, Any]:
        router: dict[str, Any] = {"score": "sigmoid", "bias": flag(), "weigh": rng.choice(["input", "output"])}
        if flag():
            router["groups"] = {"count": 2, "keep": 1}
        shared = {"shared": dense("gelu"), "shared_gate": flag()} if flag() else {}
        top_k = rng.choice([1, 2])
        return {"kind": "moe", "experts": 4, "top_k": top_k, "expert": dense(), "router": router, **shared}

    def latent() -> dict[str, Any]:
        a = {"kind": "mla", "heads": 2, "q_rank": rng.choice([None, 6]), "kv_rank": 5, "nope_dim": 6, "rope_dim": 4}
        if a["q_rank"] is not None and flag():
            a["indexer"] = {"heads": 3, "head_dim": rng.choice([4, 8]), "top_k": rng.choice([2, 4])}
        return {**a, "value_dim": rng.choice([7, 9])}

    def grouped() -> dict[str, Any]:
        mask = rng.choice([{"window": 3}, {"chunk": 3}, {"block_sparse": {"size": 2, "local": 1, "stride": 3}}])
        a: dict[str, Any] = {"heads": 4, "kv_heads": rng.choice([1, 2]), "head_dim": 4, **mask}
        if flag():
            a |= {"qk_norm": norm(), "qk_norm_weights": rng.choice(["shared", "per_head"])}
        return a

    sequential = flag()
    block: dict[str, Any] = {"mlp": moe(), **({"branch": moe()} if sequential else {})}
    data = {
        "vocab_size": 32,
        "d_model": 16,
        "max_seq_len": 24,
        "segments": [{"repeat": 2}, {"repeat": rng.choice([1, 3]), "unit": [{}, block]}],
        "attention": latent() if flag() else grouped(),
        "position": {"kind": "rope", "layout": rng.choice(["half", "interleaved"])},
        "mlp": dense(),
        "norm": norm(),
        "residual": "sequential" if sequential else "parallel",
        "head": {"tied": flag()},
        "mtp": rng.choice([0, 1, 2]),
    }
    return validate(ModelConfig, data, f"random family model {seed}")
