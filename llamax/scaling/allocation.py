"""Where to spend compute when training is not all: for a model that will be served, and with a limited supply of data.

The plain training optimum is `optimal_allocation` in laws.py. Here: Sardana et al. 2024, arXiv:2401.00448 (inference),
Muennighoff et al. 2023, arXiv:2305.16264 (repeated data), and the best N on a budget for any law of the registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llamax.errors import UserError
from llamax.scaling.laws import (
    Allocation,
    ChinchillaLaw,
    Cost,
    Law,
    Number,
    Scalar,
    check_flops,
    optimal_allocation,
    plain,
)

if TYPE_CHECKING:
    from llamax.scaling.lawspec import LawSpec

FORWARD = 2.0  # FLOPs per parameter and token served
HALVINGS = 100  # of the bracket of log N: past the last bit
ZOOM, ZOOMS = 200, 5  # points of a search grid, and how often it closes in on its best cell


@dataclass(frozen=True)
class ServedAllocation(Allocation):
    """The cheapest model of a given loss, or the best of a given total cost, counting what it will serve.

    flops: of training. inference_flops: of serving `inference_tokens`. plain_n, plain_d, plain_total: the training
    optimum of the same loss and what it would cost in all; saving: the part of that which is saved.
    """

    inference_tokens: float
    inference_flops: Number
    total_flops: Number
    plain_n: Number
    plain_d: Number
    plain_total: Number
    rule: str

    @property
    def saving(self) -> Number:
        return 1 - self.total_flops / self.plain_total

    def as_dict(self) -> dict[str, Any]:
        """Plain values under the field names, with tokens_per_param and saving."""
        return super().as_dict() | {"saving": plain(self.saving)}


@dataclass(frozen=True)
class LimitedAllocation(Allocation):
    """The best N and epochs for a budget when there are only `unique_tokens`."""

    unique_tokens: float
    epochs: Number
    fresh_n: Number  # what the budget would be spent on with unlimited data
    fresh_loss: Number
    rule: str


def served_allocation(
    law: Law,
    inference_tokens: Scalar,
    *,
    loss: Number | None = None,
    flops: Scalar | None = None,
    total_flops: Scalar | None = None,
    cost: Cost = Cost(),
    forward: float = FORWARD,
) -> ServedAllocation:
    """Best N and D of a model that will serve `inference_tokens` at `forward` · N FLOPs each.

    Give one of: `loss`, the quality wanted: least training + serving FLOPs with L(N, D) = loss (equation 3 of
    arXiv:2401.00448); `flops`, the same with the quality that this training budget buys at best; `total_flops`, what
    training and serving may cost together: least loss. Where the derivative along the constraint is zero in either,
    u / v = s + forward N T / (k N^s D), with u and v the slopes of the loss in log N and log D; the left side falls
    with N and the right side rises, so bisection finds it. Works on arrays of parameters (bootstrap draws).

    Raises UserError unless exactly one of the three is given, for numbers that are not positive, and for a loss that
    no N and D reach.
    """
    given = [v for v in (loss, flops, total_flops) if v is not None]
    if len(given) != 1:
        raise UserError("served allocation: give one of loss, flops (of training), total_flops")
    if not (np.isfinite(inference_tokens) and inference_tokens >= 0):
        raise UserError(f"inference_tokens: {inference_tokens}; give the number of tokens that will be served")
    if total_flops is not None:
        check_flops(total_flops)
        return _served_for_total(law, float(inference_tokens), float(total_flops), cost, forward)
    if flops is not None:
        loss = optimal_allocation(law, flops, cost).loss
    wanted = np.asarray(loss, float)
    if not np.all(np.isfinite(wanted) & (wanted > np.asarray(law.E))):
        raise UserError(f"loss: {plain(np.min(wanted))}; this law never goes below E = {plain(np.max(law.E))}")
    tokens, k, s = float(inference_tokens), cost.coefficient, cost.n_exponent
    gamma = getattr(law, "gamma", 1.0)
    room = np.log(wanted - law.E) / gamma  # log of what the two terms may sum to

    def log_d(log_n: Any) -> Any:
        left = -np.expm1(np.minimum(np.log(law.A) - law.alpha * log_n - room, -1e-300))
        return (np.log(law.B) - room - np.log(left)) / law.beta

    least = (np.log(law.A) - room) / law.alpha  # at this size the data would have to be infinite
    log_n = _bisect(law, least, least + 200.0, log_d, tokens, cost, forward)
    n, d = np.exp(log_n), np.exp(log_d(log_n))
    plain_cost = _flops_for(law, wanted, cost)
    best = _plain_at(law, plain_cost, cost)
    rule = (
        f"least {k:g} N{'' if s == 1 else f'^{s:.3g}'} D + {forward:g} N T for T = {tokens:.3g} tokens served, at the "
        f"loss {_text(wanted)} (Sardana et al. 2024)"
    )
    return _served(law, n, d, tokens, best, cost, forward, rule)


def _served_for_total(law: Law, tokens: float, total: float, cost: Cost, forward: float) -> ServedAllocation:
    k, s = cost.coefficient, cost.n_exponent

    def log_d(log_n: Any) -> Any:
        left = np.maximum(total - forward * np.exp(log_n) * tokens, 1e-300)
        return np.log(left) - np.log(k) - s * log_n

    most = np.log(total / (forward * tokens)) if tokens else np.log(total / k) / s
    low = np.broadcast_to(most - 100.0, np.shape(law.alpha))
    log_n = _bisect(law, low, np.broadcast_to(most, np.shape(low)), log_d, tokens, cost, forward)
    n, d = np.exp(log_n), np.exp(log_d(log_n))
    best = _plain_at(law, _flops_for(law, np.asarray(law.loss(n, d)), cost), cost)
    rule = f"least loss with {k:g} N D + {forward:g} N T = {total:.3g} FLOPs for T = {tokens:.3g} tokens served"
    return _served(law, n, d, tokens, best, cost, forward, rule)


def _served(
    law: Law, n: Any, d: Any, tokens: float, best: tuple[Any, Any], cost: Cost, forward: float, rule: str
) -> ServedAllocation:
    n, d, plain_n, plain_d = (v if np.ndim(v) else float(v) for v in (n, d, *best))
    training, serving = cost.flops(n, d), forward * n * tokens
    before = cost.flops(plain_n, plain_d) + forward * plain_n * tokens
    return ServedAllocation(
        flops=training,
        n=n,
        d=d,
        loss=law.loss(n, d),
        inference_tokens=tokens,
        inference_flops=serving,
        total_flops=training + serving,
        plain_n=plain_n,
        plain_d=plain_d,
        plain_total=before,
        rule=rule,
    )


def _bisect(law: Law, low: Any, high: Any, log_d: Any, tokens: float, cost: Cost, forward: float) -> Any:
    """Log N at which the slopes balance; elementwise over draws."""
    low, high = np.array(low, float), np.array(high, float)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            d = log_d(middle)
            slopes = np.log(law.alpha * law.A / (law.beta * law.B)) - law.alpha * middle + law.beta * d
            serving = forward * tokens / cost.coefficient * np.exp((1 - cost.n_exponent) * middle - d)
            too_small = slopes > np.log(cost.n_exponent + serving)
        low, high = np.where(too_small, middle, low), np.where(too_small, high, middle)
    return (low + high) / 2


def _flops_for(law: Law, loss: Any, cost: Cost) -> Any:
    """Training FLOPs at which the best allocation reaches `loss`: its reducible part is a power of compute."""
    one = optimal_allocation(law, 1.0, cost)
    slope = law.alpha * law.beta / (law.alpha + cost.n_exponent * law.beta) * getattr(law, "gamma", 1.0)
    return np.exp((np.log(one.loss - law.E) - np.log(loss - law.E)) / slope)


def _plain_at(law: Law, flops: Any, cost: Cost) -> tuple[Any, Any]:
    """N* and D* at each of `flops`."""
    one = optimal_allocation(law, 1.0, cost)
    n = one.n * flops ** (law.beta / (law.alpha + cost.n_exponent * law.beta))
    return n, flops / (cost.coefficient * n**cost.n_exponent)


def allocate(
    spec: LawSpec,
    params: Mapping[str, Any],
    flops: Scalar,
    *,
    cost: Cost = Cost(),
    fixed: Mapping[str, float] | None = None,
    n_range: tuple[float, float] = (1e2, 1e15),
) -> Allocation:
    """Best N and D of `flops` training FLOPs for any law that reads n and d: a search over N along equal cost.

    params: one number each, or arrays `[draws]`. fixed: the law's other columns, such as `unique_tokens` or `bits_kv`.
    Raises UserError for a column that is neither, or a minimum at an end of `n_range`.
    """
    import jax

    check_flops(flops)
    fixed = dict(fixed or {})
    if spec.target != "loss" or not {"n", "d"} <= set(spec.columns):
        raise UserError(
            f"law {spec.name}: predicts {spec.target} from {', '.join(spec.columns)}; an allocation needs a "
            "loss that depends on n and d"
        )
    if missing := set(spec.columns) - {"n", "d"} - set(fixed):
        raise UserError(f"law {spec.name}: give a value for {', '.join(sorted(missing))}")
    if bad := [f"{name} = {value:g}" for name, value in fixed.items() if not value > 0]:
        raise UserError(f"law {spec.name}: {', '.join(bad)}; give positive numbers")
    values = {name: np.asarray(params[name], float) for name in spec.names}
    shape = np.broadcast_shapes(*(v.shape for v in values.values()))
    columns = {name: np.broadcast_to(v, shape).reshape(-1, 1) for name, v in values.items()}
    ends = np.log(n_range)
    low, high = (np.full(int(np.prod(shape)), end) for end in ends)
    with jax.enable_x64(True):
        for zoom in range(ZOOMS):
            log_n = np.linspace(low, high, ZOOM, axis=1)
            n = np.exp(log_n)
            loss = np.asarray(spec.loss(columns, {"n": n, "d": cost.tokens(flops, n), **fixed}), float)
            best = np.nanargmin(loss, axis=1)
            if zoom == 0 and np.any((best == 0) | (best == ZOOM - 1)):
                raise UserError(f"n_range {n_range}: the optimum at {flops:.3g} FLOPs lies at its end; widen it")
            at = np.arange(len(best))
            low, high = log_n[at, np.maximum(best - 1, 0)], log_n[at, np.minimum(best + 1, ZOOM - 1)]
    n_best, loss_best = n[at, best].reshape(shape), loss[at, best].reshape(shape)
    n_out, loss_out = (v if shape else float(v) for v in (n_best, loss_best))
    return Allocation(float(flops), n_out, cost.tokens(flops, n_out), loss_out)


def limited_allocation(
    params: Mapping[str, Any], flops: Scalar, unique_tokens: Scalar, *, cost: Cost = Cost()
) -> LimitedAllocation:
    """Best N and epochs of `flops` training FLOPs when only `unique_tokens` distinct tokens exist.

    params: those of the `repeated` law. A Chinchilla fit does too: R_D and R_N are then the 15.39 and 5.31 that
    Muennighoff et al. 2023 measured on C4, and the rule says so. Arrays `[draws]` work. Raises UserError for a number
    that is not positive.
    """
    from llamax.scaling.lawbook import REPEATED

    if not (np.isfinite(unique_tokens) and unique_tokens > 0):
        raise UserError(f"unique_tokens: {unique_tokens}; give the number of distinct tokens there are")
    if "gamma" in params:
        raise UserError(
            "unique_tokens: the repeated-data law adds its terms as the Chinchilla law does; fit that one (--law "
            "chinchilla) or `repeated`, not the coupled law"
        )
    measured = next(iter(REPEATED.published.values()))
    borrowed = {name: measured[name] for name in ("R_D", "R_N") if name not in params}
    params = {**borrowed, **params}
    best = allocate(REPEATED, params, flops, cost=cost, fixed={"unique_tokens": float(unique_tokens)})
    names = ("E", "A", "B", "alpha", "beta")
    fresh = optimal_allocation(ChinchillaLaw(**{name: params[name] for name in names}), flops, cost)
    rule = f"least loss of the repeated-data law on {flops:.3g} FLOPs with {unique_tokens:.3g} distinct tokens"
    if borrowed:
        rule += ", R_D = 15.4 and R_N = 5.3 as measured by Muennighoff et al. 2023 on C4, not by these runs"
    epochs = np.maximum(np.asarray(best.d) / unique_tokens, 1.0)
    return LimitedAllocation(
        **asdict(best),
        unique_tokens=float(unique_tokens),
        epochs=epochs if epochs.ndim else float(epochs),
        fresh_n=fresh.n,
        fresh_loss=fresh.loss,
        rule=rule,
    )


def _text(value: Any) -> str:
    return f"{float(np.median(value)):.4f}"


def beyond_training(
    law: Law,
    flops: Scalar,
    *,
    cost: Cost = Cost(),
    inference_tokens: Scalar | None = None,
    unique_tokens: Scalar | None = None,
) -> dict[str, Any]:
    """What `llamax fit --at` adds for a model that is served or whose data are limited: `served`, `limited`.

    served: the cheapest model of the quality that `flops` of training buys at best. limited: the best N and epochs of
    `flops`. Each as a plain dict, present where its number is given. Raises UserError as the functions it calls.
    """
    record: dict[str, Any] = {}
    if inference_tokens is not None:
        record["served"] = served_allocation(law, inference_tokens, flops=flops, cost=cost).as_dict()
    if unique_tokens is not None:
        record["limited"] = limited_allocation(law.as_dict(), flops, unique_tokens, cost=cost).as_dict()
    return record
