"""Parameters, FLOPs, bytes and horizons: arithmetic on configs, no JAX. Every other part reads its numbers here."""

from llamax.accounting.bits import bits_per_byte
from llamax.accounting.cache import CACHE_RULES, KvCache, kv_cache, kv_cache_bytes, kv_cache_bytes_per_token
from llamax.accounting.cards import list_models, show_model
from llamax.accounting.flops import (
    CONVENTIONS,
    decode_flops_per_token,
    forward_flops_by_component,
    training_flops_per_token,
)
from llamax.accounting.horizon import Horizon, horizon
from llamax.accounting.memory import MEMORY_RULES, memory_bytes, training_state_bytes
from llamax.accounting.params import Leaf, Params, count_params, leaves
from llamax.accounting.peaks import Mfu, mfu
from llamax.accounting.pipeline import bubble

__all__ = [
    "CACHE_RULES",
    "CONVENTIONS",
    "MEMORY_RULES",
    "Horizon",
    "KvCache",
    "Leaf",
    "Mfu",
    "Params",
    "bits_per_byte",
    "bubble",
    "count_params",
    "decode_flops_per_token",
    "forward_flops_by_component",
    "horizon",
    "kv_cache",
    "kv_cache_bytes",
    "kv_cache_bytes_per_token",
    "leaves",
    "list_models",
    "memory_bytes",
    "mfu",
    "show_model",
    "training_flops_per_token",
    "training_state_bytes",
]
