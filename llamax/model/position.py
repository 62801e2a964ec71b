"""Position signals: rotary tables and their scalings, ALiBi slopes, sinusoids."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llamax.config.components import Rope, RotaryLayout, Temperature
from llamax.config.model import ModelConfig
from llamax.config.rotary import RopeLinear, RopeLlama3, RopeLongrope, RopeYarn


def inverse_frequencies(rope: Rope, head_dim: int, length: int = 0) -> tuple[np.ndarray, float]:
    """Angular frequencies [rotary_dim / 2] in radians a token, and the factor on cos and sin (YaRN, LongRoPE; else 1).

    `length` is the whole sequence's, prompt and continuation: LongRoPE has other factors for long sequences.
    Sources: arXiv:2104.09864 (RoPE), 2306.15595 (linear), Llama 3.1's reference code (llama3), 2309.00071 (YaRN),
    2402.13753 and Phi-3's code (LongRoPE).
    """
    dim = int(head_dim * rope.fraction)
    freqs = rope.theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    match rope.scaling:
        case RopeLinear(factor=factor):
            return freqs / factor, 1.0
        case RopeLlama3() as s:
            return _llama3(freqs, s), 1.0
        case RopeYarn() as s:
            return _yarn(freqs, rope.theta, dim, s)
        case RopeLongrope() as s:
            factors, mscale = (s.long, s.long_mscale) if length > s.original_max_len else (s.short, s.short_mscale)
            default = math.sqrt(1 + math.log(s.factor) / math.log(s.original_max_len))
            return freqs / np.asarray(factors), default if mscale is None else mscale
    return freqs, 1.0


def _llama3(freqs: np.ndarray, s: RopeLlama3) -> np.ndarray:
    wavelength = 2 * math.pi / freqs
    long, short = s.original_max_len / s.low_freq_factor, s.original_max_len / s.high_freq_factor
    if s.high_freq_factor == s.low_freq_factor:  # no ramp between the two: 0 / 0 otherwise
        return np.where(wavelength > long, freqs / s.factor, freqs)
    ramp = (s.original_max_len / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    between = (1 - ramp) * freqs / s.factor + ramp * freqs
    return np.where(wavelength > long, freqs / s.factor, np.where(wavelength < short, freqs, between))


def _yarn(freqs: np.ndarray, theta: float, dim: int, s: RopeYarn) -> tuple[np.ndarray, float]:
    def index(rotations: float) -> float:
        return dim * math.log(s.original_max_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(index(s.beta_fast)), 0), min(math.ceil(index(s.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    scaled = freqs / s.factor * ramp + freqs * (1 - ramp)
    if s.mscale and s.mscale_all_dim:
        return scaled, yarn_temperature(s.factor, s.mscale) / yarn_temperature(s.factor, s.mscale_all_dim)
    return scaled, yarn_temperature(s.factor, 1.0)


def yarn_temperature(factor: float, mscale: float) -> float:
    """YaRN's m(factor, mscale) = 0.1 mscale ln(factor) + 1 (1 where factor <= 1)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def logit_scale(rope: object, head_dim: int) -> float:
    """The default factor on attention logits: head_dim ** -0.5, times YaRN's squared temperature where it is given."""
    scaling = rope.scaling if isinstance(rope, Rope) else None
    if isinstance(scaling, RopeYarn) and scaling.mscale_all_dim:
        return head_dim**-0.5 * yarn_temperature(scaling.factor, scaling.mscale_all_dim) ** 2
    return head_dim**-0.5


def rotary_table(
    rope: Rope, head_dim: int, length: int, planned: int | None = None
) -> Float[np.ndarray, "2 length half"]:
    """cos and sin [2, length, rotary_dim / 2] for positions 0 .. length - 1, float32.

    `planned`: the whole sequence's length where that is not `length` (see `inverse_frequencies`).
    """
    freqs, factor = inverse_frequencies(rope, head_dim, length if planned is None else planned)
    angles = np.arange(length, dtype=np.float64)[:, None] * freqs
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32) * np.float32(factor)


class PositionTables(NamedTuple):
    """What the model's positions need, for positions 0, 1, ...: a rotary table a kind (see `rotary_kinds`), and the
    vectors added to the embedding where they are fixed."""

    rotary: tuple[Float[Array, "2 length half"], ...]
    added: Float[Array, "length d_model"] | None


def rotary_kinds(config: ModelConfig) -> tuple[tuple[Rope, int], ...]:
    """The different (rotary embedding, width of the part of a head it may turn) of a model's layers."""
    blocks = [block for _, unit in config.blocks for block in unit]
    return tuple(dict.fromkeys((b.position, b.attention.rotary_width) for b in blocks if isinstance(b.position, Rope)))


def position_tables(config: ModelConfig, length: int, planned: int | None = None) -> PositionTables:
    """The tables of `config` for `length` positions; `planned` as in `rotary_table`."""
    rotary = tuple(jnp.asarray(rotary_table(*kind, length, planned)) for kind in rotary_kinds(config))
    sinusoidal = config.position.kind == "sinusoidal"
    return PositionTables(rotary, jnp.asarray(sinusoids(length, config.d_model)) if sinusoidal else None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rotate(
    x: Float[Array, "batch seq heads head_dim"], table: Float[Array, "2 *where half"], layout: RotaryLayout = "half"
) -> Float[Array, "batch seq heads head_dim"]:
    """x with its first 2 x half dimensions rotated, the rest as it was.

    `table` is [2, seq, half], or [2, batch, seq, half] where rows are at different positions; it is a constant, without
    a gradient. Dimension i turns with i + half, or 2i with 2i + 1 where the layout is interleaved.
    """
    half = table.shape[-1]
    cos, sin = (t[..., None, :].astype(x.dtype) for t in table)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if layout == "interleaved":
        pairs = turned.reshape(*x.shape[:-1], half, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        return jnp.concatenate([jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(turned.shape), rest], -1)
    a, b = turned[..., :half], turned[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _rotate_backward(layout: RotaryLayout, table: Array, g: Array) -> tuple[Array, None]:
    """The rotation back. Autodiff of the slices would pad each part to the whole and add them up."""
    return rotate(g, table * jnp.asarray([1.0, -1.0]).reshape(2, *[1] * (table.ndim - 1)), layout), None


rotate.defvjp(lambda x, table, layout: (rotate(x, table, layout), table), _rotate_backward)


def query_temperature(config: Temperature, positions: Int[Array, "*where"]) -> Float[Array, "*where"]:
    """Llama 4's factor on the query at each position: 1 up to `floor`, then a little more every `floor` tokens."""
    return 1.0 + config.scale * jnp.log1p(((positions + 1) // config.floor).astype(jnp.float32))


def alibi_slopes(heads: int) -> Float[np.ndarray, " heads"]:
    """ALiBi's slope of each head (arXiv:2108.12409): 2^(-8 i / n), interleaved where heads is no power of two."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return np.asarray(slopes, np.float32)


def sinusoids(length: int, width: int) -> Float[np.ndarray, "length width"]:
    """Fixed position vectors: sines in the even, cosines in the odd dimensions (arXiv:1706.03762, section 3.5)."""
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, width, 2) / width)
    table = np.zeros((length, width), np.float32)
    table[:, 0::2], table[:, 1::2] = np.sin(angles), np.cos(angles)[:, : width // 2]
    return table
