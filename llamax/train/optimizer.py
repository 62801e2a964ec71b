"""Optimizers by parameter group, through optax but for clipping and Adam, with every hyperparameter a traced array.

    gradient -> clip by global norm -> direction (adamw, muon, ...) -> -lr (direction + decay x parameter)

Only `kind` is structure. All numbers come in as arrays, so a new learning rate recompiles nothing and `jax.vmap` runs
many cells of a sweep at once. Moments keep the module type of the parameters, so they carry the parameters' axis names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from llamax.config.run import Optimizer, Schedule
from llamax.train.param_info import BUFFER, GROUPS, is_variable, param_info
from llamax.train.schedule import schedule_hyperparameters

Hyper = Mapping[str, ArrayLike]

# Moonlight's factor (arXiv:2502.16982): an orthogonal [m, n] matrix has rms 1/sqrt(max(m, n)), AdamW's updates about
# 0.2, so 0.2 sqrt(max(m, n)) lets one lr and one weight decay serve both, at every width.
MUON_RMS = 0.2


def hyperparameters(optimizer: Optimizer, schedule: Schedule, total_steps: int) -> dict[str, np.float32]:
    """Every number of the two sections as a float32 scalar: the arrays that `make_optimizer` and `learning_rate` read.

    Names are the config's (`lr weight_decay b1 b2 eps momentum adam_lr decay_rate`), `clip_norm` (inf when null),
    `<group>_lr` and `<group>_weight_decay` multipliers, and the schedule's (`schedule_hyperparameters`).
    """
    own = {name: value for name, value in optimizer if name not in ("kind", "groups")}
    own["clip_norm"] = np.inf if optimizer.clip_norm is None else optimizer.clip_norm
    for group in GROUPS:
        multipliers = getattr(optimizer.groups, group)
        own |= {f"{group}_lr": multipliers.lr, f"{group}_weight_decay": multipliers.weight_decay}
    return {name: np.float32(value) for name, value in own.items()} | schedule_hyperparameters(schedule, total_steps)


def make_optimizer(optimizer: Optimizer, hyper: Hyper, lr: ArrayLike) -> optax.GradientTransformation:
    """The update rule at learning rate `lr`: `update` returns what is added to the parameters.

    Of `optimizer` only `kind` is read; the numbers are `hyper` (of `hyperparameters`) and may be traced. Parameters are
    module pytrees of `nnx.Param` with metadata (see `param_info`). Weight decay is decoupled and multiplied by the
    scheduled lr, as in optax.adamw. `init` does not depend on `hyper`. Buffers have no moments and stay as they are.
    """
    return optax.chain(
        _clip(hyper["clip_norm"]),
        optax.masked(DIRECTIONS[optimizer.kind](hyper), _learned),
        _descend(optimizer.kind, hyper, lr),
    )


def keep_if(good: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` if `good`, else `old`, leaf by leaf: skips a bad batch, leaving weights and moments bit for bit."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def norms(new: Any, old: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Global norms of all of `new`, and of what a step changed in the weights of `old` to make it, without buffers.

    It is the difference of weights as they are stored (float32), so an update that rounding swallows counts nothing.
    """
    return jax.lax.platform_dependent(new, old, cuda=_norms_at_once, default=_norms)


def _norms(new: Any, old: Any) -> tuple[Array, Array]:
    moved = jax.tree.map(jnp.subtract, _without_buffers(new), _without_buffers(old))
    return optax.tree.norm(new), optax.tree.norm(moved)


def _norms_at_once(new: Any, old: Any) -> tuple[Array, Array]:
    """The same by one sum of complex numbers an array: the compiler of a GPU makes one sum part of the loop that
    updates the array, of two a loop of their own (benchmarks/notes.md, "Both norms in the loop of the update")."""

    def of(a: nnx.Variable, b: nnx.Variable) -> Array:
        moved = a[...] - b[...] if _is_learned(a) else jnp.zeros_like(a[...])
        return jnp.sum(jax.lax.complex(jnp.square(a[...]), jnp.square(moved)))

    pairs = zip(*(jax.tree.leaves(tree, is_leaf=is_variable) for tree in (new, old)), strict=True)
    total = sum((of(a, b) for a, b in pairs), jnp.complex64(0))
    return jnp.sqrt(total.real), jnp.sqrt(total.imag)


def _without_buffers(tree: Any) -> list[nnx.Variable]:
    return [variable for variable in jax.tree.leaves(tree, is_leaf=is_variable) if _is_learned(variable)]


# ---------------------------------------------------------------- clipping and Adam
# As in optax, but one factor clips and reciprocals correct the bias: XLA for CPUs repeats a product in every loop that
# reads it, and writes out what was divided (benchmarks/notes.md, "The optimizer's loops").
def _clip(limit: ArrayLike) -> optax.GradientTransformation:
    """Gradients of a global norm above `limit` scaled to it (arXiv:1211.5063)."""

    def update(updates: Any, params: Any = None) -> Any:
        factor = jnp.minimum(1.0, limit / optax.tree.norm(updates))
        return jax.tree.map(lambda g: factor * g, updates)

    return optax.stateless(update)


