"""Every router against a loop over tokens written from the families' own rules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.components import DenseMlp, ExpertGroups, Init, MoeMlp, Router
from llamax.model.execution import Execution
from llamax.model.moe import MixtureOfExperts
from llamax.model.router import Choice, load, route, router_statistics, sequence_balance

from . import reference
from .modules import randomized

TOKENS, EXPERTS, WIDTH, HIDDEN = 64, 16, 6, 4


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# ---------------------------------------------------------------- the rules, one token at a time
def mixtral(row: np.ndarray, bias: np.ndarray) -> tuple[list[int], np.ndarray]:
    """The two largest logits, weighed by their own softmax."""
    chosen = np.argsort(-row)[:2]
    return list(chosen), reference.softmax(row[chosen])


def qwen2(row: np.ndarray, bias: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Four of a softmax over all, as they are."""
    chosen = np.argsort(-row)[:4]
    return list(chosen), reference.softmax(row)[chosen]


def deepseek_v2(row: np.ndarray, bias: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Softmax; the 3 groups of 8 with the largest member; what is left set to 0; raw probabilities x 16."""
    p = reference.softmax(row)
    masked = np.zeros_like(p)
    for g in sorted(range(8), key=lambda g: -p[2 * g : 2 * g + 2].max())[:3]:
        masked[2 * g : 2 * g + 2] = p[2 * g : 2 * g + 2]
    chosen = np.argsort(-masked)[:5]
    return list(chosen), 16.0 * masked[chosen]


def deepseek_v3(row: np.ndarray, bias: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Sigmoid; sigmoid + bias chooses, by the two groups of 4 with the largest sum of two; weights without the bias."""
    s = sigmoid(row)
    biased = s + bias
    masked = np.full_like(s, -np.inf)
    for g in sorted(range(4), key=lambda g: -np.sort(biased[4 * g : 4 * g + 4])[-2:].sum())[:2]:
        masked[4 * g : 4 * g + 4] = biased[4 * g : 4 * g + 4]
    chosen = np.argsort(-masked)[:5]
    return list(chosen), 2.5 * s[chosen] / s[chosen].sum()


def glm5(row: np.ndarray, bias: np.ndarray) -> tuple[list[int], np.ndarray]:
    """DeepSeek-V3 with one group."""
    s = sigmoid(row)
    chosen = np.argsort(-(s + bias))[:5]
    return list(chosen), 2.5 * s[chosen] / s[chosen].sum()


def llama4(row: np.ndarray, bias: np.ndarray) -> tuple[list[int], np.ndarray]:
    """The largest logit, weighed by its sigmoid."""
    return [int(row.argmax())], sigmoid(row[[row.argmax()]])


def sparsemixer(row: np.ndarray, bias: np.ndarray, jitter: float = 0.01) -> tuple[list[int], np.ndarray]:
    """Phi-3.5-MoE: the largest, its share of a softmax over those close to it; again without it."""
    chosen: list[int] = []
    weights = []
    for _ in range(2):
        left = [e for e in range(len(row)) if e not in chosen]
        top = max(row[e] for e in left)
        near = [e for e in left if (top - row[e]) / max(abs(row[e]), top) <= 2 * jitter]
        winner = max(left, key=lambda e: row[e])
        weights.append(np.exp(row[winner]) / sum(np.exp(row[e]) for e in near))
        chosen.append(winner)
    return chosen, np.array(weights)


GROUPED = Router(normalize=False, scale=16.0, groups=ExpertGroups(count=8, keep=3, by="max"))
V3 = Router(score="sigmoid", scale=2.5, bias=True, groups=ExpertGroups(count=4, keep=2, by="top2"))
RULES: dict[str, tuple[Any, Router, int]] = {
    "mixtral": (mixtral, Router(), 2),
    "qwen2": (qwen2, Router(normalize=False), 4),
    "deepseek_v2": (deepseek_v2, GROUPED, 5),
    "deepseek_v3": (deepseek_v3, V3, 5),
    "glm5": (glm5, V3.model_copy(update={"groups": None}), 5),
    "llama4": (llama4, Router(score="sigmoid", normalize=False, weigh="input"), 1),
    "sparsemixer": (sparsemixer, Router(score="sparsemixer", normalize=False), 2),
}


def scores(seed: int, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Random logits [TOKENS, EXPERTS] and a bias."""
    rng = np.random.default_rng(seed)
    logits = spread * rng.standard_normal((TOKENS, EXPERTS))
    return logits.astype(np.float32).astype(np.float64), 0.2 * rng.standard_normal(EXPERTS)


@pytest.mark.parametrize("name", RULES)
def test_router_equals_a_loop(name: str) -> None:
    rule, router, top_k = RULES[name]
    logits, bias = scores(0)
    if name == "sparsemixer":  # close calls, so that more than one expert is near the winner; both signs
        logits = (3.0 + 0.05 * logits) * np.where(np.arange(TOKENS) % 2, 1, -1)[:, None]
    given = jnp.asarray(bias, jnp.float32) if router.bias else None
    found = jax.jit(lambda x: route(x, router, top_k, given))(jnp.asarray(logits, jnp.float32))
    plain = [rule(row, bias) for row in logits]
    assert found.experts.tolist() == [chosen for chosen, _ in plain]
    np.testing.assert_allclose(found.weights, np.stack([w for _, w in plain]), rtol=2e-5)
    np.testing.assert_allclose(found.affinities.sum(-1), 1.0, rtol=1e-6)
    if name == "sparsemixer":
        assert np.mean(np.asarray(found.weights) < 0.99) > 0.5


def test_the_bias_and_the_groups_of_the_cases_change_the_choice() -> None:
    """Otherwise the loops above would prove nothing of them."""
    logits, bias = scores(0)

    def chosen(router: Router, **given: Any) -> np.ndarray:
        return np.asarray(route(jnp.asarray(logits, jnp.float32), router, 5, **given).experts)

    assert (chosen(V3, bias=jnp.asarray(bias, jnp.float32)) != chosen(V3)).any(1).mean() > 0.3
    for router in (V3, GROUPED):
        assert (chosen(router) != chosen(router.model_copy(update={"groups": None}))).any(1).mean() > 0.3


def test_bias_has_no_gradient_and_moves_no_weight() -> None:
    logits, bias = (jnp.asarray(a, jnp.float32) for a in scores(1))
    gradient = jax.grad(lambda b: jnp.sum(jnp.sin(route(logits, V3, 5, b).weights)))(bias)
    assert not np.any(gradient)
    same = route(logits, V3.model_copy(update={"normalize": False, "scale": 1.0}), 5, bias)
    np.testing.assert_allclose(same.weights, sigmoid(np.take_along_axis(np.asarray(logits), same.experts, -1)), 1e-6)


def test_weights_are_float32_for_bfloat16_logits() -> None:
    choice = route(jnp.asarray([[1.0, 2.0, 3.0]], jnp.bfloat16), Router(), 2)
    assert choice.weights.dtype == choice.affinities.dtype == jnp.float32
    np.testing.assert_allclose(choice.weights.sum(), 1.0, rtol=1e-6)


def test_sigmoids_that_underflow_or_saturate() -> None:
    """Weights stay finite at -200, and at 40, where every sigmoid is 1, the largest logit still wins."""
    low = route(jnp.full((1, 4), -200.0), Router(score="sigmoid"), 2)
    assert np.all(np.isfinite(low.weights))
    high = route(jnp.asarray([[40.0, 41.0, 39.0]]), Router(score="sigmoid", normalize=False), 1)
    assert high.experts.tolist() == [[1]]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "sparsemixer"])
def test_gradient_of_the_weights_equals_the_loop(name: str) -> None:
    rule, router, top_k = RULES[name]
    logits, bias = scores(2)
    logits = 3 + 0.05 * logits if name == "sparsemixer" else logits
    g = np.random.default_rng(3).standard_normal((4, top_k))
    given = jnp.asarray(bias, jnp.float32) if router.bias else None
    found = jax.grad(lambda x: jnp.sum(g * route(x, router, top_k, given).weights))(
        jnp.asarray(logits[:4], jnp.float32)
    )
    exact = reference.numeric_gradient(
        lambda x: float((g * np.stack([rule(row, bias)[1] for row in x])).sum()), logits[:4], step=1e-7
    )
    np.testing.assert_allclose(found, exact, atol=2e-5)
    assert np.abs(exact).max() > 1e-3


# ---------------------------------------------------------------- in the mixture
def layer(router: Router, top_k: int, **fields: Any) -> MixtureOfExperts:
    config = MoeMlp(
        kind="moe", experts=EXPERTS, top_k=top_k, expert=DenseMlp(kind="swiglu", d_ff=HIDDEN), router=router, **fields
    )
    return randomized(lambda key: MixtureOfExperts(config, WIDTH, Init(), jnp.float32(1), key=key), 0.7)


def inputs() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, 5, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("name", RULES)
def test_mixture_equals_a_loop(name: str) -> None:
    """Output weights multiply what an expert gives, input weights (Llama 4) what it gets: SwiGLU tells them apart."""
    rule, router, top_k = RULES[name]
    module, x = layer(router, top_k), inputs()
    p = {n: np.asarray(getattr(module, n)[...], np.float64) for n in ("router", "gate", "up", "down")}
    bias = np.asarray(module.router_bias[...], np.float64) if router.bias else np.zeros(EXPERTS)
    expected = np.zeros((10, WIDTH))
    for t, row in enumerate(x.reshape(-1, WIDTH).astype(np.float64)):
        for e, w in zip(*rule(row @ p["router"], bias), strict=True):
            inside, outside = (w, 1.0) if router.weigh == "input" else (1.0, w)
            hidden = reference.silu(inside * row @ p["gate"][e]) * (inside * row @ p["up"][e])
            expected[t] += outside * (hidden @ p["down"][e])
    y, statistics = jax.jit(lambda m, x: m(x, Execution()))(module, x)
    np.testing.assert_allclose(np.asarray(y).reshape(-1, WIDTH), expected, atol=2e-5)
    assert ("load" in statistics) == router.bias


def test_shared_gate_is_a_sigmoid_of_the_token() -> None:
    """Qwen1.5-MoE: routed + sigmoid(x . gate) shared(x)."""
    module, x = layer(Router(), 2, shared=DenseMlp(kind="swiglu", d_ff=4), shared_gate=True), inputs()
    both = np.asarray(module(jnp.asarray(x), Execution())[0])
    shared = np.asarray(module.shared(jnp.asarray(x), Execution()))
    module.shared_gate.set_value(jnp.full((WIDTH, 1), 0.0))
    half = np.asarray(module(jnp.asarray(x), Execution())[0])
    routed = half - 0.5 * shared
    gate = layer(Router(), 2, shared=DenseMlp(kind="swiglu", d_ff=4), shared_gate=True).shared_gate[...]
    np.testing.assert_allclose(both, routed + sigmoid(x @ np.asarray(gate)) * shared, atol=2e-5)


# ---------------------------------------------------------------- statistics
def test_load_counts_picks() -> None:
    chosen = np.random.default_rng(0).integers(0, 5, (20, 3))
    np.testing.assert_array_equal(load(jnp.asarray(chosen), 6), np.bincount(chosen.reshape(-1), minlength=6))


def test_sequence_balance_equals_a_loop() -> None:
    """arXiv:2412.19437, eq. 17-20, on two sequences whose own loads differ though together they are even."""
    s = np.random.default_rng(0).random((2, 7, 5))
    s[0, :, :2] += 1
    s[1, :, 3:] += 1
    s /= s.sum(-1, keepdims=True)
    expected = []
    for sequence in s:
        picks = np.zeros(5)
        for token in sequence:
            picks[np.argsort(-token)[:2]] += 1
        expected.append(sum(5 / (2 * 7) * picks[i] * sequence[:, i].mean() for i in range(5)))
    affinities = jnp.asarray(s.reshape(14, 5), jnp.float32)
    largest = jax.lax.top_k(affinities, 2)[1]
    found = sequence_balance(affinities, largest, 2)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-6)
    assert float(found) > 1.1 * float(sequence_balance(affinities, largest, 1))


def test_sequence_balance_reads_affinities_not_the_biased_choice() -> None:
    logits, bias = scores(4)
    x = jnp.asarray(logits, jnp.float32)
    plain, biased = (router_statistics(x, route(x, V3, 5, b)) for b in (None, jnp.asarray(5 * bias, jnp.float32)))
    assert float(plain["sequence_balance"]) == float(biased["sequence_balance"])
    assert float(plain["entropy"]) != float(biased["entropy"])


def test_statistics_take_any_choice() -> None:
    """All tokens on one expert: no entropy, and a balance of E."""
    chosen = jnp.zeros((6, 1), jnp.int32)
    choice = Choice(jnp.ones((6, 1)), chosen, jax.nn.one_hot(chosen[:, 0], 4), chosen)
    found = router_statistics(jnp.zeros((6, 4)), choice, sequences=2)
    assert {name: float(found[name]) for name in ("balance", "sequence_balance", "entropy", "dead")} == {
        "balance": 4.0, "sequence_balance": 4.0, "entropy": 0.0, "dead": 3.0,
    }  # fmt: skip
