"""Coordinate checks of the logits inside a block, attention's and the router's, in width: muP, and wrong variants."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.parametrization import WIDTH, MuP
from llamax.config.run import RunConfig
from llamax.model.position import position_tables
from llamax.model.transformer import Transformer

from .test_parametrization import BATCH, EXECUTION, FLAT, MUP, SEQ, STEPS, config, updated


def cycle() -> dict[str, jax.Array]:
    """A batch of four tokens in turn."""
    return {"tokens": (jnp.arange(SEQ + 1) + jnp.arange(BATCH)[:, None]) % 4}


def routed(width: int, parametrization: Any = None) -> RunConfig:
    """`config` with four heads and four experts at every width: head_dim grows as the width does."""
    mlp = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 2 * width}}
    attention = {"kind": "gqa", "heads": 4}
    return config(width, parametrization=parametrization, attention=attention, mlp=mlp)


def inner_logits(model: Transformer) -> dict[str, jax.Array]:
    """Logits of the last block's attention, of keys not after the query, and of its router."""
    first, last = (jax.tree.map(lambda x, i=i: x[i], model.stacks[0].blocks[0]) for i in (0, 1))
    (table,) = position_tables(model.config, SEQ).rotary
    stream, _ = first(model.embed(cycle()["tokens"][:, :-1]), table, None, EXECUTION)
    attention, x = last.attention, last.attention_norm(stream)
    q, k, _ = attention._project(x, table, jnp.arange(SEQ), EXECUTION)
    seen = jnp.tril(jnp.ones((SEQ, SEQ)))
    stream = stream + attention(x, table, None, EXECUTION)[0]
    return {
        "attention": jnp.einsum("bthd,bshd->bhts", q, k) * attention.logits.scale * seen,
        "router": last.mlp_norm(stream) @ last.mlp.router[...],
    }


def without(model: Transformer, *names: str) -> Transformer:
    """`model` with the arrays of these names at zero."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if any(getattr(entry, "name", None) in names for entry in path) else x, model
    )


@functools.cache
def base_logits() -> dict[str, float]:
    return logit_sizes(routed(32))


def logit_sizes(run: RunConfig, seeds: int = 2) -> dict[str, float]:
    """rms of `inner_logits` at the start, and how large STEPS updates make them from queries and routers at zero.

    At zero, and from few tokens, because the product of a random start, or of what another token taught, with a token's
    own vectors is 1 / sqrt(width) of that of two taught together, and in widths as small as these would hide it.
    """

    @jax.jit
    def sizes(seed: jax.Array) -> dict[str, jax.Array]:
        model = Transformer(run.model, key=jax.random.key(seed))
        taught = updated(run, without(model, "query", "router"), STEPS, cycle())
        logits = {"start": inner_logits(model), "taught": inner_logits(taught)}
        return {
            f"{name} {when}": jnp.sqrt(jnp.mean(x**2)) for when, found in logits.items() for name, x in found.items()
        }

    found = [sizes(seed) for seed in range(seeds)]
    return {name: float(np.mean([row[name] for row in found])) for name in found[0]}


def logit_growth(parametrization: Any) -> dict[str, float]:
    """Exponents of `logit_sizes` in the width, from the base to 256."""
    found, first = logit_sizes(routed(256, parametrization)), base_logits()
    return {name: math.log(found[name] / first[name]) / math.log(256 / 32) for name in found}


# Independent vectors over their length: n^-1/2 at the start. What was taught: Theta(1).
LOGITS = {"attention start": -0.5, "router start": -0.5, "attention taught": 0.0, "router taught": 0.0}


def wrong_logits(exponents: dict[str, float]) -> set[str]:
    return {name for name, right in LOGITS.items() if abs(exponents[name] - right) >= FLAT}


def test_logits_inside_a_block_stay_the_same_size_in_width_under_mup() -> None:
    found = logit_growth(MUP)
    assert wrong_logits(found) == set(), found


@pytest.mark.slow  # a quarter of a minute each
@pytest.mark.parametrize("wrong", ["sqrt_head_dim", "router_std", "router_lr"])
def test_wrong_logits_fail_the_same_check(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over sqrt(head_dim); a router that starts, or learns, as a matrix of the base does."""
    if wrong == "sqrt_head_dim":
        monkeypatch.setattr(MuP, "logit_factor", lambda self, head_dim: 1.0)
    else:
        name = wrong.removeprefix("router_")
        monkeypatch.setitem(WIDTH, "router", WIDTH["router"]._replace(**{name: {"std": -0.5, "lr": 0.0}[name]}))
    found = logit_growth(MUP)
    expected = {
        "sqrt_head_dim": {"attention start", "attention taught"},
        "router_std": {"router start"},
        "router_lr": {"router taught"},
    }
    assert expected[wrong] <= wrong_logits(found), found
