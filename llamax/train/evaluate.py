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
def _sums(model: Transformer, batch: dict[str, Array], loss_chunk: int | None, execution: Execution) -> tuple[Array, Array]:
    nats, _, weight, _ = next_token_loss(
        model, batch["tokens"], batch.get("segments"), batch["weights"], jnp.float32(0.0), loss_chunk, execution
    )
    return nats, weight


def evaluate(
    model: Transformer, batches: Iterable[dict[str, Any]], *, loss_chunk: int | None, execution: Execution
) -> tuple[float, int]:
    """(mean nats per token, tokens) over `batches` of tokens [batch, seq + 1] and weights [batch, seq].

    Sums are added on the host in float64, in order, so the result does not depend on how batches were grouped in time.
    """
    sums = [_sums(model, batch, loss_chunk, execution) for batch in batches]  # dispatched ahead of the first fetch
    nats = float(np.sum([np.float64(n) for n, _ in sums]))
    tokens = float(np.sum([np.float64(w) for _, w in sums]))
    return (nats / tokens if tokens else float("nan")), int(tokens)
