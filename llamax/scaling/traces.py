"""Laws of whole loss curves from the learning rate of every step, and the columns they read.

Annealing: Tissue et al. 2024, arXiv:2408.11029. Multi-power: Luo et al. 2025, arXiv:2503.12811. Steps are those of the
trace given; `warmup` steps at its head count in the sum of rates, and none of their changes counts as a drop.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Float

from llamax.errors import UserError
from llamax.scaling.lawbook import exponent, floor, size
from llamax.scaling.laws import power
from llamax.scaling.lawspec import LawSpec, Parameter, Values
from llamax.scaling.table import as_numbers

TRACED = {"s1", "s2", "lr_drop", "lr_then", "lr_since"}  # what `trace_columns` makes
MOST_CHANGES = 256  # of a trace: of more, neighbours are taken together, since a law reads [runs, changes]
MEMORY = 0.999  # lambda of the annealing law, as in the paper


def annealing_columns(
    lr: Float[np.ndarray, " steps"], at: Sequence[int] | np.ndarray, *, warmup: int = 0, memory: float = MEMORY
) -> dict[str, np.ndarray]:
    """`s1` and `s2` after the steps `at` (0 = after the first step) of a run whose step i had learning rate `lr[i]`.

    s1 = sum_i lr_i; s2 = sum_i sum_{k <= i} (lr_{k-1} - lr_k) memory^(i - k) (arXiv:2408.11029), whose
    changes are counted after `warmup` steps. Raises UserError for a trace that is not of positive numbers, or a step
    outside it.
    """
    lr, steps = _trace(lr, at)
    if not 0 <= memory < 1:
        raise UserError(f"memory: {memory}; give lambda of the annealing law, from 0 to below 1")
    drop, area, momentum = _drops(lr, warmup), np.zeros(len(lr)), 0.0
    for i in range(len(lr)):
        momentum = memory * momentum + drop[i]
        area[i] = momentum
    return {"s1": np.cumsum(lr)[steps], "s2": np.cumsum(area)[steps]}


def power_columns(
    lr: Float[np.ndarray, " steps"], at: Sequence[int] | np.ndarray, *, warmup: int = 0, most: int | None = None
) -> dict[str, np.ndarray]:
    """Columns of the multi-power law after the steps `at`: `s1 [runs]`; `lr_drop, lr_then, lr_since [runs, changes]`.

    One entry for every step k after `warmup` at which the rate changed: lr_{k-1} - lr_k (0 for changes still to come),
    lr_k, and sum_{i = k..t} lr_i. With more than `most` changes, neighbours count as one at the middle of them. Errors
    as `annealing_columns`.
    """
    lr, steps = _trace(lr, at)
    drop = _drops(lr, warmup)
    changes = np.flatnonzero(drop)
    if most is not None and len(changes) > most:
        together = np.array_split(changes, most)
        changes = np.array([some[len(some) // 2] for some in together])
        drop[changes] = [drop[some].sum() for some in together]
    total = np.cumsum(lr)
    before = (total - lr)[changes]  # summed up to the step before the change
    past = changes <= steps[:, None]
    since = np.where(past, total[steps][:, None] - before, 0.0)
    return {
        "s1": total[steps],
        "lr_drop": np.where(past, drop[changes], 0.0),
        "lr_then": np.broadcast_to(lr[changes], since.shape),
        "lr_since": since,
    }


def trace_columns(frame: pd.DataFrame, named: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """The table of training curves with the columns of both laws added to every row, and the rule in words.

    Of its columns (`named` has their names where others) it reads `step`, from 0 or 1 on, `lr`, and `run` where named:
    the rate between logged steps is interpolated, and the warm-up ends where it is largest. Raises UserError for text.
    """
    step, lr, run = named.get("step", "step"), named.get("lr", "lr"), named.get("run")
    table = pd.DataFrame({name: as_numbers(frame[name], name) for name in (step, lr)})
    parts = []
    for _, rows in table.groupby(frame[run].to_numpy() if run else np.zeros(len(frame))):
        known = rows.dropna().sort_values(step).drop_duplicates(step)
        if known.empty:
            raise UserError(f"columns {step!r}, {lr!r}: a run without any learning rate; give it, or leave the run out")
        first = min(1, int(known[step].iloc[0]))
        rate = np.interp(np.arange(first, known[step].iloc[-1] + 1), known[step], known[lr])
        rate = np.maximum(rate, 1e-12 * rate.max())  # a rate of zero adds nothing, and the law takes its logarithm
        at, warmup = known[step].to_numpy(int) - first, int(np.argmax(rate))
        made = power_columns(rate, at, warmup=warmup, most=MOST_CHANGES) | annealing_columns(rate, at, warmup=warmup)
        parts.append(pd.DataFrame({name: list(values) for name, values in made.items()}, index=known.index))
    word = (
        f"S1, S2 and the drops of the learning rate: from {step!r} and {lr!r}, the warm-up ending at the largest rate"
    )
    return frame.join(pd.concat(parts)), [word]


def _trace(lr: np.ndarray, at: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lr, steps = np.asarray(lr, float), np.asarray(at, int)
    if lr.ndim != 1 or not len(lr) or not np.all(np.isfinite(lr) & (lr > 0)):
        raise UserError("lr: give the learning rate of every step, positive numbers, as one list")
    if steps.ndim != 1 or np.any((steps < 0) | (steps >= len(lr))):
        raise UserError(f"at: steps {steps.min()} to {steps.max()}; the trace has steps 0 to {len(lr) - 1}")
    return lr, steps


def _drops(lr: np.ndarray, warmup: int) -> np.ndarray:
    """lr_{k-1} - lr_k of every step after `warmup`, else 0."""
    drop = np.concatenate([[0.0], lr[:-1] - lr[1:]])
    drop[: warmup + 1] = 0.0
    return drop


def _annealing(p: Values, x: Values) -> Any:
    return p["L0"] + power(jnp, p["A"], x["s1"], p["alpha"]) - p["C"] * x["s2"]


ANNEALING = LawSpec(
    name="annealing",
    formula="L(s) = L0 + A S1^-alpha - C S2",
    source="Tissue et al. 2024, arXiv:2408.11029; S1 and S2 by llamax.scaling.annealing_columns",
    columns=("s1", "s2"),
    parameters=(
        floor(name="L0"),
        size("A", "of the forward area S1"),
        exponent("alpha", "of the forward area"),
        size("C", "of the annealing area S2"),
    ),
    loss=_annealing,
    linear=("L0", "A", "C"),
)


def _multipower(p: Values, x: Values) -> Any:
    reach = p["C"] * jnp.exp(-p["gamma"] * jnp.log(x["lr_then"])) * x["lr_since"]
    gain = -jnp.expm1(-p["beta"] * jnp.log1p(reach))
    return p["L0"] + power(jnp, p["A"], x["s1"], p["alpha"]) - p["B"] * (x["lr_drop"] * gain).sum(-1)


MULTIPOWER = LawSpec(
    name="multipower",
    formula="L(t) = L0 + A S1(t)^-alpha - B sum_k (lr_(k-1) - lr_k) (1 - (1 + C lr_k^-gamma S_k(t))^-beta)",
    source="Luo et al. 2025, arXiv:2503.12811 (values: its repository's, Llama of 25 to 400 million "
    "parameters); columns by llamax.scaling.power_columns",
    columns=("s1", "lr_drop", "lr_then", "lr_since"),
    parameters=(
        floor(name="L0"),
        size("A", "of the sum of rates"),
        exponent("alpha", "of the sum of rates"),
        size("B", "of what a drop of the rate brings"),
        Parameter("C", 1e-3, 1e3, log=True, starts=(0.5, 2.0, 8.0), about="how soon it comes"),
        exponent("beta", "of how it comes", (0.3, 0.6, 1.0)),
        exponent("gamma", "of the rate in how soon it comes", (0.3, 0.6, 1.0)),
    ),
    loss=_multipower,
    linear=("L0", "A", "B"),
    published={
        f"Luo et al. 2025, {label}": dict(zip(("L0", "A", "alpha", "B", "C", "beta", "gamma"), values, strict=True))
        for label, values in {
            "25M": (3.040, 0.525, 0.508, 363.788, 2.066, 0.583, 0.641),
            "100M": (2.651, 0.601, 0.453, 437.946, 2.132, 0.598, 0.655),
            "400M": (2.375, 0.654, 0.429, 523.425, 2.025, 0.594, 0.635),
        }.items()
    },
)
