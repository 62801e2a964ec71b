"""The museum's tables: every published model counted, one model in full."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llamax.accounting.cache import CACHE_RULES, kv_cache, kv_cache_bytes, kv_cache_bytes_per_token
from llamax.accounting.devices import DEFAULT_DEVICE, Device, find_device
from llamax.accounting.flops import decode_flops_per_token, forward_flops_by_component, training_flops_per_token
from llamax.accounting.memory import training_state_bytes
from llamax.accounting.params import Params, count_params
from llamax.config.cards import Vision, card_of, find_size, listed_names, vision_of
from llamax.config.ladder import ladder_names
from llamax.config.load import load_model
from llamax.config.model import ModelConfig
from llamax.errors import UserError

SERVED_BYTES = {"bfloat16": 2.0, "int8": 1.0, "int4": 0.5}

SHOW_RULES: dict[str, str] = {
    "params_total": "every stored parameter, a tied table once, a vision side included; router biases (buffers) and "
    "prediction modules (mtp) are not in it",
    "params_text": "params_total without the vision side: what llamax builds",
    "params_active": "params_text with top_k of the routed experts, and what the text side gained for images",
    "params_active_excl_embed": "params_active without a table that is only looked up; a tied one stays, as the output",
    "training_flops_per_token": "forward and backward; 6n: 6 x params_active_excl_embed of the text stack; palm: and "
    "attention over all pairs; chinchilla: the paper's table; causal: exact matrix products",
    "forward_flops_per_token": "exact matrix products, mean over the positions of one sequence of seq_len",
    "decode_flops_per_token": "exact matrix products of the last of seq_len tokens, from a cache; latents absorbed",
    "train": "AdamW state, all float32: 4 bytes each for weights, gradients and two moments, mtp included; activations "
    "come on top (`llamax sweep plan` estimates them)",
    "serve": "weights of the text stack at 2, 1 or 1/2 bytes a parameter, without quantization scales, and the cache "
    "in bfloat16 of one sequence of seq_len; no mtp",
    "devices": "ceil(bytes / memory of the device), nothing else in it",
}


def list_models() -> list[dict[str, Any]]:
    """One row a model, published sizes first, then the listed ladder sizes (no hub id, no licence): name, family,
    hub_id, params_total (published: vision side included), params_text (what llamax builds), params_active,
    params_active_excl_embed (N, without a table that is only looked up), kv_bytes_per_token (bfloat16), licence, open,
    date. A model that was announced and never released has null for every count."""
    return [_row(name) for name in [*listed_names(), *ladder_names()]]


def _row(name: str) -> dict[str, Any]:
    found = find_size(name)
    card = card_of(*found) if found else {}
    row = {"name": name, "family": name.partition("/")[0], "hub_id": card.get("hub_id")}
    if card.get("announced"):
        sums = dict.fromkeys(("params_total", "params_text", "params_active", "params_active_excl_embed"))
        cache = None
    else:
        model = load_model(name)
        sums, cache = _sums(count_params(model), vision_of(*found) if found else None), kv_cache_bytes_per_token(model)
    rest = {key: card.get(key) for key in ("licence", "open", "date")}
    return {**row, **sums, "kv_bytes_per_token": cache, **rest}


def _sums(params: Params, vision: Vision | None) -> dict[str, int | None]:
    """The four sums of SHOW_RULES. Cross-attention and the image rows of the table belong to the text path."""
    beside, cross, rows = (vision.total, vision.cross_attention, vision.embedding) if vision else (0, 0, 0)
    return {
        "params_total": params.total + beside,
        "params_text": params.total,
        "params_active": params.active + cross + rows,
        "params_active_excl_embed": params.active_matmul + cross,
    }


def show_model(name: str, seq_len: int | None = None, device: str = DEFAULT_DEVICE) -> dict[str, Any]:
    """Everything known of one model (`llama3/8b`, `ladder/d64`, a hub id) at sequence length `seq_len` (default: the
    longest it takes) on devices of one kind (a name of accounting/devices.py).

    Keys: name, card (None for a ladder size), config, seq_len, the four sums of `list_models`, params by component
    with its sums, what is outside them, kv_bytes_per_token, kv_cache, training_flops_per_token by convention,
    forward_flops_per_token and decode_flops_per_token by component, device, train and serve (bytes and devices),
    rules: how each came about.

    Raises:
        UserError: unknown model or device, or a sequence length below one.
    """
    model, kind = load_model(name), find_device(device)
    found = find_size(name)
    if seq_len is not None and seq_len < 1:
        raise UserError(f"seq_len={seq_len} is less than one token; give a positive length")
    seq_len = seq_len or model.max_seq_len
    params = count_params(model)
    sums = {key: getattr(params, key) for key in ("total", "active", "active_matmul", "non_embedding")}
    return {
        "name": "/".join(found) if found else name,
        "card": card_of(*found) if found else None,
        "config": model.as_dict(),
        "seq_len": seq_len,
        **_sums(params, vision_of(*found) if found else None),
        "params": params.by_component | sums,
        "params_apart": {"mtp": params.mtp, "router_bias_buffer": params.buffers},
        "kv_bytes_per_token": kv_cache_bytes_per_token(model),
        "kv_cache": asdict(kv_cache(model)) | {"bytes_at_seq_len": kv_cache_bytes(model, seq_len)},
        "training_flops_per_token": training_flops_per_token(model, seq_len),
        "forward_flops_per_token": forward_flops_by_component(model, seq_len),
        "decode_flops_per_token": decode_flops_per_token(model, seq_len),
        "device": asdict(kind),
        "train": _train(model, kind),
        "serve": {dtype: _serve(model, params, seq_len, dtype, kind) for dtype in SERVED_BYTES},
        "rules": SHOW_RULES | CACHE_RULES,
    }


def _train(model: ModelConfig, device: Device) -> dict[str, int]:
    state = training_state_bytes(model)
    total = sum(state.values())
    return state | {"total": total, "devices": device.needed(total)}


def _serve(model: ModelConfig, params: Params, seq_len: int, dtype: str, device: Device) -> dict[str, int]:
    """Bytes to serve one sequence; the router biases stay float32."""
    weights, cache = int(SERVED_BYTES[dtype] * params.total) + 4 * params.buffers, kv_cache_bytes(model, seq_len)
    return {"weights": weights, "cache": cache, "total": weights + cache, "devices": device.needed(weights + cache)}
