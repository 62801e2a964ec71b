from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.components import Nope, Rope, Temperature
from llamax.config.rotary import RopeLinear, RopeLlama3, RopeLongrope, RopeYarn
from llamax.model.position import (
    alibi_slopes,
    inverse_frequencies,
    logit_scale,
    query_temperature,
    rotary_table,
    rotate,
    sinusoids,
)

DIM = 64


def test_plain_frequencies() -> None:
    freqs, factor = inverse_frequencies(Rope(theta=10000.0), 8)
    np.testing.assert_allclose(freqs, [1.0, 0.1, 0.01, 0.001])
    assert factor == 1


def test_partial_rotary_uses_the_rotary_width() -> None:
    """Phi: frequencies over 4 of 8 dimensions, the rest passes through."""
    rope = Rope(theta=10000.0, fraction=0.5)
    np.testing.assert_allclose(inverse_frequencies(rope, 8)[0], [1.0, 0.01])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 2, 8)), jnp.float32)
    y = rotate(x, jnp.asarray(rotary_table(rope, 8, 5)))
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    assert float(jnp.abs(y[:, 1:, :, :4] - x[:, 1:, :, :4]).min()) > 1e-6


def test_linear_scaling_is_position_interpolation() -> None:
    """Position 4 p of the scaled table is position p of the plain one (arXiv:2306.15595)."""
    plain, scaled = rotary_table(Rope(), 16, 8), rotary_table(Rope(scaling=RopeLinear(factor=4.0)), 16, 32)
    np.testing.assert_allclose(scaled[:, ::4], plain, atol=1e-6)


def llama3_reference(freqs: list[float], factor: float, low: float, high: float, old: float) -> list[float]:
    """`apply_scaling` of Llama 3.1's reference code (llama_models/llama3/reference_impl/model.py), as published."""
    low_freq_wavelen, high_freq_wavelen = old / low, old / high
    new = []
    for freq in freqs:
        wavelen = 2 * math.pi / freq
        if wavelen < high_freq_wavelen:
            new.append(freq)
        elif wavelen > low_freq_wavelen:
            new.append(freq / factor)
        else:
            smooth = (old / wavelen - low) / (high - low)
            new.append((1 - smooth) * freq / factor + smooth * freq)
    return new


@pytest.mark.parametrize(("factor", "low", "high"), [(8.0, 1.0, 4.0), (32.0, 1.0, 4.0), (16.0, 1.0, 1.0)])
def test_llama3_scaling(factor: float, low: float, high: float) -> None:
    scaling = RopeLlama3(factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_len=8192)
    found, multiplier = inverse_frequencies(Rope(theta=500000.0, scaling=scaling), 128)
    plain = [500000.0 ** (-2 * i / 128) for i in range(64)]
    expected = llama3_reference(plain, factor, low, high, 8192)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert multiplier == 1
    kinds = {"kept": 0, "divided": 0, "between": 0}
    for new, old in zip(expected, plain, strict=True):
        kinds["kept" if new == old else "divided" if new == old / factor else "between"] += 1
    assert kinds["kept"] > 0
    assert kinds["divided"] > 0
    assert (kinds["between"] > 0) == (low != high)


@pytest.mark.parametrize(("factor", "original"), [(4.0, 4096), (40.0, 4096), (16.0, 2048)])
def test_yarn_interpolates_by_parts(factor: float, original: int) -> None:
    """Where a dimension turns more than beta_fast = 32 times over the original length it is kept, less than once it is
    divided by the factor; between, it lies between, and grows monotonically (arXiv:2309.00071, section 3.2)."""
    plain, _ = inverse_frequencies(Rope(), DIM)
    found, _ = inverse_frequencies(Rope(scaling=RopeYarn(factor=factor, original_max_len=original)), DIM)
    turns = original * plain / (2 * math.pi)
    ratio = found / plain
    # The reference implementation rounds the two boundaries outwards to whole dimensions.
    np.testing.assert_allclose(ratio[turns > 32 * plain[0] / plain[1]], 1.0)
    np.testing.assert_allclose(ratio[turns < plain[1] / plain[0]], 1 / factor)
    assert np.all(np.diff(ratio) <= 1e-12)
    between = (turns < 16) & (turns > 2)
    assert between.any()
    assert np.all((ratio[between] < 1) & (ratio[between] > 1 / factor))


