"""Position signals: rotary tables and their scalings, ALiBi slopes, sinusoids."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llamax.config.components import Rope, RopeLinear, RopeLlama3, RopeYarn


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Angular frequencies [rotary_dim / 2] in radians a token, and the factor on cos and sin (1 except for YaRN).

    Sources: arXiv:2104.09864 (RoPE), 2306.15595 (linear), Llama 3.1's reference code (llama3), 2309.00071 (YaRN).
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


def rotary_table(rope: Rope, head_dim: int, length: int) -> Float[np.ndarray, "2 length half"]:
    """cos and sin [2, length, rotary_dim / 2] for positions 0 .. length - 1, float32."""
    freqs, factor = inverse_frequencies(rope, head_dim)
    angles = np.arange(length, dtype=np.float64)[:, None] * freqs
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32) * np.float32(factor)


def rotate(
    x: Float[Array, "batch seq heads head_dim"], table: Float[Array, "2 seq half"]
) -> Float[Array, "batch seq heads head_dim"]:
    """x with its first 2 x half dimensions rotated, half-split layout (dimension i pairs with i + half)."""
    half = table.shape[-1]
    cos, sin = (t[None, :, None, :].astype(x.dtype) for t in table)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


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
