"""The models as text within 100 columns: the list, and one model with the rule of every derived number."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from llamax.console import shown

WIDTH = 100
CARD_FIELDS = (
    "hub_id", "licence", "open", "restrictions", "date", "paper", "new", "tokenizer",
    "not_built", "disagreement", "unverified",
)  # fmt: skip


def list_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line a model: name, parameters in total and active, cache bytes per token, licence."""
    yield f"{'name':<26}{'total':>18}{'active':>18}{'KV B/token':>12}  licence"
    for row in rows:
        counts = [shown(row[key]) for key in ("params_total", "params_active", "kv_bytes_per_token")]
        licence = row["licence"] or "-"
        licence = licence if len(licence) <= 24 else licence[:22] + ".."
        yield f"{row['name']:<26}{counts[0]:>18}{counts[1]:>18}{counts[2]:>12}  {licence}"


def show_lines(found: dict[str, Any]) -> Iterator[str]:
    """One model in full, as `show_model` gives it, without its config."""
    rules = found["rules"]
    yield found["name"]
    card = found["card"] or {}
    if card.get("announced"):
        yield from _field("announced", card["announced"])
    for key in CARD_FIELDS:
        if card.get(key):
            yield from _field(key, str(card[key]))
    yield ""
    yield "parameters"
    for key in ("params_total", "params_text", "params_active", "params_active_excl_embed"):
        if key != "params_text" or found["params_text"] != found["params_total"]:
            yield from _number(key, found[key], rules[key])
    for key, value in found["params"].items():
        if value and key not in ("total", "active", "active_matmul", "non_embedding"):
            yield from _number(f"  {key}", value)
    for key, value in found["params_apart"].items():
        if value:
            yield from _number(f"  {key}", value, "not in the total")
    yield ""
    yield "cache of one sequence"
    for key, value in found["kv_cache"].items():
        if value and key in rules:
            yield from _number(key, value, rules[key])
    if found["kv_cache"]["window"]:
        yield from _number("window", found["kv_cache"]["window"], "keys, the longest window or chunk")
        yield from _number("full_layers", found["kv_cache"]["full_layers"], "layers without one")
    at = f"for {found['seq_len']:,} tokens, index keys included"
    yield from _number("bytes_at_seq_len", found["kv_cache"]["bytes_at_seq_len"], at)
    yield ""
    yield f"FLOPs per token at {found['seq_len']:,} tokens"
    yield from _wrapped(rules["training_flops_per_token"], "  ")
    for key, value in found["training_flops_per_token"].items():
        yield from _number(f"training {key}", value)
    for name in ("forward", "decode"):
        table = found[f"{name}_flops_per_token"]
        yield from _number(name, sum(table.values()), rules[f"{name}_flops_per_token"])
        for key, value in table.items():
            if value:
                yield from _number(f"  {key}", value)
    yield ""
    device = found["device"]
    yield f"memory, and devices of kind {device['name']} ({device['memory'] / 1e9:g} GB each)"
    yield from _wrapped(f"devices: {rules['devices']}", "  ")
    yield from _bytes("train", found["train"], rules["train"])
    for dtype, row in found["serve"].items():
        yield from _bytes(f"serve {dtype}", row, rules["serve"] if dtype == "bfloat16" else "")


def _field(name: str, text: str) -> Iterator[str]:
    yield from _wrapped(f"{name:<14}{text}", "", " " * 14)


def _number(name: str, value: float, rule: str = "") -> Iterator[str]:
    amount = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    yield from _wrapped(f"  {name:<30}{amount:>20}  {rule}".rstrip(), "", " " * 54)


def _bytes(name: str, row: dict[str, int], rule: str) -> Iterator[str]:
    parts = " + ".join(f"{key} {value / 1e9:,.2f}" for key, value in row.items() if key not in ("total", "devices"))
    many = f"{row['devices']:,} device{'s' if row['devices'] > 1 else ''}"
    yield from _wrapped(f"  {name:<16}{row['total'] / 1e9:>14,.2f} GB {many:>16}  = {parts}", "", " " * 54)
    if rule:
        yield from _wrapped(rule, " " * 4)


def _wrapped(text: str, first: str, rest: str | None = None) -> Iterator[str]:
    lines = textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=first if rest is None else rest, drop_whitespace=True,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    yield from lines or [""]
