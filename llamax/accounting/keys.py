"""How many keys a query meets under the causal masks: plain, windowed, chunked, block-sparse."""

from __future__ import annotations

from typing import NamedTuple

from llamax.config.components import BlockSparse


class Reach(NamedTuple):
    """What limits a causal query: a window, chunks of positions, or a pattern of blocks over `heads` heads."""

    window: int | None = None
    chunk: int | None = None
    blocks: BlockSparse | None = None
    heads: int = 1


def keys_at(t: int, reach: Reach) -> float:
    """Keys the query at position t (from 0) sees, the mean over heads."""
    if reach.blocks is not None:
        size = reach.blocks.size
        return _earlier(t // size, reach.blocks, reach.heads) * size + t % size + 1
    return min(t + 1, reach.window or t + 1, t % reach.chunk + 1 if reach.chunk else t + 1)


def most_keys(seq_len: int, reach: Reach) -> float:
    """The most keys a query of a sequence sees."""
    if reach.blocks is not None:
        # Later blocks see no fewer earlier ones: the most are at the end, or at the end of the last whole block.
        whole = seq_len // reach.blocks.size * reach.blocks.size
        return max(keys_at(t - 1, reach) for t in (seq_len, whole) if t)
    return min(seq_len, reach.window or seq_len, reach.chunk or seq_len)


def visible_keys(seq_len: int, reach: Reach) -> float:
    """Keys a query sees on average: the mean of `keys_at` over the positions of a sequence."""
    if reach.blocks is not None:
        starts = range(0, seq_len, reach.blocks.size)
        lengths = [min(reach.blocks.size, seq_len - start) for start in starts]
        firsts = (keys_at(start, reach) for start in starts)
        return sum(n * first + n * (n - 1) / 2 for n, first in zip(lengths, firsts, strict=True)) / seq_len
    if reach.chunk is not None and reach.chunk < seq_len:
        inside = Reach(reach.window)
        whole, rest = divmod(seq_len, reach.chunk)
        pairs = whole * reach.chunk * visible_keys(reach.chunk, inside)
        return (pairs + (rest * visible_keys(rest, inside) if rest else 0)) / seq_len
    span = min(seq_len, reach.window or seq_len)
    return (span * (span + 1) / 2 + (seq_len - span) * span) / seq_len


def _earlier(block: int, pattern: BlockSparse, heads: int) -> float:
    """Blocks before its own that a query in `block` sees, the mean over heads: the near ones, and of the `far` first
    ones those with a head's remainder."""
    near = min(pattern.local - 1, block)
    far = block - near
    return near + sum(-(-max(far - r, 0) // pattern.stride) for r in pattern.remainders(heads)) / heads
