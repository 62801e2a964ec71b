from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.generate.serving import for_serving, step_bytes, upright
from llamax.model.cache import init_cache
from llamax.model.execution import Execution
from llamax.model.transformer import Transformer
from tests.model.modules import small_model, tokens_of

NARROW = Execution("bfloat16", "bfloat16")
MIXTURE = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 24}}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"segments": [{"repeat": 3}]},
    "tied_pairs": {
        "segments": [{"repeat": 2, "unit": [{"attention": {"window": 4}}, {}]}, {"repeat": 1}],
        "head": {"tied": True},
    },
    "mixture": {"segments": [{"repeat": 2}], "mlp": MIXTURE},
}


def decoded(model: Transformer, execution: Execution) -> np.ndarray:
    """Logits of a prompt's last token and of three tokens after it, one at a time."""
    tokens = tokens_of(2, 8, model.config.vocab_size)
    cache = init_cache(model.config, 2, 16, execution.activation)
    step = jax.jit(lambda model, tokens, cache: model.decode(tokens, cache, None, execution, last=True))
    columns = []
    for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:7], tokens[:, 7:8]):
        logits, cache = step(model, part, cache)
        columns.append(np.asarray(logits))
    return np.concatenate(columns, 1)


@pytest.mark.parametrize("execution", [Execution(), NARROW, Execution("bfloat16", "float32")], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits(name: str, execution: Execution) -> None:
    model = small_model(**MODELS[name])
    found = decoded(for_serving(model, execution), execution)
    np.testing.assert_allclose(found, decoded(model, execution), atol=2e-6 if execution.compute == "float32" else 0.02)


def test_every_layer_by_itself_in_the_products_format() -> None:
    model = small_model(**MODELS["tied_pairs"])
    served = for_serving(model, NARROW)
    assert [repeat for repeat, _ in served.config.blocks] == [1, 1, 1]
    assert served.config.layers == model.config.layers
    first, second = (served.stacks[i].blocks[0].mlp.up[...] for i in (0, 1))
    np.testing.assert_array_equal(first[0], model.stacks[0].blocks[0].mlp.up[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(second[0], model.stacks[0].blocks[0].mlp.up[1].astype(jnp.bfloat16))
    assert served.embedding[...].dtype == jnp.bfloat16
    assert served.norm.scale[...].dtype == jnp.float32


def test_a_step_has_no_wide_weight() -> None:
    """No matrix enters the program in float32, and none is cast inside it; of the trained model's all are."""
    model = small_model(**MODELS["untied"])

    def wide_matrices(model: Transformer) -> int:
        cache = init_cache(model.config, 1, 16, "bfloat16")
        program = jax.jit(lambda m, t, c: m.decode(t, c, None, NARROW)).lower(model, jnp.ones((1, 1), jnp.int32), cache)
        up = "x".join(map(str, model.stacks[0].blocks[0].mlp.up[...].shape[1:]))
        return len(re.findall(rf"stablehlo.convert[^\n]*tensor<(?:\d+x)?{up}xf32>", program.as_text()))

    assert wide_matrices(model) > 0
    assert wide_matrices(for_serving(model, NARROW)) == 0


@pytest.mark.parametrize("name", MODELS)
def test_turned_and_back(name: str) -> None:
    """Inputs last: the same model once turned back, and experts and tables are left alone."""
    trained = small_model(**MODELS[name])
    model, inputs_last = for_serving(trained, NARROW), for_serving(trained, NARROW, inputs_last=True)
    query, stored = (m.stacks[0].blocks[0].attention.query[...] for m in (model, inputs_last))
    np.testing.assert_array_equal(stored, query.transpose(0, 2, 3, 1))
    out, stored = (m.stacks[0].blocks[0].attention.out[...] for m in (model, inputs_last))
    np.testing.assert_array_equal(stored, out.transpose(0, 3, 1, 2))
    assert inputs_last.embedding[...].shape == model.embedding[...].shape
    up, stored = (m.stacks[0].blocks[0].mlp.up[...] for m in (model, inputs_last))
    assert (stored.shape == up.shape) == (name == "mixture")
    jax.tree.map(np.testing.assert_array_equal, upright(inputs_last), model)


def test_one_row_on_a_gpu_multiplies_no_weight_by_a_product() -> None:
    """Lowered for it: the products that are left are attention's two a layer, and no weight is turned."""
    model = for_serving(small_model(**MODELS["untied"]), NARROW, inputs_last=True)
    cache = init_cache(model.config, 1, 16, "bfloat16")

    def step(model: Transformer, token: jax.Array, cache: Any) -> Any:
        return upright(model).decode(token, cache, None, NARROW)

    text = jax.jit(step).trace(model, jnp.ones((1, 1), jnp.int32), cache).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("dot_general") == 2 * len(model.config.layers)
    assert "scatter" not in text


def test_step_bytes() -> None:
    """All but an untied table; two bytes a number of a matrix, four of a norm."""
    model = small_model(**MODELS["untied"])
    everything = sum(leaf.size for leaf in jax.tree.leaves(model))
    table = model.embedding[...].size
    assert step_bytes(model) == 4 * (everything - table)
    norms = sum(leaf.size for leaf in jax.tree.leaves(model) if leaf.ndim < 2) + sum(
        leaf.size
        for block in model.stacks[0].blocks
        for norm in (block.attention_norm, block.mlp_norm)
        for leaf in jax.tree.leaves(norm)
    )
    assert step_bytes(for_serving(model, NARROW)) == 2 * (everything - table - norms) + 4 * norms
