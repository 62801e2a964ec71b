"""Experts over devices: every token reaches its experts and comes back, as if they were all on one device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llamax.config.components import DenseMlp, Init, MoeMlp, Router
from llamax.config.mesh import MeshConfig, load_rules
from llamax.mesh.rules import batch_sharding, make_mesh, shardings
from llamax.model import exchange
from llamax.model.execution import Execution
from llamax.model.moe import MixtureOfExperts

from .modules import randomized

EXPERTS, WIDTH, BATCH, SEQ = 8, 16, 16, 4
PLATFORMS = ("tpu", "cuda", "cpu")
EXPERT, SHARED = DenseMlp(kind="swiglu", d_ff=8), DenseMlp(kind="swiglu", d_ff=4)
KINDS = {
    "softmax": MoeMlp(kind="moe", experts=EXPERTS, top_k=2, expert=EXPERT),
    "shared, biased, weighed input": MoeMlp(
        kind="moe", experts=EXPERTS, top_k=3, expert=EXPERT, shared=SHARED, shared_gate=True,
        router=Router(score="sigmoid", bias=True, weigh="input"),
    ),
}  # fmt: skip


@functools.cache
def layer_of(kind: str) -> MixtureOfExperts:
    return randomized(lambda key: MixtureOfExperts(KINDS[kind], WIDTH, Init(), jnp.float32(1), key=key), 0.7)


def inputs() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, SEQ, WIDTH)), jnp.float32)


def value_and_gradients(execution: Execution) -> Any:
    """Of a number that depends on every output and on every loss of the router."""

    def objective(layer: MixtureOfExperts, x: jax.Array) -> tuple[jax.Array, Any]:
        y, found = layer(x, execution)
        losses = found["balance"] + found["sequence_balance"] + found["z"]
        return jnp.sum(y * jnp.cos(jnp.arange(WIDTH))) + 10 * losses, (y, found)

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))


@functools.cache
def on_one_device(kind: str) -> Any:
    return value_and_gradients(Execution())


def placed(sizes: dict[str, int]) -> tuple[Any, Any, Execution]:
    rules, mesh = load_rules("default"), make_mesh(MeshConfig(**{"data": 1, **sizes}))
    residual = batch_sharding(rules, mesh)
    return rules, mesh, Execution(residual=residual, tokens=exchange.token_axes(rules, residual))


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ({"expert": 2, "fsdp": 2, "tensor": 2}, "softmax"),
        ({"expert": 4, "data": 2}, "shared, biased, weighed input"),
        ({"expert": 8}, "softmax"),
    ],
)
def test_value_and_gradient_equal_one_device(sizes: dict[str, int], kind: str) -> None:
    rules, mesh, execution = placed(sizes)
    layer, x = layer_of(kind), inputs()
    program = value_and_gradients(execution)
    places = shardings(layer, layer, rules, mesh)
    for crowded in (False, True):  # as the router likes, or all tokens on the first experts: many rounds
        if crowded:
            router = np.asarray(layer.router[...]).copy()
            x, router[0] = x.at[..., 0].set(5.0), np.linspace(30, 0, EXPERTS)
            layer = jax.tree.map(lambda a: a, layer)
            layer.router.set_value(jnp.asarray(router))
        one = on_one_device(kind)(layer, x)
        many = program(jax.device_put(layer, places), jax.device_put(x, execution.residual))
        dead = float(one[0][1][1]["dead"])
        assert dead >= EXPERTS - KINDS[kind].top_k - 1 if crowded else dead <= 1
        for (path, expected), found in zip(
            jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(many), strict=True
        ):
            scale = 1e-6 * max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(found, expected, atol=5 * scale, err_msg=jax.tree_util.keystr(path))


def test_no_device_meets_tokens_of_others_without_an_expert_axis() -> None:
    """With data parallelism alone the forward pass of a mixture moves no token and no choice between devices."""
    _, _, execution = placed({"data": 8})
    layer, x = layer_of("softmax"), jax.device_put(inputs(), execution.residual)
    text = jax.jit(lambda layer, x: layer(x, execution)[0]).lower(layer, x).compile().as_text()
    assert "shard_map" in text
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f" {collective}(" not in text


# ---------------------------------------------------------------- the ragged exchange
def emulated(operand: Any, output: Any, starts: Any, send: Any, there: Any, receive: Any, *, axis_name: Any) -> Any:
    """`jax.lax.ragged_all_to_all` as its documentation has it: rows starts[p] .. starts[p] + send[p] of a device's
    operand are written to device p's output from row there[p] on."""
    me = jax.lax.axis_index(axis_name)
    operands, starts, send, there = (jax.lax.all_gather(a, axis_name) for a in (operand, starts, send, there))
    for source in range(operands.shape[0]):
        place = jnp.arange(output.shape[0]) - there[source, me]
        sent = (place >= 0) & (place < send[source, me])
        rows = operands[source][jnp.clip(place + starts[source, me], 0, operand.shape[0] - 1)]
        output = jnp.where(sent[:, None], rows, output)
    return output


def test_the_ragged_exchange_puts_rows_where_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    peers, width = 4, 5
    _, mesh, _ = placed({"expert": peers, "data": 2})
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.standard_normal((peers * peers, width, 3)), jnp.float32)
    send = rng.integers(0, width + 1, (peers, peers)).astype(np.int32)
    assert {0, width} <= set(send.ravel().tolist())
    sizes = jnp.asarray(send.reshape(-1)), jnp.asarray(send.T.reshape(-1))
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)

    def on_mesh(function: Any) -> np.ndarray:
        spec = PartitionSpec("expert")
        whole = jax.shard_map(
            functools.partial(function, axis=("expert",)), mesh=mesh, in_specs=(spec,) * 3, out_specs=spec,
            check_vma=False,
        )  # fmt: skip
        return np.asarray(jax.jit(whole)(rows, *sizes)).reshape(peers, peers, width, 3)

    filled = np.arange(width) < send.T[..., None]
    found, expected = on_mesh(exchange._ragged), on_mesh(exchange.reference)
    np.testing.assert_array_equal(found[filled], expected[filled])
    assert np.all(found[~filled] == 0)
    parts = np.asarray(rows).reshape(peers, peers, width, 3)
    np.testing.assert_array_equal(expected, parts.swapaxes(0, 1))


def test_the_programs_of_backends() -> None:
    """There and back, forward and backward, in the first round and in the loop's body; on a CPU no such operation."""
    _, _, execution = placed({"expert": 4, "data": 2})
    traced = value_and_gradients(execution).trace(layer_of("softmax"), inputs())
    count = {p: traced.lower(lowering_platforms=(p,)).as_text().count("@ragged_all_to_all(") for p in PLATFORMS}
    assert count["cpu"] == 0
    assert min(count["cuda"], count["tpu"]) >= 8
