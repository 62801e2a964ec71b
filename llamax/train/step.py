"""The training step: a pure function of (state, batches), several updates a dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llamax.config.run import RunConfig
from llamax.mesh.rules import Rules, batch_sharding
from llamax.model.execution import Execution
from llamax.model.loss import next_token_loss
from llamax.model.transformer import Transformer
from llamax.train.optimizer import keep_if, make_optimizer
from llamax.train.schedule import learning_rate
from llamax.train.state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]
StepMetrics = dict[str, Float[Array, " steps"]]
Dispatch = Callable[[TrainState, Batch, Int[Array, ""]], tuple[TrainState, StepMetrics, Int[Array, ""]]]

AVERAGE_DECAY = 0.98  # of the running loss that divergence is measured against: about the last 50 steps


def execution_of(config: RunConfig, rules: Rules, mesh: Mesh) -> Execution:
    """How a run executes its model on `mesh`."""
    train = config.train
    return Execution(
        compute=train.compute_dtype,
        activation=train.activation_dtype,
        remat=train.remat,
        unroll=train.unroll_layers,
        residual=batch_sharding(rules, mesh) if mesh.size > 1 else None,
    )


def loss_and_gradients(
    model: Transformer, batch: Batch, hyper: dict[str, Array], config: RunConfig, execution: Execution
) -> tuple[Float[Array, ""], Metrics, Transformer]:
    """(mean nats per predicted token, router metrics, gradients of the objective), accumulated over microbatches.

    The objective is cross-entropy + z-loss, averaged over every predicted token of the whole batch, plus
    moe_balance_loss x balance + moe_z_loss x z averaged over MoE layers and microbatches.
    """
    parts = config.train.grad_accumulation
    micro = jax.tree.map(lambda a: a.reshape(parts, a.shape[0] // parts, *a.shape[1:]), batch)
    total = jnp.float32(batch["tokens"][:, 1:].size)
    if "segments" in batch:
        total = jnp.maximum(jnp.sum(batch["segments"][:, 1:] == batch["segments"][:, :-1]).astype(jnp.float32), 1.0)

    def objective(model: Transformer, part: Batch) -> tuple[Array, tuple[Array, Metrics]]:
        nats, z, _, routers = next_token_loss(
            model, part["tokens"], part.get("segments"), None, hyper["z_loss"], config.train.loss_chunk, execution
        )
        value = (nats + z) / total
        if routers:
            balance = hyper["moe_balance_loss"] * routers["balance"].mean() + hyper["moe_z_loss"] * routers["z"].mean()
            value = value + balance / parts
        return value, (nats / total, _router_metrics(routers))

    value_and_grad = jax.grad(objective, has_aux=True)
    if parts == 1:
        gradients, (loss, routers) = value_and_grad(model, batch)
        return loss, routers, gradients

    def accumulate(carry: Any, part: Batch) -> tuple[Any, Metrics]:
        gradients, loss = carry
        new, (nats, routers) = value_and_grad(model, part)
        return (jax.tree.map(jnp.add, gradients, new), loss + nats), routers

    start = (jax.tree.map(jnp.zeros_like, model), jnp.float32(0.0))
    (gradients, loss), routers = jax.lax.scan(accumulate, start, micro)
    return loss, {name: values.mean(0) for name, values in routers.items()}, gradients


def _router_metrics(routers: dict[str, Array]) -> Metrics:
    if not routers:
        return {}
    return {
        "moe_balance_loss": routers["balance"].mean(),
        "moe_z_loss": routers["z"].mean(),
        "moe_entropy_min": routers["entropy"].min(),
        "moe_dead_experts": routers["dead"].sum(),
        "moe_drop_fraction": routers["dropped"].mean(),
    }


def train_step(state: TrainState, batch: Batch, config: RunConfig, execution: Execution) -> tuple[TrainState, Metrics]:
    """One update: (new state, metrics).

    A bad step, whose loss or gradient norm is not finite or whose loss exceeds divergence_factor x the running
    average, leaves weights and moments as they were and counts as skipped; its metrics have bad = 1.
    """
    hyper = state.hyper
    loss, routers, gradients = loss_and_gradients(state.model, batch, hyper, config, execution)
    grad_norm = optax.tree.norm(gradients)
    lr = learning_rate(config.schedule.kind, state.step, hyper)
    optimizer = make_optimizer(config.optimizer, hyper, lr)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.model)
    model = optax.apply_updates(state.model, updates)
    average = jnp.where(jnp.isnan(state.average), loss, state.average)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (loss <= hyper["divergence_factor"] * average)
    model, opt_state, average = keep_if(
        good,
        (model, opt_state, AVERAGE_DECAY * average + (1 - AVERAGE_DECAY) * loss),
        (state.model, state.opt_state, state.average),
    )
    metrics = {
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(model),
        "update_norm": optax.tree.norm(updates),
        "bad": (~good).astype(jnp.float32),
        **routers,
    }
    skipped = state.skipped + jnp.where(good, 0, 1)
    return TrainState(model, opt_state, state.step + 1, skipped, average, hyper), metrics


def make_dispatch(config: RunConfig, rules: Rules, mesh: Mesh, abstract: TrainState) -> Dispatch:
    """The compiled `dispatch(state, batches, count)`: up to steps_per_dispatch updates in one program.

    `batches` has arrays [steps_per_dispatch, batch, ...] of which the first `count` are used. The trip count is data,
    so the same program runs whatever `count` is: where a run is interrupted cannot change its numbers.

    Returns the state, metrics [steps_per_dispatch] (valid where < the number of steps run) and that number; under
    on_divergence=stop it ends at the first bad step, and a later dispatch of that state does nothing. The state is
    donated.
    """
    execution = execution_of(config, rules, mesh)
    stop = config.train.on_divergence == "stop"
    capacity = config.train.steps_per_dispatch

    def dispatch(state: TrainState, batches: Batch, count: Array) -> tuple[TrainState, StepMetrics, Array]:
        def at(i: Array) -> Batch:
            return {name: jax.lax.dynamic_index_in_dim(a, i, keepdims=False) for name, a in batches.items()}

        shapes = jax.eval_shape(lambda s, b: train_step(s, b, config, execution)[1], state, at(jnp.int32(0)))
        empty = {name: jnp.zeros((capacity,), shape.dtype) for name, shape in shapes.items()}

        def body(carry: Any) -> Any:
            i, state, metrics = carry
            state, new = train_step(state, at(i), config, execution)
            metrics = {name: metrics[name].at[i].set(value) for name, value in new.items()}
            return i + 1, state, metrics

        def more(carry: Any) -> Array:
            i, state, _ = carry
            return (i < count) & (state.skipped == 0) if stop else i < count

        run, state, metrics = jax.lax.while_loop(more, body, (jnp.int32(0), state, empty))
        return state, metrics, run

    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(dispatch, donate_argnums=0, out_shardings=(places, None, None))
