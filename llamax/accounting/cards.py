"""The museum's tables: every published model counted, one model in full."""

from __future__ import annotations

from typing import Any

from llamax.accounting.cache import kv_cache_bytes_per_token
from llamax.accounting.flops import forward_flops_by_component, training_flops_per_token
from llamax.accounting.params import count_params
from llamax.config.cards import card_of, find_size
from llamax.config.load import load_model, model_names
from llamax.config.model import ModelConfig


def list_models() -> list[dict[str, Any]]:
    """One row a model, published sizes first, then the listed ladder sizes (no hub id, no licence): name, family,
    hub_id, params_total, params_active, params_active_excl_embed (N, without a table that is only looked up),
    kv_bytes_per_token (bfloat16), licence."""
    rows = []
    for name in model_names():
        found, model = find_size(name), load_model(name)
        card = card_of(*found) if found else {}
        params = count_params(model)
        rows.append(
            {
                "name": name,
                "family": name.partition("/")[0],
                "hub_id": card.get("hub_id"),
                "params_total": params.total,
                "params_active": params.active,
                "params_active_excl_embed": params.active_matmul,
                "kv_bytes_per_token": kv_cache_bytes_per_token(model),
                "licence": card.get("licence"),
            }
        )
    return rows


def show_model(name: str, seq_len: int | None = None) -> dict[str, Any]:
    """Everything known of one model (`llama3/8b`, `ladder/d64`, a hub id) at sequence length `seq_len` (default: the
    longest it takes).

    Keys: name, card (None for a ladder size), config, seq_len, params by component with its sums, kv_bytes_per_token,
    training_flops_per_token by convention, forward_flops_per_token by component, memory_bytes.

    Raises:
        UserError: unknown name.
    """
    model = load_model(name)
    found = find_size(name)
    seq_len = seq_len or model.max_seq_len
    params = count_params(model)
    sums = {key: getattr(params, key) for key in ("total", "active", "active_matmul", "non_embedding")}
    return {
        "name": "/".join(found) if found else name,
        "card": card_of(*found) if found else None,
        "config": model.as_dict(),
        "seq_len": seq_len,
        "params": params.by_component | sums,
        "kv_bytes_per_token": kv_cache_bytes_per_token(model),
        "training_flops_per_token": training_flops_per_token(model, seq_len),
        "forward_flops_per_token": forward_flops_by_component(model, seq_len),
        "memory_bytes": model_memory_bytes(model),
    }


def model_memory_bytes(model: ModelConfig) -> dict[str, int]:
    """Bytes of the weights as they are served (bfloat16), as they are trained (float32), and of a whole AdamW state
    (weights, gradients and two moments, all float32: 16 bytes a parameter)."""
    total = count_params(model).total
    return {"weights_bfloat16": 2 * total, "weights_float32": 4 * total, "training_state_adamw": 16 * total}
