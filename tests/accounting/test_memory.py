"""Bytes against the real optimizer's state, XLA's own analysis and hand counts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llamax.accounting import MEMORY_RULES, count_params, kv_cache_bytes_per_token, memory_bytes, training_state_bytes
from llamax.config.load import load_model, load_run, run_from_data


def test_keys_and_total() -> None:
    got = memory_bytes(load_run("tiny"))
    assert set(got) == set(MEMORY_RULES)
    assert got["total"] == sum(v for k, v in got.items() if k != "total")
    assert got["parameters"] == 4 * count_params(load_run("tiny").model).total


@pytest.mark.parametrize("kind", ["adamw", "muon", "lion", "adafactor", "sgd"])
@pytest.mark.parametrize("model", ["ladder/d256", "tiny-moe"])
def test_optimizer_bytes_are_those_of_the_real_state(kind: str, model: str) -> None:
    from llamax.model.transformer import Transformer
    from llamax.train.optimizer import hyperparameters, make_optimizer

    overrides = [f"optimizer.kind={kind}"] + ([f"model={model}"] if model != "tiny-moe" else [])
    config = load_run("tiny" if overrides[1:] else model, overrides)

    def state(key: jax.Array) -> object:
        hyper = hyperparameters(config.optimizer, config.schedule, 10)
        return make_optimizer(config.optimizer, hyper, jnp.float32(0.1)).init(Transformer(config.model, key=key))

    leaves = jax.tree.leaves(jax.eval_shape(state, jax.random.key(0)))
    real = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    # step counters, and the one-element arrays adafactor leaves unused
    placeholders = sum(4 * leaf.size for leaf in leaves if leaf.size <= 32)
    assert real - placeholders <= memory_bytes(config)["optimizer"] <= real


OTHER = ["train.seq_len=32", "model.mlp.kind=gelu", "model.placement=sandwich"]
LATENT = "model.attention={kind: mla, heads: 4, q_rank: 48, kv_rank: 32, nope_dim: 24, rope_dim: 8, value_dim: 32}"


@pytest.mark.parametrize(("remat", "change"), [("none", []), ("full", []), ("none", OTHER), ("none", [LATENT])])
def test_activations_are_within_a_factor_of_two_of_xla(remat: str, change: list[str]) -> None:
    """XLA's scratch for the gradient of the loss, less the gradients themselves, which it must hold too."""
    from llamax.model.execution import Execution
    from llamax.model.loss import next_token_loss
    from llamax.model.transformer import Transformer

    size = ["model=ladder/d128", "model.attention={heads: 4, kv_heads: 2, head_dim: 32}", "train.batch_size=8"]
    size += ["train.compute_dtype=float32"]
    config = load_run("tiny", [*size, f"train.remat={remat}", *change])
    execution = Execution(remat=remat)  # type: ignore[arg-type]
    made = jax.eval_shape(lambda key: Transformer(config.model, key=key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((config.train.batch_size, config.train.seq_len + 1), jnp.int32)

    def loss(m: Transformer, t: jax.Array) -> jax.Array:
        return next_token_loss(m, t, None, None, jnp.float32(0.0), None, execution)[0]

    analysis = jax.jit(jax.grad(loss)).lower(made, tokens).compile().memory_analysis()
    predicted = memory_bytes(config)
    estimate = predicted["activations"] + predicted["logits"]
    assert 0.5 < estimate / analysis.temp_size_in_bytes < 2.0, (estimate, analysis.temp_size_in_bytes)


def test_state_of_what_no_gradient_reaches() -> None:
    """By hand: V3's prediction module is trained, so it has gradients and moments; its router biases have neither."""
    params, state = count_params(load_model("deepseek_v3/671b")), training_state_bytes(load_model("deepseek_v3/671b"))
    trained = params.total + params.mtp
    assert state == {
        "parameters": 4 * (trained + params.buffers + 256),  # the module's own router bias is in no count
        "optimizer": 8 * trained,
        "gradients": 4 * trained,
    }


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_every_component_takes_room(remat: str) -> None:
    """An indexer, a shared expert, a branch, a prediction module: each more than without it."""
    mla = {"kind": "mla", "heads": 2, "q_rank": 8, "kv_rank": 8, "nope_dim": 8, "rope_dim": 8, "value_dim": 8}
    moe = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 32}}
    indexer = {"heads": 2, "head_dim": 8, "top_k": 4}
    shared = {"kind": "swiglu", "d_ff": 64}
    steps = [
        {"attention": mla}, {"attention": mla | {"indexer": indexer}}, {"mlp": moe}, {"mlp": moe | {"shared": shared}},
        {"mlp": moe | {"shared": shared}, "branch": moe},
    ]  # fmt: skip

    def size(change: dict[str, Any]) -> int:
        data = {"model": {"base": "ladder/d64"} | change, "train": {"steps": 1, "remat": remat}}
        return memory_bytes(run_from_data({"base": "tiny"} | data))["activations"]

    assert size(steps[0]) < size(steps[1])
    assert size(steps[2]) < size(steps[3]) < size(steps[4])
    assert size(steps[0]) < size(steps[0] | {"mtp": 1}) < size(steps[0] | {"mtp": 2})


def test_remat_keeps_less() -> None:
    full, dots, none = (
        memory_bytes(load_run("tiny", [f"train.remat={r}"]))["activations"] for r in ("full", "dots", "none")
    )
    assert full < dots < none


def test_accumulation_keeps_two_gradients_and_smaller_activations() -> None:
    one, four = (memory_bytes(load_run("tiny", [f"train.grad_accumulation={n}"])) for n in (1, 4))
    assert four["gradients"] == 2 * one["gradients"]
    assert four["activations"] * 4 == one["activations"]


def test_loss_chunk_bounds_the_logits() -> None:
    assert memory_bytes(load_run("tiny", ["train.loss_chunk=64"]))["logits"] == 2 * 4 * 64 * 256
    assert memory_bytes(load_run("tiny"))["logits"] == 2 * 4 * 32 * 128 * 256


@pytest.mark.parametrize(
    ("name", "expected"), [("llama3/8b", 131072), ("llama1/7b", 524288), ("mixtral/8x22b", 229376)]
)
def test_kv_cache(name: str, expected: int) -> None:
    assert kv_cache_bytes_per_token(load_model(name)) == expected
