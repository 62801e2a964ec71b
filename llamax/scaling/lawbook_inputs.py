"""Laws with inputs beside parameters and tokens: experts, granularity, bits; the best learning rate and batch."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from llamax.scaling.lawbook import chinchilla, exponent, floor, size
from llamax.scaling.laws import additive, power
from llamax.scaling.lawspec import LawSpec, Parameter, Values

LOG10 = 2.302585092994046
FEWEST_BITS = (1.0, 2.5, 6.0)
SIGNED_EXPONENTS = (-0.7, -0.3, 0.3, 0.7)


def _routed(p: Values, x: Values) -> Any:
    least = 1 / (1 / p["E_start"] - 1 / p["E_max"])
    useful = 1 / (1 / (x["experts"] - 1 + least) + 1 / p["E_max"])
    n, e = jnp.log(x["n_active"]) / LOG10, jnp.log(useful) / LOG10
    return jnp.exp(LOG10 * (p["a"] * n + p["b"] * e + p["c"] * n * e + p["d"]))


def _slope(name: str, about: str, lower: float = -2.0, upper: float = 2.0) -> Parameter:
    return Parameter(name, lower, upper, starts=(-0.1,) if upper <= 0 else (0.01,), about=about)


ROUTED = LawSpec(
    name="moe",
    formula="log10 L = a log10 N + b log10 E' + c log10 N log10 E' + d, "
    "1/E' = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max",
    source="Clark et al. 2022, arXiv:2202.01169, equation 1 (values: its table 3; all at 130 billion tokens)",
    columns=("n_active", "experts"),
    parameters=(
        _slope("a", "of the parameters a token uses"),
        _slope("b", "of the experts"),
        _slope("c", "how the gain of experts shrinks with size"),
        _slope("d", "the loss of one parameter, log10", -20.0, 20.0),
        Parameter("E_start", 1.0, 100.0, log=True, starts=(1.3, 2.0, 4.0), about="what one expert counts as"),
        Parameter("E_max", 100.0, 1e5, log=True, starts=(150.0, 300.0, 600.0, 3000.0), about="where experts saturate"),
    ),
    loss=_routed,
    linear=("a", "b", "c", "d"),
    linear_in="log",
    published={
        f"Clark et al. 2022, {label}": dict(zip(("a", "b", "c", "d", "E_start", "E_max"), values, strict=True))
        for label, values in {
            "S-BASE": (-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
            "RL-R": (-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
            "HASH": (-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
        }.items()
    },
)


def _granularity(p: Values, x: Values) -> Any:
    share = power(jnp, p["g"], x["granularity"], p["gamma"]) + p["a"]
    return p["c"] + power(jnp, share, x["n"], p["alpha"]) + power(jnp, p["b"], x["d"], p["beta"])


GRANULARITY = LawSpec(
    name="granularity",
    formula="L = c + (g / G^gamma + a) / N^alpha + b / D^beta",
    source="Krajewski et al. 2024, arXiv:2402.07871, equation 9 (values: table 1; N counts all 64 experts)",
    columns=("n", "d", "granularity"),
    parameters=(
        floor(name="c"),
        size("g", "of what coarse experts cost"),
        size("a", "of the term in N that granularity leaves"),
        size("b", "of the term in D"),
        exponent("alpha", "of N"),
        exponent("beta", "of D"),
        exponent("gamma", "of granularity"),
    ),
    loss=_granularity,
    linear=("c", "g", "a", "b"),
    published={
        "Krajewski et al. 2024": {
            "c": 0.47,
            "g": 2.1,
            "a": 18.1,
            "b": 30.8,
            "alpha": 0.115,
            "beta": 0.147,
            "gamma": 0.58,
        }
    },
)


def _kept(bits: Any, scale: Any) -> Any:
    """Log of 1 - exp(-P / gamma): the part of the parameters that P bits leave."""
    return jnp.log(-jnp.expm1(-jnp.minimum(bits, 1e6) / scale))


def _bits(name: str, what: str) -> Parameter:
    return Parameter(name, 0.05, 50.0, log=True, starts=FEWEST_BITS, about=f"bits that {what} cannot do without")


def _precision(p: Values, x: Values) -> Any:
    log_n = jnp.log(x["n"])
    for part, scale in (("weights", "gamma_w"), ("activations", "gamma_a"), ("kv", "gamma_kv")):
        log_n = log_n + _kept(x[f"bits_{part}"], p[scale])
    return additive(jnp, **chinchilla(p), n=jnp.exp(log_n), d=x["d"])


PRECISION = LawSpec(
    name="precision",
    formula="L = E + A / N'^alpha + B / D^beta, "
    "N' = N (1 - exp(-P_w / gamma_w)) (1 - exp(-P_a / gamma_a)) (1 - exp(-P_kv / gamma_kv))",
    source="Kumar et al. 2024, arXiv:2411.04330 (training in few bits)",
    columns=("n", "d", "bits_weights", "bits_activations", "bits_kv"),
    parameters=(
        floor(),
        size("A", "of the term in N"),
        size("B", "of the term in D"),
        exponent("alpha", "of N", (0.2, 0.35, 0.6)),
        exponent("beta", "of D", (0.2, 0.35, 0.6)),
        _bits("gamma_w", "the weights"),
        _bits("gamma_a", "the activations"),
        _bits("gamma_kv", "keys and values"),
    ),
    loss=_precision,
    linear=("E", "A", "B"),
)


def _quantized(p: Values, x: Values) -> Any:
    log_rise = (
        jnp.log(p["C"])
        + p["gamma_D"] * jnp.log(x["d"])
        - p["gamma_N"] * jnp.log(x["n"])
        - jnp.minimum(x["bits_post"], 1e6) / p["gamma_post"]
    )
    return additive(jnp, **chinchilla(p), n=x["n"], d=x["d"]) + jnp.exp(log_rise)


QUANTIZED = LawSpec(
    name="quantized",
    formula="L = E + A / N^alpha + B / D^beta + C D^gamma_D / N^gamma_N exp(-P / gamma_post)",
    source="Kumar et al. 2024, arXiv:2411.04330 (weights rounded after training)",
    columns=("n", "d", "bits_post"),
    parameters=(
        floor(),
        size("A", "of the term in N"),
        size("B", "of the term in D"),
        exponent("alpha", "of N", (0.2, 0.35, 0.6)),
        exponent("beta", "of D", (0.2, 0.35, 0.6)),
        size("C", "of what rounding costs"),
        exponent("gamma_D", "of D in it", (0.25, 0.5, 0.9)),
        exponent("gamma_N", "of N in it", (0.25, 0.5, 0.9)),
        Parameter("gamma_post", 0.05, 50.0, log=True, starts=(0.4, 1.0, 2.5), about="bits by which it falls to 1/e"),
    ),
    loss=_quantized,
    linear=("E", "A", "B", "C"),
)


def _step_lr(p: Values, x: Values) -> Any:
    return jnp.exp(jnp.log(p["c"]) + p["a"] * jnp.log(x["n"]) + p["b"] * jnp.log(x["d"]))


STEP_LR = LawSpec(
    name="step_lr",
    formula="lr = c N^a D^b",
    source="Li et al. 2025 (Step Law), arXiv:2503.04715: N without embeddings, best peak learning rate",
    columns=("n", "d"),
    parameters=(
        size("c", "the rate at N = D = 1"),
        Parameter("a", -3.0, 3.0, starts=SIGNED_EXPONENTS, about="of N"),
        Parameter("b", -3.0, 3.0, starts=SIGNED_EXPONENTS, about="of D"),
    ),
    loss=_step_lr,
    target="lr",
    linear=("c", "a", "b"),
    linear_in="log",
    published={"Li et al. 2025": {"c": 1.79, "a": -0.713, "b": 0.307}},
)


def _step_batch(p: Values, x: Values) -> Any:
    return jnp.exp(jnp.log(p["c"]) + p["b"] * jnp.log(x["d"]))


STEP_BATCH = LawSpec(
    name="step_batch",
    formula="batch = c D^b",
    source="Li et al. 2025 (Step Law), arXiv:2503.04715: best batch, tokens",
    columns=("d",),
    parameters=(
        size("c", "the batch at D = 1"),
        Parameter("b", -3.0, 3.0, starts=SIGNED_EXPONENTS, about="of D"),
    ),
    loss=_step_batch,
    target="batch",
    linear=("c", "b"),
    linear_in="log",
    published={"Li et al. 2025": {"c": 0.58, "b": 0.571}},
)


def _downstream(p: Values, x: Values) -> Any:
    return p["epsilon"] - jnp.exp(jnp.log(p["k"]) - p["gamma"] * x["loss"])


DOWNSTREAM = LawSpec(
    name="downstream",
    formula="error = epsilon - k exp(-gamma L)",
    source="Gadre et al. 2024, arXiv:2403.08540: mean error of many tasks from the loss",
    columns=("loss",),
    parameters=(
        Parameter("epsilon", 1e-3, 2.0, log=True, starts=(0.8,), about="the error of a model that knows nothing"),
        size("k", "how far it can fall"),
        Parameter("gamma", 0.01, 20.0, log=True, starts=(0.2, 0.5, 1.0, 2.0, 4.0), about="how fast it falls with loss"),
    ),
    loss=_downstream,
    target="error",
    linear=("epsilon", "k"),
    published={"Gadre et al. 2024": {"epsilon": 0.857, "k": 2.21, "gamma": 0.715}},
)
