"""Laws of the loss in parameters and tokens: the formulas of the papers, one function each, with its table entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from llamax.scaling.laws import additive, coupled
from llamax.scaling.lawspec import LawSpec, Parameter, Values

EXPONENTS = (0.1, 0.2, 0.35, 0.5, 0.8)


def floor(about: str = "irreducible loss", name: str = "E") -> Parameter:
    """The loss that no scale removes."""
    return Parameter(name, 1e-4, 20.0, log=True, starts=(1.0,), about=about)


def size(name: str, about: str) -> Parameter:
    """The coefficient of a power term: any positive magnitude."""
    return Parameter(name, 1e-12, 1e40, log=True, starts=(100.0,), about=about)


def exponent(name: str, about: str, starts: tuple[float, ...] = EXPONENTS) -> Parameter:
    """The exponent of a power term."""
    return Parameter(name, 0.01, 3.0, log=True, starts=starts, about=about)


CHINCHILLA = LawSpec(
    name="chinchilla",
    formula="L = E + A / N^alpha + B / D^beta",
    source="Hoffmann et al. 2022, arXiv:2203.15556, equation 2 (values: its section D.3; Besiroglu et al. 2024)",
    columns=("n", "d"),
    parameters=(
        floor(),
        size("A", "of the term in N"),
        size("B", "of the term in D"),
        exponent("alpha", "of N"),
        exponent("beta", "of D"),
    ),
    loss=lambda p, x: additive(jnp, **p, n=x["n"], d=x["d"]),
    linear=("E", "A", "B"),
    published={
        "Hoffmann et al. 2022": {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
        "Besiroglu et al. 2024, arXiv:2404.10102": {
            "E": 1.8172,
            "A": 482.01,
            "B": 2085.43,
            "alpha": 0.3478,
            "beta": 0.3658,
        },
    },
)


def chinchilla(p: Values) -> dict[str, Any]:
    """E, A, B, alpha, beta of a law that has them among others."""
    return {name: p[name] for name in CHINCHILLA.names}


def _coupled_starts(data: Mapping[str, np.ndarray], target: np.ndarray) -> list[dict[str, float]]:
    """The best additive fits, written with each of a few gamma: (A / N^alpha)^gamma is then the same term."""
    points = []
    for e, a, b, alpha, beta in CHINCHILLA.starts(data, target, 40):
        for g in (1.0, 0.5, 0.25):
            logs = np.minimum(np.log([a, b]) / g, 690.0)
            a_g, b_g = np.exp(logs)
            points.append({"E": e, "A": a_g, "B": b_g, "alpha": alpha / g, "beta": beta / g, "gamma": g})
    return points


COUPLED = LawSpec(
    name="coupled",
    formula="L = E + (A / N^alpha + B / D^beta)^gamma",
    source="Busbridge et al. 2025, arXiv:2502.08606 (the supervised law); E = 0: Kaplan et al. 2020, arXiv:2001.08361, "
    "equation 1.5",
    columns=("n", "d"),
    parameters=(
        floor(),
        Parameter("A", 1e-12, 1e250, log=True, starts=(100.0,), about="of the term in N"),
        Parameter("B", 1e-12, 1e250, log=True, starts=(100.0,), about="of the term in D"),
        Parameter("alpha", 0.01, 10.0, log=True, starts=EXPONENTS, about="of N"),
        Parameter("beta", 0.01, 10.0, log=True, starts=EXPONENTS, about="of D"),
        Parameter("gamma", 0.1, 3.0, log=True, starts=(0.5,), about="how the terms add: 1 = their sum, 0 = the larger"),
    ),
    loss=lambda p, x: coupled(jnp, **p, n=x["n"], d=x["d"]),
    linear=("E",),
    start=_coupled_starts,
)


def _overtraining(p: Values, x: Values) -> Any:
    log_m, log_c = jnp.log(x["d"]) - jnp.log(x["n"]), jnp.log(6 * x["n"]) + jnp.log(x["d"])
    rising = jnp.log(p["a"]) + p["eta"] * (log_m - log_c)
    falling = jnp.log(p["b"]) - p["eta"] * (log_m + log_c)
    return p["E"] + jnp.exp(rising) + jnp.exp(falling)


OVERTRAINING = LawSpec(
    name="overtraining",
    formula="L = E + (a M^eta + b M^-eta) C^-eta, M = D / N, C = 6 N D",
    source="Gadre et al. 2024, arXiv:2403.08540 (the Chinchilla law with alpha = beta = 2 eta)",
    columns=("n", "d"),
    parameters=(
        floor(),
        size("a", "of the loss that over-training costs; A 6^eta of the Chinchilla law"),
        size("b", "of the loss that under-training costs; B 6^eta"),
        exponent("eta", "of compute", (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)),
    ),
    loss=_overtraining,
    linear=("E", "a", "b"),
    published={"Gadre et al. 2024": {"E": 1.84, "a": 212.0, "b": 367.0, "eta": 0.136}},
)


def useful(log_unique: Any, repeats: Any, decay: Any) -> Any:
    """Log of U + U R* (1 - exp(-R / R*)): what U distinct units and R repeats of them are worth (equation 5)."""
    return log_unique + jnp.log1p(-decay * jnp.expm1(-repeats / decay))


def _repeated(p: Values, x: Values) -> Any:
    log_n, log_d = jnp.log(x["n"]), jnp.log(x["d"])
    log_u = jnp.minimum(jnp.log(x["unique_tokens"]), log_d)
    log_g = (jnp.log(p["alpha"] * p["A"]) - jnp.log(p["beta"] * p["B"])) / (p["alpha"] + p["beta"])
    log_best_n = log_g + p["beta"] / p["alpha"] * (log_g + log_u)  # of the compute at which U is the best D
    log_un = jnp.minimum(log_n, log_best_n)
    n = useful(log_un, jnp.expm1(log_n - log_un), p["R_N"])
    d = useful(log_u, jnp.expm1(log_d - log_u), p["R_D"])
    return additive(jnp, **chinchilla(p), n=jnp.exp(n), d=jnp.exp(d))


def _repeated_starts(data: Mapping[str, np.ndarray], target: np.ndarray) -> list[dict[str, float]]:
    """Good Chinchilla fits of all runs and of those with little repetition, with a few decays each."""
    fresh = data["d"] <= 2 * data["unique_tokens"]
    masks = [np.ones_like(fresh)] + ([fresh] if fresh.sum() > 5 else [])
    points = []
    for mask in masks:
        for start in CHINCHILLA.starts({k: data[k][mask] for k in ("n", "d")}, target[mask], 10):
            for r_d in (5.0, 15.0, 60.0):
                for r_n in (2.0, 5.0, 20.0):
                    points.append(dict(zip(CHINCHILLA.names, start, strict=True)) | {"R_D": r_d, "R_N": r_n})
    return points


REPEATED = LawSpec(
    name="repeated",
    formula="L = E + A / N'^alpha + B / D'^beta, D' = U + U R_D (1 - exp(-(D/U - 1) / R_D)), N' alike with the best N "
    "for U tokens as its U and with R_N",
    source="Muennighoff et al. 2023, arXiv:2305.16264, equations 5 and 6 (values: its appendix A, equations 16 to 20)",
    columns=("n", "d", "unique_tokens"),
    parameters=(
        floor(),
        size("A", "of the term in N"),
        size("B", "of the term in D"),
        exponent("alpha", "of N"),
        exponent("beta", "of D"),
        Parameter("R_D", 0.1, 1e4, log=True, starts=(15.0,), about="repeats by which a token has lost 1/e of its use"),
        Parameter("R_N", 0.1, 1e4, log=True, starts=(5.0,), about="the same for parameters beyond the best N for U"),
    ),
    loss=_repeated,
    linear=("E",),
    published={
        "Muennighoff et al. 2023, C4": {
            "E": float(np.exp(0.6254804)),
            "A": float(np.exp(6.255414)),
            "B": float(np.exp(7.3049974)),
            "alpha": 0.3526596,
            "beta": 0.3526596,
            "R_D": 15.387756,
            "R_N": 5.309743,
        }
    },
    start=_repeated_starts,
)
