"""Two laws of the loss, L = E + A / N^alpha + B / D^beta and its coupled form, and the allocation that minimises them.

Sources: Hoffmann et al. 2022, arXiv:2203.15556, section 3.3 and equation 4; Busbridge et al. 2025, arXiv:2502.08606.
N parameters, D tokens, C FLOPs, loss in nats per token. The parameter-count and FLOP conventions are whatever the
caller's columns used; nothing here converts. The formulas are written here alone, for numpy or, as `xp`, for
jax.numpy: lawbook.py fits them under these names, centred.py in other coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from llamax.errors import UserError

Scalar = float | int
Number = Scalar | np.ndarray  # one value, or one per bootstrap draw / run; shapes broadcast


def power(xp: Any, coefficient: Any, base: Any, exponent: Any) -> Any:
    """coefficient / base^exponent."""
    return coefficient * xp.exp(-exponent * xp.log(base))


def additive(xp: Any, E: Any, A: Any, B: Any, alpha: Any, beta: Any, n: Any, d: Any) -> Any:
    """E + A / n^alpha + B / d^beta, of anything that broadcasts."""
    return E + power(xp, A, n, alpha) + power(xp, B, d, beta)


def coupled(xp: Any, E: Any, A: Any, B: Any, alpha: Any, beta: Any, gamma: Any, n: Any, d: Any) -> Any:
    """E + (A / n^alpha + B / d^beta)^gamma; in logs, because a small gamma makes A and B huge."""
    return E + xp.exp(joined(xp, xp.log(A) - alpha * xp.log(n), xp.log(B) - beta * xp.log(d), gamma))


def joined(xp: Any, size: Any, tokens: Any, gamma: Any) -> Any:
    """log of (e^size + e^tokens)^gamma: what scale removes, of the logs of its two terms."""
    return gamma * xp.logaddexp(size, tokens)


@dataclass(frozen=True)
class ChinchillaLaw:
    """Parameters of L(N, D) = E + A / N^alpha + B / D^beta; E in nats per token. Fields may be arrays `[draws]`."""

    label: ClassVar[str] = "approach 3"
    E: Number
    A: Number
    B: Number
    alpha: Number
    beta: Number

    def loss(self, n: Number, d: Number) -> Number:
        """Loss in nats per token at `n` parameters and `d` tokens (numbers or arrays that broadcast)."""
        return additive(np, **vars(self), n=n, d=d)

    def as_dict(self) -> dict[str, Any]:
        """The five parameters by name: plain floats (lists when the fields are arrays)."""
        return {name: plain(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class CoupledLaw:
    """Parameters of L(N, D) = E + (A / N^alpha + B / D^beta)^gamma (arXiv:2502.08606, the supervised law).

    With gamma below 1 the slope in D depends on N and the other way round, as in equation 1.5 of Kaplan et al. 2020
    (arXiv:2001.08361; there E = 0); gamma = 1 is the Chinchilla law. Fields may be arrays `[draws]`.
    """

    label: ClassVar[str] = "the coupled law"

    E: Number
    A: Number
    B: Number
    alpha: Number
    beta: Number
    gamma: Number

    def loss(self, n: Number, d: Number) -> Number:
        """Loss in nats per token at `n` parameters and `d` tokens (numbers or arrays that broadcast)."""
        return coupled(np, **vars(self), n=n, d=d)

    def as_dict(self) -> dict[str, Any]:
        """The six parameters by name: plain floats (lists when the fields are arrays)."""
        return {name: plain(value) for name, value in asdict(self).items()}


Law = ChinchillaLaw | CoupledLaw


@dataclass(frozen=True)
class Cost:
    """Training FLOPs of a run: C = coefficient · N^n_exponent · D. The default is the usual C = 6 N D.

    The exponent absorbs conventions in which FLOPs per token are not proportional to N (attention, embeddings); with it
    the optimal allocation is still a closed form.
    """

    coefficient: float = 6.0
    n_exponent: float = 1.0

    def flops(self, n: Number, d: Number) -> Number:
        """Training FLOPs of `n` parameters on `d` tokens."""
        return self.coefficient * n ** (1.0 * self.n_exponent) * d

    def tokens(self, flops: Number, n: Number) -> Number:
        """Tokens that `flops` buys for a model of `n` parameters."""
        return flops / (self.coefficient * n ** (1.0 * self.n_exponent))

    @property
    def rule(self) -> str:
        """Its formula: 6·N·D, or 14·N^0.93·D."""
        power = "" if f"{self.n_exponent:.4g}" == "1" else f"^{self.n_exponent:.4g}"
        return f"{self.coefficient:.4g}·N{power}·D"


@dataclass(frozen=True)
class Allocation:
    """Where a compute budget is best spent: `n` parameters, `d` tokens, the loss there (nats per token)."""

    flops: Number
    n: Number
    d: Number
    loss: Number

    @property
    def tokens_per_param(self) -> Number:
        return self.d / self.n

    def as_dict(self) -> dict[str, Any]:
        """Plain floats under `flops, n, d, loss, tokens_per_param`."""
        return {name: plain(value) for name, value in asdict(self).items()} | {
            "tokens_per_param": plain(self.tokens_per_param)
        }


def optimal_allocation(law: Law, flops: Scalar, cost: Cost = Cost()) -> Allocation:
    """Minimum of the law on the curve cost.flops(N, D) = flops, in closed form.

    Setting the derivative along the curve to zero gives N^(alpha + s·beta) = alpha·A / (s·beta·B) · (C / k)^beta for a
    cost k·N^s·D; with s = 1 this is equation 4 of arXiv:2203.15556. The coupled law is least where its bracket is, so
    the same formula holds. Works on arrays of parameters (bootstrap draws).
    Raises UserError when `flops` is not a positive number.
    """
    check_flops(flops)
    s, budget = cost.n_exponent, flops / cost.coefficient
    # In logs: B and D^beta overflow nothing even for bootstrap draws with B = e^60.
    log_ratio = np.log(law.alpha * law.A) - np.log(s * law.beta * law.B)
    n = np.exp((log_ratio + law.beta * math.log(budget)) / (law.alpha + s * law.beta))
    d = cost.tokens(flops, n)
    return Allocation(float(flops), n, d, law.loss(n, d))


def optimal_allocation_under(
    law: Law,
    flops: Scalar,
    flops_per_token: Callable[[float], float],
    n_range: tuple[float, float] = (1e2, 1e14),
) -> Allocation:
    """Minimum of the law when a token costs `flops_per_token(n)` training FLOPs: any convention, one scalar search.

    Searches log N over `n_range` on a grid of 400 and refines the best cell, so a cost that is only roughly smooth is
    fine. Raises UserError when `flops` is not positive or the minimum lies at an end of `n_range`.
    """
    from scipy.optimize import minimize_scalar

    check_flops(flops)

    def loss_at(log_n: float) -> float:
        n = math.exp(log_n)
        return float(law.loss(n, flops / flops_per_token(n)))

    grid = np.linspace(math.log(n_range[0]), math.log(n_range[1]), 400)
    best = int(np.argmin([loss_at(x) for x in grid]))
    if best in (0, len(grid) - 1):
        raise UserError(f"n_range {n_range}: the optimum at {flops:.3g} FLOPs lies at its end; widen it")
    found = minimize_scalar(
        loss_at, bounds=(grid[best - 1], grid[best + 1]), method="bounded", options={"xatol": 1e-10}
    )
    n = math.exp(float(found.x))
    return Allocation(float(flops), n, flops / flops_per_token(n), float(found.fun))


def fit_cost(n: np.ndarray, d: np.ndarray, flops: np.ndarray) -> tuple[Cost, float]:
    """Cost C = k · N^s · D of measured runs, and its largest relative misfit (0.02 = one run is 2 % off the power law).

    Exactly Cost(6, 1) for columns that were made with 6 N D. `n`, `d`, `flops`: `[runs]`, positive.
    """
    x, y = np.log(n), np.log(flops / d)
    if np.ptp(y - x) < 1e-3 or np.ptp(x) < 1e-9:  # proportional to N: keep the exponent exactly one
        cost = Cost(float(np.exp(np.mean(y - x))), 1.0)
    else:
        slope, intercept = np.polyfit(x, y, 1)
        cost = Cost(float(np.exp(intercept)), float(slope))
    if cost.n_exponent <= 0:
        raise UserError(
            f"columns n, d, flops: FLOPs per token fall as n grows (exponent {cost.n_exponent:.2f}); check "
            "that they are parameters, tokens and training FLOPs of the same runs"
        )
    return cost, float(np.max(np.abs(cost.flops(n, d) / flops - 1)))


def plain(value: Any) -> Any:
    """`value` as JSON takes it: numpy scalars to floats, arrays to lists; not-a-number and infinities to None."""
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()] if value.ndim else plain(value.item())
    if isinstance(value, (np.floating, float)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def check_flops(flops: Scalar) -> None:
    if not (math.isfinite(flops) and flops > 0):
        raise UserError(f"flops: {flops}; give a positive number of training FLOPs")
