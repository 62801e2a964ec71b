"""The distribution each setting draws from, beside a loop over tokens in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamax.errors import UserError
from llamax.generate.sampling import GREEDY, Sampling, kept, rows_of, sample

VOCAB = 12
distribution = jax.jit(kept)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, VOCAB, 99]),
    top_p=st.sampled_from([0.05, 0.4, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)


def brute(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """Probabilities of one row, token by token, in float64."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if s.temperature == 0:
        return np.eye(len(logits))[order[0]]
    weight = {i: np.exp((float(logits[i]) - float(logits[order[0]])) / s.temperature) for i in order}
    left = order[: s.top_k] if s.top_k else order
    total = sum(weight[i] for i in left)
    chosen, mass = [], 0.0
    for i in left:
        if not chosen or ((s.top_p >= 1 or mass < s.top_p) and weight[i] >= s.min_p * weight[order[0]]):
            chosen.append(i)
        mass += weight[i] / total
    p = np.array([weight[i] if i in chosen else 0.0 for i in range(len(logits))])
    return p / p.sum()


@settings(max_examples=200, deadline=None)
@given(st.lists(samplings, min_size=3, max_size=3), st.integers(0, 10**6))
def test_distribution(rows: list[Sampling], seed: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, (3, VOCAB)).astype(np.float32)
    ours = jax.nn.softmax(distribution(jnp.asarray(logits), rows_of(rows)), axis=-1)
    for row, s, got in zip(logits, rows, np.asarray(ours), strict=True):
        np.testing.assert_allclose(got, brute(row, s), atol=2e-6)


def test_ties_are_cut_by_id() -> None:
    logits = jnp.zeros((3, 4))
    rows = rows_of([Sampling(top_k=2), Sampling(top_p=0.5), GREEDY])
    np.testing.assert_array_equal(kept(logits, rows) > -1, [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]])


def test_frequencies() -> None:
    """20000 draws follow the distribution: a chi-square of 11 degrees under its 99.99 % quantile."""
    logits = jnp.tile(jnp.asarray(np.random.default_rng(0).normal(0, 1.5, VOCAB), jnp.float32), (20_000, 1))
    s = Sampling(temperature=0.8, top_p=0.95)
    keys = jax.random.split(jax.random.key(1), len(logits))
    drawn = np.asarray(jax.jit(sample)(logits, rows_of([s] * len(logits)), keys, jnp.zeros(len(logits), jnp.int32)))
    p, counts = brute(np.asarray(logits[0]), s), np.bincount(drawn, minlength=VOCAB)
    assert counts[p == 0].sum() == 0
    expected = p[p > 0] * len(drawn)
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 37.4


def test_a_row_depends_on_its_own_key_and_position_alone() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (4, VOCAB)), jnp.float32)
    rows, keys = rows_of([Sampling()] * 4), jax.random.split(jax.random.key(0), 4)
    draw = jax.jit(sample)
    together = draw(logits, rows, keys, jnp.arange(4))
    for b in range(4):
        alone = draw(logits[b : b + 1], rows_of([Sampling()]), keys[b : b + 1], jnp.asarray([b]))
        assert alone[0] == together[b]
    later = [draw(logits, rows, keys, jnp.full(4, i)).tolist() for i in range(8)]
    assert len({tuple(drawn) for drawn in later}) > 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 2.0),
    ],
)
def test_out_of_range(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field}={value}: give "):
        rows_of([Sampling()._replace(**{field: value})])
