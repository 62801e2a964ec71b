"""Counts against published totals and against the arrays the real model makes."""

from __future__ import annotations

from typing import Any

import jax
import pytest
import yaml

from llamax.accounting import count_params, kv_cache_bytes_per_token, leaves
from llamax.config.cards import Family, card_names, card_of, read_card
from llamax.config.files import shipped
from llamax.config.load import load_model, validate
from llamax.config.model import ModelConfig

from .random_models import random_model

# Sums of the weights of the checkpoints on the Hugging Face hub (rotary buffers left out): total, used by one token.
PUBLISHED = {
    "llama1/7b": (6_738_415_616, 6_738_415_616),
    "llama2/70b": (68_976_648_192, 68_976_648_192),
    "llama3/8b": (8_030_261_248, 8_030_261_248),
    "llama3.1/405b": (405_853_388_800, 405_853_388_800),
    "llama3.2/1b": (1_235_814_400, 1_235_814_400),
    "mistral/7b-v0.1": (7_241_732_096, 7_241_732_096),
    "mistral/nemo-12b": (12_247_782_400, 12_247_782_400),
    "mixtral/8x7b": (46_702_792_704, 12_879_925_248),
}
FAMILIES = ("llama1", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "mistral", "mixtral")


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name: str) -> None:
    params = count_params(load_model(name))
    assert (params.total, params.active) == PUBLISHED[name]


def test_every_card_states_its_own_count() -> None:
    assert {name.partition("/")[0] for name in card_names()} >= set(FAMILIES)
    for name in card_names():
        assert count_params(load_model(name)).total == card_of(*name.split("/"))["params"], name


def test_every_card_is_complete() -> None:
    for family in shipped("models"):
        card = validate(Family, read_card(family), family)
        for size in card.sizes.values():
            validate(type(card.card), {**card.card.as_dict(), **size.card}, family)


def test_cards_equal_the_reference_tables(shared_reference: Any) -> None:
    """Every model of these families in models.yaml is a size here, with the same counts, cache, context and licence."""
    reference = yaml.safe_load((shared_reference / "models.yaml").read_text())["models"]
    wanted = [row for row in reference if row["family"] in FAMILIES]
    cards = {(f, s): card_of(f, s) for f, s in (name.split("/") for name in card_names()) if f in FAMILIES}
    assert len(wanted) == len(cards)
    for row in wanted:
        same = [k for k, c in cards.items() if k[0] == row["family"] and c["params"] == row["params"]["total"]]
        (key,) = [k for k in same if cards[k]["hub_id"] == row["hub_id"]]
        model, config = load_model("/".join(key)), row["config"]
        params = count_params(model)
        assert params.total == row["params"]["total"]
        assert params.active == row["params"]["active_incl_embed"]
        assert params.active_matmul == row["params"]["active_excl_input_embed"]
        assert (params.embedding, params.experts) == (row["params"]["embedding"], row["params"]["routed_experts"])
        assert kv_cache_bytes_per_token(model) == row["kv_cache"]["kv_bytes_per_token_bf16"]
        assert model.max_seq_len == config["max_position_embeddings"]
        assert (model.norm.eps, model.position.theta) == (config["rms_norm_eps"], config["rope_theta"])
        assert model.attention.window == config.get("sliding_window")
        assert (cards[key]["licence"], cards[key]["date"]) == (row["license"].removesuffix(" (bespoke)"), row["date"])
        scaling = config.get("rope_scaling")
        if scaling is None:
            assert model.position.scaling is None
        else:
            assert model.position.scaling.factor == scaling["factor"]
            assert model.position.scaling.original_max_len == scaling["original_max_position_embeddings"]


def real_arrays(model: ModelConfig) -> dict[str, tuple[tuple[int, ...], str, int]]:
    """Path -> (shape, group, inputs) of every parameter of the real model, without allocating it."""
    from llamax.model.transformer import Transformer
    from llamax.train.param_info import param_table

    made = jax.eval_shape(lambda key: Transformer(model, key=key), jax.random.key(0))
    return {path(row.path): (row.shape, row.group, row.inputs) for row in param_table(made)}


def path(text: str) -> str:
    """jax's key path as dotted names."""
    for old, new in (("['", "."), ("']", ""), ("[", "."), ("]", "")):
        text = text.replace(old, new)
    return text.lstrip(".")


@pytest.mark.parametrize("seed", range(24))
def test_leaves_are_the_arrays_of_the_real_model(seed: int) -> None:
    model = random_model(seed)
    counted = {
        leaf.name: ((leaf.layers, *leaf.shape) if leaf.layers else leaf.shape, leaf.group, leaf.inputs)
        for leaf in leaves(model)
    }
    assert counted == real_arrays(model)


@pytest.mark.parametrize("name", ["llama3/8b", "llama3.2/1b", "mixtral/8x7b", "ladder/d128"])
def test_shipped_models_count_as_the_real_model(name: str) -> None:
    model = load_model(name)
    real = jax.eval_shape(lambda key: _transformer(model, key), jax.random.key(0))
    assert count_params(model).total == sum(leaf.size for leaf in jax.tree.leaves(real))


def _transformer(model: ModelConfig, key: jax.Array) -> Any:
    from llamax.model.transformer import Transformer

    return Transformer(model, key=key)


def test_components_and_sums() -> None:
    """By hand: d 8, vocabulary 10, 6 learned positions, one block of 2 heads of 4, 3 experts of 5, a shared of 7."""
    data = {
        "vocab_size": 10, "d_model": 8, "max_seq_len": 6, "segments": [{"repeat": 1}],
        "attention": {"heads": 2}, "position": {"kind": "learned"}, "norm": {"kind": "rmsnorm"},
        "mlp": {
            "kind": "moe", "experts": 3, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 5},
            "shared": {"kind": "gelu", "d_ff": 7},
        },
    }  # fmt: skip
    params = count_params(validate(ModelConfig, data, "hand"))
    assert params.by_component == {
        "embedding": 80, "position": 48, "attention": 4 * 64, "mlp": 0, "router": 24,
        "experts": 3 * 3 * 40, "shared": 2 * 56, "norm": 3 * 8, "head": 80,
    }  # fmt: skip
    assert params.total == 984
    assert params.active == 984 - 120
    assert params.active_matmul == 984 - 120 - 80 - 48
    assert params.non_embedding == 984 - 80 - 48 - 80
    tied = count_params(validate(ModelConfig, {**data, "head": {"tied": True}}, "tied"))
    assert (tied.total, tied.active_matmul) == (904, 904 - 120 - 48)