def test_yarn_of_deepseek_v2() -> None:
    """Values worked by hand: theta 1e4, 64 rotary dimensions, factor 40, 4096 -> low = 10, high = 23.

    low = floor(64 ln(4096 / (32 x 2 pi)) / (2 ln 1e4)) = floor(10.47),
    high = ceil(64 ln(4096 / (2 pi)) / (2 ln 1e4)) = ceil(22.51).
    """
    scaling = RopeYarn(factor=40.0, original_max_len=4096, mscale=0.707, mscale_all_dim=0.707)
    rope = Rope(scaling=scaling)
    freqs, multiplier = inverse_frequencies(rope, DIM)
    plain, _ = inverse_frequencies(Rope(), DIM)
    np.testing.assert_allclose(freqs[:11], plain[:11])
    np.testing.assert_allclose(freqs[23:], plain[23:] / 40)
    np.testing.assert_allclose(freqs[15] / plain[15], (1 - 5 / 13) + 5 / 13 / 40)
    assert multiplier == 1
    np.testing.assert_allclose(logit_scale(rope, 192) * 192**0.5, 1.5896, atol=1e-4)  # 1.2608 squared


def test_yarn_temperature_without_mscale() -> None:
    """cos and sin are multiplied by 0.1 ln s + 1, the logit scale stays."""
    rope = Rope(scaling=RopeYarn(factor=16.0, original_max_len=64))
    table = rotary_table(rope, 8, 4)
    np.testing.assert_allclose(np.hypot(table[0], table[1]), 0.1 * math.log(16) + 1, rtol=1e-6)
    assert logit_scale(rope, 64) == 0.125
    assert logit_scale(Nope(), 64) == 0.125


@pytest.mark.parametrize(
    "scaling",
    [None, RopeLinear(factor=3.0), RopeLlama3(factor=8.0, original_max_len=64)],
    ids=["plain", "linear", "llama3"],
)
def test_products_depend_on_the_distance_alone(scaling: RopeLinear | RopeLlama3 | None) -> None:
    q, k = (np.random.default_rng(i).standard_normal(8).astype(np.float32) for i in (0, 1))
    table = jnp.asarray(rotary_table(Rope(scaling=scaling), 8, 12))
    at = jax.jit(lambda x: rotate(jnp.broadcast_to(x, (1, 12, 1, 8)), table)[0, :, 0])
    products = np.asarray(at(q) @ at(k).T)
    for distance in range(-11, 12):
        diagonal = np.diagonal(products, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=2e-6)
    assert products.std() > 0.1


def test_rotation_is_half_split() -> None:
    """Dimension i turns with i + half, by position x theta^(-2i / dim) (arXiv:2104.09864, in Hugging Face's layout)."""
    x = np.random.default_rng(0).standard_normal((1, 6, 1, 8)).astype(np.float32)
    y = np.asarray(rotate(jnp.asarray(x), jnp.asarray(rotary_table(Rope(theta=100.0), 8, 6))))[0, :, 0]
    turned = (x[0, :, 0, :4] + 1j * x[0, :, 0, 4:]) * np.exp(1j * np.outer(np.arange(6), 100.0 ** -(np.arange(4) / 4)))
    np.testing.assert_allclose(y[:, :4] + 1j * y[:, 4:], turned, atol=2e-6)


def test_interleaved_rotation() -> None:
    """Dimension 2i turns with 2i + 1 (arXiv:2104.09864, eq. 15); the rest of a partly rotated head stays."""
    x = np.random.default_rng(0).standard_normal((1, 6, 1, 10)).astype(np.float32)
    table = jnp.asarray(rotary_table(Rope(theta=100.0), 8, 6))
    y = np.asarray(rotate(jnp.asarray(x), table, "interleaved"))[0, :, 0]
    turned = (x[0, :, 0, :8:2] + 1j * x[0, :, 0, 1:8:2]) * np.exp(1j * np.outer(range(6), 100.0 ** -(np.arange(4) / 4)))
    np.testing.assert_allclose(y[:, :8:2] + 1j * y[:, 1:8:2], turned, atol=2e-6)
    np.testing.assert_array_equal(y[:, 8:], x[0, :, 0, 8:])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rows_at_different_positions(layout: Any) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 2, 8)), jnp.float32)
    table = jnp.asarray(rotary_table(Rope(theta=100.0), 8, 9))
    found = rotate(x, table[:, jnp.asarray([[0, 1, 2], [5, 6, 7]])], layout)
    np.testing.assert_allclose(found[0], rotate(x[:1], table[:, :3], layout)[0], atol=1e-6)
    np.testing.assert_allclose(found[1], rotate(x[1:], table[:, 5:8], layout)[0], atol=1e-6)


