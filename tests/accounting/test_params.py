"""Counts against published totals and against the arrays the real model makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest

from llamax.accounting import count_params, leaves
from llamax.config.cards import Family, card_names, card_of, read_card, vision_of
from llamax.config.files import shipped
from llamax.config.load import load_model, validate
from llamax.config.model import ModelConfig

from .random_models import random_family_model, random_model

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


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name: str) -> None:
    params = count_params(load_model(name))
    assert (params.total, params.active) == PUBLISHED[name]


def test_every_card_states_its_own_count() -> None:
    assert len(card_names()) > 90
    for name in card_names():
        vision = vision_of(*name.split("/"))
        stored = count_params(load_model(name)).total + (vision.total if vision else 0)
        assert stored == card_of(*name.split("/"))["params"], name


def test_every_card_is_complete() -> None:
    for family in shipped("models"):
        card = validate(Family, read_card(family), family)
        for size in card.sizes.values():
            validate(type(card.card), {**card.card.as_dict(), **size.card}, family)
            assert (size.params is None) == (size.announced is not None)


def test_cross_attention_of_the_vision_models() -> None:
    """Layers that llamax does not build, from their published shapes: query, out, key, value, two QK norms of a head,
    two gates, two norms, a gated MLP; and eight rows of the table."""
    for size, layers, d, heads, d_ff in (("11b", 8, 4096, 32, 14336), ("90b", 20, 8192, 64, 28672)):
        head = d // heads
        layer = 2 * d * d + 2 * d * 8 * head + 2 * head + 2 + 2 * d + 3 * d * d_ff
        vision = vision_of("llama3.2-vision", size)
        assert vision is not None
        assert (vision.cross_attention, vision.embedding) == (layers * layer, 8 * d)


def test_sparse_attention_adds_its_indexers_alone() -> None:
    """DeepSeek-V3.2, of which no published table was compared: V3 and 61 indexers."""
    dense, sparse = (count_params(load_model(name)) for name in ("deepseek_v3/671b", "deepseek_v3.2/671b"))
    indexer = 1536 * 64 * 128 + 7168 * 128 + 2 * 128 + 7168 * 64
    assert sparse.total - dense.total == 61 * indexer
    assert sparse.mtp - dense.mtp == indexer


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


@pytest.mark.parametrize("make", [random_model, random_family_model])
@pytest.mark.parametrize("seed", range(24))
def test_leaves_are_the_arrays_of_the_real_model(make: Callable[[int], ModelConfig], seed: int) -> None:
    model = make(seed)
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
