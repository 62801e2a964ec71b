"""Learning-rate schedules as pure functions of the step, with every number an array."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from llamax.config.run import Schedule


def schedule_hyperparameters(schedule: Schedule, total_steps: int) -> dict[str, np.float32]:
    """The numbers `learning_rate` needs besides the peak `lr`: fractions of the horizon become whole steps."""
    warmup, decay = schedule.phases(total_steps)
    values = {"total_steps": total_steps, "warmup_steps": warmup, "decay_steps": decay, "final": schedule.final}
    return {name: np.float32(value) for name, value in values.items()}


def learning_rate(kind: str, step: ArrayLike, hyper: Mapping[str, ArrayLike]) -> Float[Array, ""]:
    """The learning rate of `step` (from 0): linear warmup to `lr`, then `kind` down to `final` x lr at the last step.

    Warmup gives step s the rate lr (s + 1) / warmup_steps, so the peak is step warmup_steps - 1 (step 0 without warmup)
    and the decay runs from there to step total_steps - 1. A run that ends on its peak (warmup over all steps, or one
    step) never decays. `wsd` holds the peak, then falls in a line over the last `decay_steps` (arXiv:2404.06395);
    `cosine` is half a period (arXiv:1608.03983); `constant` ignores `final`.
    """
    done = jnp.asarray(step, jnp.float32) + 1.0
    warmup = jnp.maximum(jnp.asarray(hyper["warmup_steps"], jnp.float32), 1.0)
    total, final = jnp.asarray(hyper["total_steps"], jnp.float32), jnp.asarray(hyper["final"], jnp.float32)
    length = jnp.asarray(hyper["decay_steps"], jnp.float32) if kind == "wsd" else total - warmup
    progress = jnp.clip((done - (total - length)) / jnp.maximum(length, 1.0), 0.0, 1.0)
    match kind:
        case "cosine":
            left = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        case "linear" | "wsd":
            left = 1.0 - progress
        case "constant":
            left = jnp.ones_like(progress)
        case _:
            raise ValueError(f"schedule kind {kind!r} is not one of cosine, linear, wsd, constant")
    return jnp.asarray(hyper["lr"], jnp.float32) * jnp.minimum(done / warmup, 1.0) * (final + (1.0 - final) * left)