def test_longrope_factors_given_one_by_one() -> None:
    """Each replaces the square root on its own side of the original length (Phi-3-small's code)."""
    fields = {"short": (1.0, 1.1), "long": (1.5, 4.0), "original_max_len": 16, "factor": 4.0}
    root = math.sqrt(1 + math.log(4.0) / math.log(16))
    for given, expected in [
        ({}, (root, root)),
        ({"short_mscale": 1.0}, (1.0, root)),
        ({"short_mscale": 1.3, "long_mscale": 0.7}, (1.3, 0.7)),
    ]:
        rope = Rope(scaling=RopeLongrope(**fields, **given))
        assert tuple(inverse_frequencies(rope, 4, length)[1] for length in (16, 17)) == expected


def test_longrope_changes_with_the_whole_length() -> None:
    """Each frequency by its own factor: `short` up to original_max_len tokens, `long` for all positions beyond."""
    scaling = RopeLongrope(short=(1.0, 2.0), long=(4.0, 8.0), original_max_len=16, factor=4.0)
    rope, temperature = Rope(theta=100.0, scaling=scaling), math.sqrt(1 + math.log(4) / math.log(16))
    for length, factors in ((16, (1.0, 2.0)), (17, (4.0, 8.0))):
        found, multiplier = inverse_frequencies(rope, 4, length)
        np.testing.assert_allclose(found, [1.0 / factors[0], 0.1 / factors[1]])
        assert multiplier == pytest.approx(temperature)
        table = rotary_table(rope, 4, length)
        np.testing.assert_allclose(table[0, 3], temperature * np.cos(3 * found), rtol=1e-6)
    np.testing.assert_array_equal(rotary_table(rope, 4, 8, planned=17), rotary_table(rope, 4, 17)[:, :8])


def test_query_temperature_of_llama_4() -> None:
    """1 + 0.1 log(1 + floor((position + 1) / 8192)): 1 for the first 8191 queries."""
    positions = jnp.asarray([0, 8190, 8191, 16382, 16383])
    expected = [1, 1, 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(3)]
    np.testing.assert_allclose(query_temperature(Temperature(), positions), expected, rtol=1e-6)


def test_table_keeps_its_precision_at_long_positions() -> None:
    table = rotary_table(Rope(), 4, 100_001)
    np.testing.assert_allclose(table[:, 100_000, 0], [math.cos(100_000), math.sin(100_000)], atol=1e-7)


def test_alibi_slopes_of_the_paper() -> None:
    """arXiv:2108.12409, section 3: 1/2 ... 1/2^8 for 8 heads, 1/2^0.5 ... 1/2^8 for 16."""
    np.testing.assert_allclose(alibi_slopes(8), [1 / 2**i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(16), [2 ** (-i / 2) for i in range(1, 17)], rtol=1e-6)


def test_alibi_slopes_between_powers_of_two() -> None:
    """The authors' code: 12 heads have the slopes of 8, then the 1st, 3rd, 5th, 7th of 16."""
    np.testing.assert_allclose(alibi_slopes(12), [*alibi_slopes(8), *alibi_slopes(16)[0:8:2]], rtol=1e-6)
    assert alibi_slopes(1).tolist() == [2**-8]


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoids_of_the_paper(width: int) -> None:
    """PE(pos, 2i) = sin(pos / 10000^(2i / d)), PE(pos, 2i + 1) = cos(the same) (arXiv:1706.03762, section 3.5)."""
    table = sinusoids(5, width)
    for position in range(5):
        for i in range(width):
            angle = position / 10000 ** (2 * (i // 2) / width)
            assert table[position, i] == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_the_gradient_of_a_rotation_is_its_adjoint(layout: str, factor: float) -> None:
    """<rotate(x), g> = <x, pulled g> for all x and g, as rotate is linear; also where only a part of a head turns, and
    with YaRN's factor on cos and sin."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.standard_normal((2, 6, 3, 12)), jnp.float32) for _ in range(2))
    table = factor * jnp.asarray(rotary_table(Rope(theta=100.0), 8, 6))
    y, pull = jax.vjp(lambda x: rotate(x, table, layout), x)
    np.testing.assert_allclose(jnp.vdot(y, g), jnp.vdot(x, pull(g)[0]), rtol=1e-5)
    np.testing.assert_allclose(pull(g)[0][..., 8:], g[..., 8:])
