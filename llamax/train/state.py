"""The training state: everything a step reads and writes, as one pytree of arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from llamax.config.run import RunConfig
from llamax.mesh.rules import Rules, shardings
from llamax.model.transformer import Transformer
from llamax.train.optimizer import hyperparameters, make_optimizer
from llamax.train.shape import TRAIN_NUMBERS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Weights, optimizer state, counters, and every number that does not change a shape.

    `step` counts optimizer updates tried, `skipped` those not applied, `average` is the running mean of the loss that
    divergence is measured against (nats per token, NaN before the first step). The fields are not typed as arrays
    because a tree of the same shape also holds shapes, shardings and what JAX puts there while it traces.
    """

    model: Any  # Transformer
    opt_state: Any
    step: Any  # int32 scalar
    skipped: Any  # int32 scalar
    average: Any  # float32 scalar
    hyper: dict[str, Any]  # float32 scalars


def hyper_of(config: RunConfig, total_steps: int) -> dict[str, Array]:
    """The arrays of `TrainState.hyper`: optimizer, schedule, and TRAIN_NUMBERS of the train section."""
    values = hyperparameters(config.optimizer, config.schedule, total_steps)
    for name in TRAIN_NUMBERS:
        values[name] = getattr(config.train, name)
    return jax.device_put({name: np.float32(value) for name, value in values.items()})  # jnp.float32 would compile


def seed_of(config: RunConfig) -> np.int32:
    """The seed as `jax.random.key` takes it: its low 32 bits."""
    return np.int32(np.array(config.train.seed).astype(np.int32))


@functools.partial(jax.jit, static_argnums=0, inline=True)  # traced once for the shapes and the state itself
def _initial(config: RunConfig, hyper: dict[str, Array], seed: Array) -> TrainState:
    model = Transformer(config.model, key=jax.random.key(seed))
    opt_state = make_optimizer(config.optimizer, hyper, hyper["lr"]).init(model)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(model, opt_state, zero, zero, jnp.float32(jnp.nan), hyper)


def abstract_state(config: RunConfig, rules: Rules, mesh: Mesh) -> TrainState:
    """The state as shapes with shardings on `mesh`: what a restore targets, and what `init_state` fills.

    Raises:
        UserError: a rule or an axis that does not fit, naming the array.
    """
    shapes = jax.eval_shape(lambda h, s: _initial(config, h, s), hyper_of(config, 1), np.int32(0))
    places = shardings(shapes, shapes.model, rules, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )


def initializer(config: RunConfig, abstract: TrainState) -> Callable[[dict[str, Array], np.int32], TrainState]:
    """The program `build(hyper, seed)` behind `init_state`, which runs that differ in those two can share."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # Run once, so for a small model its compilation is what it costs: on a CPU, LLVM's optimizer takes three quarters
    # of it, and the emitters of fast loops half of the rest (without them the same numbers bit for bit). At 25 million
    # parameters a slower run takes back what the emitters' absence gains.
    on_cpu = next(iter(jax.tree.leaves(places)[0].device_set)).platform == "cpu"
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False} if on_cpu else None
    return jax.jit(lambda h, s: _initial(config, h, s), out_shardings=places, compiler_options=options)


def init_state(config: RunConfig, total_steps: int, abstract: TrainState) -> TrainState:
    """A fresh state, each array made where it belongs; the same numbers on every mesh."""
    return initializer(config, abstract)(hyper_of(config, total_steps), seed_of(config))
