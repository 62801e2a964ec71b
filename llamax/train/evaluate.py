"""Held-out loss."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llamax.model.execution import Execution
from llamax.model.loss import next_token_loss
from llamax.model.transformer import Transformer


@functools.partial(jax.jit, static_argnames=("loss_chunk", "execution"))
def _sums(
    model: Transformer, batch: dict[str, Array], loss_chunk: int | None, execution: Execution
) -> tuple[Array, Array]:
    nats, _, weight, _ = next_token_loss(
        model, batch["tokens"], batch.get("segments"), batch["weights"], jnp.float32(0.0), loss_chunk, execution
    )
    return nats, weight


def evaluate(
    model: Transformer, batches: Iterable[dict[str, Any]], *, loss_chunk: int | None, execution: Execution
) -> tuple[float, int]:
    """(mean nats per token, tokens) over `batches` of tokens [batch, seq + 1] and weights [batch, seq].

    Sums are added on the host in float64, in order. The next batch is taken when the one before the last is done, so
    that `batches` may end early and few of them are on the device.
    """
    total = np.zeros(2)
    running: list[Any] = []
    for batch in batches:
        running.append(_sums(model, batch, loss_chunk, execution))
        if len(running) > 1:
            total += np.array(running.pop(0), np.float64)
    for sums in running:
        total += np.array(sums, np.float64)
    nats, tokens = float(total[0]), int(total[1])
    return (nats / tokens if tokens else float("nan")), tokens
