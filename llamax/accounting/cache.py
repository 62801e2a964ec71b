"""Bytes of the cache that generation keeps: keys and values, or the latent that stands for them.

| attention | values a token and layer                                                                                |
|-----------|---------------------------------------------------------------------------------------------------------|
| gqa       | 2 x kv_heads x head_dim: a key and a value a kv head                                                    |
| mla       | kv_rank + rope_dim: the normed latent and the rotated shared key (DeepSeek-V2, arXiv:2405.04434)        |
| indexer   | head_dim: one index key, kept apart from the above (DeepSeek-V3.2)                                      |
 Block-sparse attention keeps every token, since what one head skips another sees.
 A layer with a window or a chunk appends as much as any until that is full, and nothing after. One as long as the
model's whole context never fills and counts as none.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamax.config.components import Attention, LatentAttention
from llamax.config.model import ModelConfig

CACHE_RULES: dict[str, str] = {
    "bytes_per_token": "2 bytes (bfloat16) x sum over layers of 2 kv_heads head_dim (gqa) or kv_rank + rope_dim (mla)",
    "index_bytes_per_token": "2 bytes x sum over layers of the indexer's head_dim; not in bytes_per_token",
    "beyond_window_bytes_per_token": "bytes_per_token of the layers without window or chunk",
    "window_bytes": "what the layers with a window or chunk hold when full: window x bytes per token of each",
    "expanded_bytes_per_token": "2 bytes x sum over layers of heads (head_dim + value_dim): keys and values of every "
    "head, where the cache keeps a latent instead",
}


@dataclass(frozen=True)
class KvCache:
    """Bytes of one sequence's cache, all layers; every field as CACHE_RULES says. `window` is the largest window or
    chunk, None where no layer has one; `expanded_bytes_per_token` is None without latent attention."""

    bytes_per_token: int
    index_bytes_per_token: int
    window: int | None
    full_layers: int
    beyond_window_bytes_per_token: int
    window_bytes: int
    expanded_bytes_per_token: int | None


def kv_cache(model: ModelConfig, bytes_per_value: int = 2) -> KvCache:
    """The cache of `model`, bfloat16 by default."""
    layers = [block.attention for block in model.layers]
    each = [(_values(a), _span(a, model.max_seq_len)) for a in layers]
    latent = [a for a in layers if isinstance(a, LatentAttention)]
    return KvCache(
        bytes_per_token=bytes_per_value * sum(values for values, _ in each),
        index_bytes_per_token=bytes_per_value * sum(a.indexer.head_dim for a in latent if a.indexer),
        window=max((span for _, span in each if span is not None), default=None),
        full_layers=sum(span is None for _, span in each),
        beyond_window_bytes_per_token=bytes_per_value * sum(values for values, span in each if span is None),
        window_bytes=bytes_per_value * sum(values * span for values, span in each if span is not None),
        expanded_bytes_per_token=bytes_per_value * sum(a.heads * (a.head_dim + a.value_dim) for a in latent)
        if latent
        else None,
    )


def kv_cache_bytes_per_token(model: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes one more token appends while no window is full, index keys left out."""
    return kv_cache(model, bytes_per_value).bytes_per_token


def kv_cache_bytes(model: ModelConfig, context: int, bytes_per_value: int = 2) -> int:
    """Bytes of the whole cache of one sequence of `context` tokens, index keys included; a windowed layer keeps its
    window (a ring buffer), a chunked one its chunk."""
    total = context * kv_cache(model, bytes_per_value).index_bytes_per_token
    for block in model.layers:
        total += bytes_per_value * _values(block.attention) * min(context, _span(block.attention, context) or context)
    return total


def _values(a: Attention) -> int:
    return a.kv_rank + a.rope_dim if isinstance(a, LatentAttention) else 2 * a.kv_heads * a.head_dim


def _span(a: Attention, context: int) -> int | None:
    """The window or chunk of a layer, where it is shorter than the context."""
    span = None if isinstance(a, LatentAttention) else a.window or a.chunk
    return span if span is not None and span < context else None
