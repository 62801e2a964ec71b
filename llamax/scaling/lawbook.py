"""Laws of the loss in parameters and tokens: the formulas of the papers, one function each, with its table entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

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


def power(coefficient: Any, base: Any, exponent: Any) -> Any:
    """coefficient · base^-exponent, in logarithms: neither factor overflows alone."""
    return jnp.exp(jnp.log(coefficient) - exponent * jnp.log(base))


def _chinchilla(p: Values, x: Values) -> Any:
    return p["E"] + power(p["A"], x["n"], p["alpha"]) + power(p["B"], x["d"], p["beta"])


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
    loss=_chinchilla,
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


def _coupled(p: Values, x: Values) -> Any:
    terms = jnp.log(p["A"]) - p["alpha"] * jnp.log(x["n"]), jnp.log(p["B"]) - p["beta"] * jnp.log(x["d"])
    return p["E"] + jnp.exp(p["gamma"] * jnp.logaddexp(*terms))


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
    loss=_coupled,
    linear=("E",),
    start=_coupled_starts,
)
