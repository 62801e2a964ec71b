"""The training step: a pure function of (state, batches), several updates a dispatch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from llamax.config.run import RunConfig
from llamax.mesh.rules import Rules, batch_ways, stream_sharding
from llamax.model import pipeline
from llamax.model.exchange import token_axes
from llamax.model.execution import Context, Execution, Stages
from llamax.model.kernels import host_of, kernels_for
from llamax.model.loss import target_weights, training_losses
from llamax.model.transformer import Transformer
from llamax.train.balance import move_biases, split_loads
from llamax.train.optimizer import keep_if, make_optimizer, norms
from llamax.train.precision import precision
from llamax.train.remat import rematerialization
from llamax.train.replicas import one_of, replicas, summed
from llamax.train.schedule import learning_rate
from llamax.train.state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, "..."]]
StepMetrics = dict[str, Float[Array, " steps"]]
Dispatch = Callable[[TrainState, Batch, Int[Array, ""]], tuple[TrainState, StepMetrics, Int[Array, ""]]]

# What layers report -> the weight in `hyper` of its mean over layers, which is also its name among the metrics.
LAYER_LOSSES = {
    "balance": "moe_balance_loss",
    "sequence_balance": "moe_sequence_balance_loss",
    "z": "moe_z_loss",
    "indexer": "indexer_loss",
}
AVERAGE_DECAY = 0.98  # of the running loss that divergence is measured against: about the last 50 steps


# Layers up to which a platform runs straight code (benchmarks/notes.md), though it compiles each layer anew: a scan
# copies every layer's weights out of their stack and what it keeps into another.
STRAIGHT = {"cpu": 8, "gpu": 64}


def execution_of(config: RunConfig, rules: Rules, mesh: Mesh) -> Execution:
    """How a run executes its model on `mesh`."""
    if shared := replicas(config, rules, mesh):
        return execution_of(config, rules, one_of(mesh))._replace(replicas=shared)
    train = config.train
    short = len(config.model.layers) <= straight_layers(mesh.devices.flat[0].platform, mesh.size)
    parallel = config.mesh.sequence_parallel
    cut = ("context", "tensor") if parallel else ("context",)
    inside = stream_sharding(rules, mesh, ("context",)) if parallel else None
    residual = stream_sharding(rules, mesh, cut) if mesh.size > 1 else None
    context = Context(mesh, mesh.shape["context"]) if mesh.shape["context"] > 1 else None
    return Execution(
        compute=precision(train.compute_dtype, mesh.devices.flat).dtype,  # type: ignore[arg-type]
        activation=train.activation_dtype,
        remat=rematerialization(config, mesh)[0],
        unroll=short if train.unroll_layers is None else train.unroll_layers,
        residual=residual,
        kernels=kernels_for(host_of(mesh.devices.flat, mesh.shape), config.mesh.kernels),
        inside=inside,
        head=_head_sharding(config, rules, mesh) or inside,
        context=context,
        stages=_stages(config, rules, mesh, cut),
        tokens=token_axes(rules, inside or residual),
    )


def straight_layers(platform: str, devices: int) -> int:
    """The most layers that run as straight code. On several GPUs a scan keeps weights from being gathered layers ahead
    of their use, so only one that holds all of them goes without."""
    return 0 if platform != "cpu" and devices > 1 else STRAIGHT.get(platform, 0)


def _stages(config: RunConfig, rules: Rules, mesh: Mesh, sequence: tuple[str, ...]) -> Stages | None:
    """The pipeline of a mesh with stages: the parts of train.grad_accumulation are its microbatches."""
    count = mesh.shape[pipeline.AXIS]
    if count == 1:
        return None
    stream = stream_sharding(rules, mesh, sequence).spec
    held = NamedSharding(mesh, PartitionSpec(pipeline.AXIS, *stream))
    return Stages(count, config.train.grad_accumulation, held)


def _head_sharding(config: RunConfig, rules: Rules, mesh: Mesh) -> NamedSharding | None:
    """With stages, each takes its share of the rows to the head where they divide, in place of doing what the others
    do."""
    ways = batch_ways(rules, mesh) * mesh.shape[pipeline.AXIS]
    if mesh.shape[pipeline.AXIS] == 1 or config.train.batch_size % ways:
        return None
    return stream_sharding(rules, mesh, ("context",), batch=(pipeline.AXIS,))


def loss_and_gradients(
    model: Transformer, batch: Batch, hyper: dict[str, Array], config: RunConfig, execution: Execution
) -> tuple[Float[Array, ""], Metrics, Transformer]:
    """(mean nats per predicted token, other metrics, gradients of the objective), accumulated over microbatches.

    The objective is cross-entropy + z-loss, averaged over every predicted token of the whole batch; plus mtp_loss x the
    same of every prediction module, averaged over modules; plus each of LAYER_LOSSES with its weight, averaged over
    the layers that report it and over microbatches. Among the metrics are expert loads [..., experts] under their
    paths (see `join_statistics`): picks of the whole batch; and under log.gradient_noise `micro_grad_norm`, the root
    mean square over microbatches of the norm of each one's own gradient.
    """
    parts = config.train.grad_accumulation
    if execution.stages is not None:  # they are in the pipeline at once, and the batch is one
        batch, parts = jax.tree.map(lambda a: pipeline.interleaved(a, parts), batch), 1
    micro = jax.tree.map(lambda a: a.reshape(parts, a.shape[0] // parts, *a.shape[1:]), batch)
    totals = [
        jnp.maximum(target_weights(batch["tokens"], batch.get("segments"), k).sum(), 1.0)
        for k in range(config.model.mtp + 1)
    ]

    def objective(model: Transformer, part: Batch, hyper: dict[str, Array], totals: list[Array]) -> Any:
        found = training_losses(
            model, part["tokens"], part.get("segments"), hyper["z_loss"], config.train.loss_chunk, execution
        )
        value, sums = (found.nats + found.z) / totals[0], {"loss": found.nats / totals[0]}
        if found.modules:
            means = [nats / total for nats, total in zip(found.modules, totals[1:], strict=True)]
            sums["mtp_loss"] = sum(means, jnp.float32(0.0)) / len(means)
            value = value + hyper["mtp_loss"] * sums["mtp_loss"]
        loads, reports = split_loads(found.statistics)
        for name in (name for name in LAYER_LOSSES if name in reports):
            value = value + hyper[LAYER_LOSSES[name]] * reports[name].mean() / parts
        return value, (sums | loads, _layer_metrics(reports))

    gradients_of = jax.grad(objective, has_aux=True)
    if execution.replicas is not None:
        gradients_of = summed(gradients_of, execution.replicas)
    if parts == 1:
        gradients, (sums, means) = gradients_of(model, batch, hyper, totals)
        return sums.pop("loss"), sums | means, gradients

    def accumulate(carry: Any, part: Batch) -> tuple[Any, Metrics]:
        new, (sums, means) = gradients_of(model, part, hyper, totals)
        if config.log.gradient_noise:  # a part's gradient is its share of the batch's, which is the sum of the parts
            means = means | {"micro_grad_norm": parts**2 * optax.tree.norm(new, squared=True)}
        return jax.tree.map(jnp.add, carry, (new, sums)), means

    first = jax.tree.map(lambda a: a[0], micro)
    shapes = jax.eval_shape(lambda m, p: objective(m, p, hyper, totals)[1][0], model, first)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (model, shapes))
    (gradients, sums), means = jax.lax.scan(accumulate, start, micro)
    averages = {name: values.mean(0) for name, values in means.items()}
    if config.log.gradient_noise:
        averages["micro_grad_norm"] = jnp.sqrt(averages["micro_grad_norm"])
    return sums.pop("loss"), sums | averages, gradients


def _layer_metrics(reports: dict[str, Array]) -> Metrics:
    """Metrics of reports [layers] or, with stages, [microbatch, layers]: averages over microbatches."""
    metrics = {metric: reports[name].mean() for name, metric in LAYER_LOSSES.items() if name in reports}
    if "entropy" in reports:
        metrics |= {
            "moe_entropy_min": reports["entropy"].min(-1).mean(),
            "moe_dead_experts": reports["dead"].sum(-1).mean(),
            "moe_drop_fraction": reports["dropped"].mean(),
        }
    return metrics


def train_step(state: TrainState, batch: Batch, config: RunConfig, execution: Execution) -> tuple[TrainState, Metrics]:
    """One update: (new state, metrics). Router biases move by the load they gave rise to (see `move_biases`).

    A bad step, whose loss or gradient norm is not finite or whose loss exceeds divergence_factor x the running
    average, leaves weights and moments as they were and counts as skipped; its metrics have bad = 1, update_norm = 0.
    """
    hyper = state.hyper
    loss, found, gradients = loss_and_gradients(state.model, batch, hyper, config, execution)
    loads, found = split_loads(found)
    grad_norm = optax.tree.norm(gradients)
    lr = learning_rate(config.schedule.kind, state.step, hyper)
    optimizer = make_optimizer(config.optimizer, hyper, lr)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.model)
    model = move_biases(optax.apply_updates(state.model, updates), loads, hyper["router_bias_rate"])
    average = jnp.where(jnp.isnan(state.average), loss, state.average)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (loss <= hyper["divergence_factor"] * average)
    model, opt_state, average = keep_if(
        good,
        (model, opt_state, AVERAGE_DECAY * average + (1 - AVERAGE_DECAY) * loss),
        (state.model, state.opt_state, state.average),
    )
    param_norm, update_norm = norms(model, state.model)
    metrics = {
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "param_norm": param_norm,
        "update_norm": update_norm,
        "bad": (~good).astype(jnp.float32),
        **found,
    }
    skipped = state.skipped + jnp.where(good, 0, 1)
    return TrainState(model, opt_state, state.step + 1, skipped, average, hyper), metrics


def updates(config: RunConfig, execution: Execution) -> Dispatch:
    """The pure `dispatch(state, batches, count)`: up to steps_per_dispatch updates.

    `batches` has arrays [steps_per_dispatch, batch, ...] of which the first `count` are used. The trip count is data,
    so the same program runs whatever `count` is: where a run is interrupted cannot change its numbers.

    Returns the state, metrics [steps_per_dispatch] (valid where < the number of steps run) and that number; under
    on_divergence=stop it ends at the first bad step, and a later dispatch of that state does nothing.
    """
    stop = config.train.on_divergence == "stop"
    capacity = config.train.steps_per_dispatch

    @jax.jit  # traced once for the shapes of the metrics and the body; inlined it would lose its source lines
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return train_step(state, batch, config, execution)

    def dispatch(state: TrainState, batches: Batch, count: Array) -> tuple[TrainState, StepMetrics, Array]:
        def at(i: Array) -> Batch:
            return {name: jax.lax.dynamic_index_in_dim(a, i, keepdims=False) for name, a in batches.items()}

        shapes = jax.eval_shape(step, state, at(jnp.int32(0)))[1]
        empty = {name: jnp.zeros((capacity,), shape.dtype) for name, shape in shapes.items()}

        def body(carry: Any) -> Any:
            i, state, metrics = carry
            state, new = step(state, at(i))
            metrics = {name: metrics[name].at[i].set(value) for name, value in new.items()}
            return i + 1, state, metrics

        def more(carry: Any) -> Array:
            i, state, _ = carry
            return (i < count) & (state.skipped == 0) if stop else i < count

        run, state, metrics = jax.lax.while_loop(more, body, (jnp.int32(0), state, empty))
        return state, metrics, run

    return dispatch


def make_dispatch(config: RunConfig, rules: Rules, mesh: Mesh, abstract: TrainState) -> Dispatch:
    """`updates` of one run as a compiled program on `mesh`; the state is donated."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    dispatch = updates(config, execution_of(config, rules, mesh))
    options = compiler_options(mesh.devices.flat)
    return jax.jit(dispatch, donate_argnums=0, out_shardings=(places, None, None), compiler_options=options)


CPU_OPTIONS = {
    "xla_backend_optimization_level": 2,  # of LLVM: a quarter less to compile than 3, steps as fast
    "xla_cpu_prefer_vector_width": 512,  # where a CPU has AVX-512: exponentials of small models in half the time
}


def compiler_options(devices: Iterable[jax.Device]) -> dict[str, Any] | None:
    """XLA's options for a dispatch: CPU_OPTIONS on CPUs (benchmarks/notes.md). Those in XLA_FLAGS are left alone."""
    if any(device.platform != "cpu" for device in devices):
        return None
    return {name: value for name, value in CPU_OPTIONS.items() if name not in os.environ.get("XLA_FLAGS", "")}