def _adam(hyper: Hyper) -> optax.GradientTransformation:
    """Adam (arXiv:1412.6980); a parameter's own eps, `eps x s`, is Adam at `eps` of its gradient divided by s."""
    b1, b2, eps = hyper["b1"], hyper["b2"], hyper["eps"]

    def divided(variable: nnx.Variable) -> nnx.Variable:
        own = param_info(variable).eps
        return variable if own == 1.0 else jax.tree.map(lambda g: g / own, variable)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        gradients = jax.tree.map(divided, updates, is_leaf=is_variable)
        mu = jax.tree.map(lambda g, m: (1 - b1) * g + b1 * m, gradients, state.mu)
        nu = jax.tree.map(lambda g, v: (1 - b2) * (g * g) + b2 * v, gradients, state.nu)
        count = optax.safe_increment(state.count)
        first, second = 1 / (1 - b1**count), 1 / (1 - b2**count)  # both averages began at 0
        direction = jax.tree.map(lambda m, v: (first * m) / (jnp.sqrt(second * v) + eps), mu, nu)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


# ---------------------------------------------------------------- directions
def _muon(hyper: Hyper) -> optax.GradientTransformation:
    """Five quintic Newton-Schulz steps on the Nesterov momentum of every matrix of a stack at once; Adam elsewhere."""
    orthogonal = optax.chain(
        optax.contrib.scale_by_muon(beta=hyper["momentum"], weight_dimension_numbers=_dimension_numbers),
        optax.stateless(_scale_to_adam_rms),
    )
    return optax.partition({"muon": orthogonal, "adam": _adam(hyper)}, _muon_labels)


def _adafactor(hyper: Hyper) -> optax.GradientTransformation:
    """optax.adafactor's core: factored second moments, then updates clipped to rms 1, matrix by matrix."""
    factored = optax.scale_by_factored_rms(decay_rate=hyper["decay_rate"], epsilon=hyper["eps"])
    return _matrix_by_matrix(optax.chain(factored, optax.clip_by_block_rms(1.0)))


DIRECTIONS: dict[str, Callable[[Hyper], optax.GradientTransformation]] = {
    "adamw": _adam,
    "muon": _muon,
    "lion": lambda hyper: optax.scale_by_lion(hyper["b1"], hyper["b2"]),
    "adafactor": _adafactor,
    "sgd": lambda hyper: optax.trace(hyper["momentum"]),
}


# ---------------------------------------------------------------- parameter groups
def _learned(params: Any) -> Any:
    return jax.tree.map(_is_learned, params, is_leaf=is_variable)


def _is_learned(variable: nnx.Variable) -> bool:
    return param_info(variable).group != BUFFER


def _uses_muon(variable: nnx.Variable) -> bool:
    info = param_info(variable)
    return info.group == "matrix" and info.is_matrix


def _muon_labels(params: Any) -> Any:
    return jax.tree.map(lambda v: "muon" if _uses_muon(v) else "adam", params, is_leaf=is_variable)


def _dimension_numbers(params: Any) -> Any:
    """Which axes each matrix contracts and produces; axes in neither (layers, experts) are batch axes to optax."""

    def numbers(variable: nnx.Variable) -> Any:
        info = param_info(variable)
        split = info.batch + info.inputs
        spec = optax.contrib.MuonDimensionNumbers(tuple(range(info.batch, split)), tuple(range(split, len(info.shape))))
        return jax.tree.map(lambda _: spec, variable)

    return jax.tree.map(numbers, params, is_leaf=is_variable)


def _scale_to_adam_rms(updates: Any, params: Any = None) -> Any:
    def scaled(variable: nnx.Variable) -> nnx.Variable:
        factor = MUON_RMS * math.sqrt(max(param_info(variable).view[1:]))
        return jax.tree.map(lambda u: factor * u, variable)

    return jax.tree.map(scaled, updates, is_leaf=is_variable)


def _descend(kind: str, hyper: Hyper, lr: ArrayLike) -> optax.GradientTransformation:
    """-lr (direction + decay x parameter), each with the multipliers of the group and of the parametrization."""

    def update(updates: Any, params: Any) -> Any:
        def one(parameter: nnx.Variable, direction: nnx.Variable) -> nnx.Variable:
            info = param_info(parameter)
            group = info.group
            if group == BUFFER:
                return jax.tree.map(jnp.zeros_like, parameter)
            decay = hyper["weight_decay"] * hyper[f"{group}_weight_decay"]
            rate = jnp.asarray(lr) * hyper[f"{group}_lr"]
            decay = decay if info.weight_decay == 1.0 else decay * info.weight_decay
            rate = rate if info.lr == 1.0 else rate * info.lr
            if kind == "muon" and not _uses_muon(parameter):
                rate = rate * hyper["adam_lr"]
            return jax.tree.map(lambda u, p: -rate * (u + decay * p), direction, parameter)

        return jax.tree.map(one, params, updates, is_leaf=is_variable)

    return optax.stateless(update)


def _matrix_by_matrix(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` applied to each matrix of each stack by itself, viewed as [inputs, outputs].

    optax factors the two largest axes of an array, whatever they mean, and takes one rms over all of it; a stack of
    layers must instead behave as its layers would. The state is a tuple of `inner`'s states in leaf order.
    """

    def views(tree: Any) -> list[Array]:
        return [v.get_value().reshape(param_info(v).view) for v in jax.tree.leaves(tree, is_leaf=is_variable)]

    def init(params: Any) -> Any:
        return tuple(jax.vmap(inner.init)(view) for view in views(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        stacks = zip(views(updates), state, views(params), strict=True)
        new = [jax.vmap(inner.update)(u, s, p) for u, s, p in stacks]
        leaves, structure = jax.tree.flatten(updates)
        shaped = [u.reshape(leaf.shape) for (u, _), leaf in zip(new, leaves, strict=True)]
        return jax.tree.unflatten(structure, shaped), tuple(s for _, s in new)

    return optax.GradientTransformation(init, update)
