"""A pseudorandom permutation that is computed, not stored: where each index goes, for a whole array at once.

The cipher is that of Grain's `index_shuffle`, so that windows come in the order of a Grain pipeline (a test compares
them): four rounds of Simon (eprint.iacr.org/2013/404) on blocks just wide enough for the largest index, walked until
the value is an index again (Black and Rogaway, CT-RSA 2002), with round keys from C++'s `seed_seq`. Here rather than
called there because importing Grain costs a seventh of a run's start, and one call an index most of a batch's.
"""

import functools

import numpy as np
from jaxtyping import Int64, UInt64

ROUNDS = 4
SMALLEST = 16  # bits of a block
WORD = 0xFFFFFFFF


def shuffled(index: Int64[np.ndarray, " n"], count: int, seed: int) -> Int64[np.ndarray, " n"]:
    """Where each `index` (0 to `count` - 1) goes in the permutation of `count` things that `seed` (32 bits) names.

    Grain's order for every `count` but 2^k + 1 with k even and at least 16, where Grain's blocks are a bit too narrow
    and it gives one index twice.
    """
    if count <= 1 << SMALLEST:
        return _table(count, seed)[index]
    half = np.uint64(((count - 1).bit_length() + 1) // 2)
    value = _enciphered(index.astype(np.uint64), half, _round_keys(seed))
    while (outside := value >= count).any():  # a block is at most four times as many values as indices
        value[outside] = _enciphered(value[outside], half, _round_keys(seed))
    return value.astype(np.int64)


@functools.lru_cache(maxsize=32)
def _table(count: int, seed: int) -> Int64[np.ndarray, " count"]:
    """The whole permutation of `count` things in the smallest block, where walks are long: all of them at once, by
    doubling their length until every value is home."""
    values = np.arange(1 << SMALLEST)
    after = _enciphered(values.astype(np.uint64), np.uint64(SMALLEST // 2), _round_keys(seed)).astype(np.int64)
    walked = np.where(values < count, values, after)  # one step further, at rest once home
    while (walked[after[:count]] >= count).any():
        walked = walked[walked]
    return walked[after[:count]]


def _enciphered(value: UInt64[np.ndarray, " n"], half: np.uint64, keys: tuple[int, ...]) -> UInt64[np.ndarray, " n"]:
    """Feistel rounds on blocks of two words of `half` bits."""
    mask = np.uint64((1 << int(half)) - 1)

    def rotated(word: np.ndarray, by: int) -> np.ndarray:
        return (word << np.uint64(by)) | (word >> (half - np.uint64(by)))

    left, right = value >> half, value & mask
    for key in keys:
        mixed = (rotated(right, 1) & rotated(right, 8)) ^ rotated(right, 2) ^ np.uint64(key)
        left, right = right, (left ^ mixed) & mask
    return (left << half) | right


@functools.lru_cache(maxsize=256)
def _round_keys(seed: int) -> tuple[int, ...]:
    """ROUNDS words as C++'s `std::seed_seq{seed}.generate` fills them ([rand.util.seedseq] of the standard)."""
    n, words = ROUNDS, [0x8B8B8B8B] * ROUNDS
    shift = (n - 1) // 2  # the standard's t for fewer than seven words
    p, q = (n - shift) // 2, (n - shift) // 2 + shift
    entropy = [seed]
    steps = max(len(entropy) + 1, n)

    def mixed(x: int) -> int:
        return x ^ (x >> 27)

    for k in range(steps):
        r = 1664525 * mixed(words[k % n] ^ words[(k + p) % n] ^ words[(k - 1) % n]) & WORD
        told = len(entropy) if k == 0 else k % n + (entropy[k - 1] if k <= len(entropy) else 0)
        words[(k + p) % n] = (words[(k + p) % n] + r) & WORD
        words[(k + q) % n] = (words[(k + q) % n] + r + told) & WORD
        words[k % n] = (r + told) & WORD
    for k in range(steps, steps + n):
        r = 1566083941 * mixed((words[k % n] + words[(k + p) % n] + words[(k - 1) % n]) & WORD) & WORD
        less = (r - k % n) & WORD
        words[(k + p) % n] ^= r
        words[(k + q) % n] ^= less
        words[k % n] = less
    return tuple(words)
