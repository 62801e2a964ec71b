"""Balance without a loss: the rule that moves router biases, in the step and on a mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llamax.config.mesh import load_rules
from llamax.config.run import AdamW, Muon, RunConfig, Schedule
from llamax.mesh.rules import batch_sharding, make_mesh
from llamax.model.execution import Execution
from llamax.model.transformer import Transformer
from llamax.train.balance import move_biases, split_loads
from llamax.train.optimizer import hyperparameters, make_optimizer
from llamax.train.param_info import param_table
from llamax.train.state import TrainState, abstract_state, hyper_of, init_state
from llamax.train.step import loss_and_gradients, make_dispatch
from tests.train.runs import go, prepare, run_config, tokens_of

BIASED = (
    "model.mlp={kind: moe, experts: 8, top_k: 2, expert: {kind: swiglu, d_ff: 8}, router: {score: sigmoid, bias: true}}"
)
# Nothing but the bias balances: no balance loss, and a learning rate too small to move the router.
ALONE = (BIASED, "train.moe_balance_loss=0", "train.moe_z_loss=0", "optimizer.lr=1e-9", "optimizer.weight_decay=0")
PATH = "stacks.0.blocks.0.mlp"


def lopsided(state: TrainState) -> TrainState:
    """Routers that prefer experts 0 and 1 for every token, by a feature that all tokens share."""
    model = state.model
    model.embedding.set_value(model.embedding[...].at[:, 0].set(0.1))
    router = model.stacks[0].blocks[0].mlp.router
    router.set_value(router[...].at[:, 0, :2].set(0.5))
    return state


def bias_of(state: TrainState) -> np.ndarray:
    return np.asarray(state.model.stacks[0].blocks[0].mlp.router_bias[...])


@pytest.fixture(scope="module")
def runs() -> dict[float, tuple[TrainState, Any]]:
    """Thirty steps from a lopsided router, by rate of the rule."""
    found = {}
    for rate in (0.0, 0.02):
        config = run_config(*ALONE, f"train.router_bias_rate={rate}", "train.steps_per_dispatch=30", "train.steps=30")
        if not found:
            dispatch, state = prepare(config)
            state = lopsided(state)
        started = dataclasses.replace(state, hyper=hyper_of(config, 30))
        after, metrics, ran = go(dispatch, started, tokens_of(30, config), 30)
        assert ran == 30
        found[rate] = after, metrics
    return found


def test_the_rule_evens_the_load_and_nothing_else_does(runs: Any) -> None:
    without, with_rule = runs[0.0][1]["moe_entropy_min"], runs[0.02][1]["moe_entropy_min"]
    assert without[0] == with_rule[0] < 0.5  # 1/3: all picks on two of eight
    assert abs(without[-1] - without[0]) < 0.05
    assert with_rule[-1] > 0.75
    assert not np.any(bias_of(runs[0.0][0]))
    assert np.all(bias_of(runs[0.02][0])[:, :2] < bias_of(runs[0.02][0])[:, 2:].min(1, keepdims=True))


def test_one_step_by_hand() -> None:
    """b_i += rate sign(mean - load_i), with the load of all four microbatches of the step."""
    config = run_config(*ALONE, "train.grad_accumulation=4", "train.router_bias_rate=0.25")
    state = prepare(config)[1]
    batch = {name: value[0] for name, value in tokens_of(1, config).items()}
    run = jax.jit(lambda m, b: loss_and_gradients(m, b, hyper_of(config, 1), config, Execution()))
    _, found, gradients = run(state.model, batch)
    loads, _ = split_loads(found)
    whole = run_config(*ALONE)
    everything = jax.jit(lambda m, b: loss_and_gradients(m, b, hyper_of(whole, 1), whole, Execution()))
    np.testing.assert_array_equal(loads[f"load.{PATH}"], everything(state.model, batch)[1][f"load.{PATH}"])
    load = np.asarray(loads[f"load.{PATH}"])
    assert load.shape == (2, 8)
    assert np.all(load.sum(1) == 8 * 16 * 2)
    assert not np.any(gradients.stacks[0].blocks[0].mlp.router_bias[...])
    moved = move_biases(state.model, loads, jnp.float32(0.25)).stacks[0].blocks[0].mlp.router_bias[...]
    np.testing.assert_array_equal(moved, 0.25 * np.sign(load.mean(1, keepdims=True) - load))
    even = move_biases(state.model, {f"load.{PATH}": jnp.full((2, 8), 7.0)}, jnp.float32(0.25))
    assert not np.any(even.stacks[0].blocks[0].mlp.router_bias[...])


def test_a_skipped_step_moves_no_bias() -> None:
    config = run_config(*ALONE, "train.on_divergence=skip", "train.router_bias_rate=0.1")
    dispatch, state = prepare(config)
    bad = dataclasses.replace(state, hyper={**state.hyper, "z_loss": jnp.float32(jnp.inf)})
    after, metrics, _ = go(dispatch, bad, tokens_of(10, config), 2)
    assert metrics["bad"].tolist() == [1.0, 1.0]
    assert not np.any(bias_of(after))
    good, _, _ = go(dispatch, state, tokens_of(10, config), 1)
    assert np.abs(bias_of(good)).max() == pytest.approx(0.1)


@pytest.mark.parametrize("optimizer", [AdamW(weight_decay=0.5), Muon(weight_decay=0.5)], ids=lambda o: o.kind)
def test_an_optimizer_leaves_buffers_alone(optimizer: Any) -> None:
    """No update, no decay, no moments, whatever the gradient."""
    config = run_config(BIASED).model
    model = jax.jit(lambda k: Transformer(config, key=k))(jax.random.key(0))
    shapes = jax.eval_shape(lambda m: m, model)
    model.stacks[0].blocks[0].mlp.router_bias.set_value(jnp.ones((2, 8)))
    hyper = hyperparameters(optimizer, Schedule(), 10)

    @jax.jit
    def update(model: Any) -> Any:
        rule = make_optimizer(optimizer, hyper, 0.1)
        updates, state = rule.update(jax.tree.map(jnp.ones_like, model), rule.init(model), model)
        return optax.apply_updates(model, updates), state

    after, state = update(model)
    np.testing.assert_array_equal(after.stacks[0].blocks[0].mlp.router_bias[...], np.ones((2, 8)))
    assert not np.array_equal(after.stacks[0].blocks[0].mlp.router[...], model.stacks[0].blocks[0].mlp.router[...])
    assert [info.group for info in param_table(shapes)].count("buffer") == 1
    assert (2, 8) not in {leaf.shape for leaf in jax.tree.leaves(state)}


MESHES = [{"data": 8}, {"fsdp": 2, "expert": 4, "data": 1}]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_sharded_equals_unsharded(mesh: dict[str, int]) -> None:
    """The load is the whole global batch's, so every bias is the same to the last bit."""

    def biases(sizes: dict[str, int], devices: list[jax.Device]) -> np.ndarray:
        config: RunConfig = run_config(BIASED, "train.router_bias_rate=0.01").model_copy(
            update={"mesh": run_config().mesh.model_copy(update=sizes)}
        )
        rules, found = load_rules(config.mesh.rules), make_mesh(config.mesh, devices)
        abstract = abstract_state(config, rules, found)
        batches = jax.device_put(tokens_of(10, config), batch_sharding(rules, found, leading=1))
        state = init_state(config, 10, abstract)
        return bias_of(make_dispatch(config, rules, found, abstract)(state, batches, jnp.int32(4))[0])

    one = biases({"data": 1}, jax.devices()[:1])
    np.testing.assert_array_equal(biases(mesh, jax.devices()), one)
    assert np.any(one)
