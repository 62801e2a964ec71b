"""Phi-3-small beyond its fixture: LongRoPE, the other patterns of layers, what is refused, the published config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.accounting import count_params
from llamax.config.load import load_model, validate
from llamax.config.model import ModelConfig
from llamax.errors import UserError
from llamax.hub.dialects import DIALECTS, inexpressible, read_config, write_config
from llamax.hub.export import export_hf
from llamax.hub.load import load_hf
from llamax.model.execution import Execution
from llamax.model.loss import next_token_loss

from . import phi3small
from .folders import OWN, tensors

# config.json of microsoft/Phi-3-small-8k-instruct.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Phi3SmallForCausalLM"], "attention_dropout_prob": 0.0, "blocksparse_block_size": 64,
    "blocksparse_homo_head_pattern": False, "blocksparse_num_local_blocks": 16,
    "blocksparse_triton_kernel_block_size": 64, "blocksparse_vert_stride": 8, "bos_token_id": 100257,
    "dense_attention_every_n_layers": 2, "embedding_dropout_prob": 0.1, "eos_token_id": 100257,
    "ff_dim_multiplier": None, "ff_intermediate_size": 14336, "ffn_dropout_prob": 0.1, "gegelu_limit": 20.0,
    "gegelu_pad_to_256": True, "hidden_act": "gegelu", "hidden_size": 4096, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "max_position_embeddings": 8192, "model_type": "phi3small",
    "mup_attn_multiplier": 1.0, "mup_embedding_multiplier": 10.0, "mup_use_scaling": True,
    "mup_width_multiplier": 8.0, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pad_sequence_to_multiple_of_64": True, "reorder_and_upcast_attn": False, "rope_embedding_base": 1000000,
    "rope_position_scale": 1.0, "torch_dtype": "bfloat16", "transformers_version": "4.38.1", "use_cache": True,
    "attention_bias": False, "vocab_size": 100352,
}  # fmt: skip
LONG = {"type": "su", "short_factor": [1.0, 1.3], "long_factor": [1.1, 2.7], "original_max_position_embeddings": 16}
PLAIN = {"num_hidden_layers": 2, "rope_position_scale": 1.0}


def config_of(**fields: Any) -> dict[str, Any]:
    return phi3small.CONFIG | PLAIN | fields


def model_of(**fields: Any) -> ModelConfig:
    return read_config(config_of(**fields), "config.json")[0]


def test_the_published_config_is_the_card() -> None:
    model = read_config(PUBLISHED, "config.json")[0]
    assert count_params(model).total == 7_392_272_384
    assert not inexpressible(load_model("phi3/small-8k"), DIALECTS["phi3small"])
    card = load_model("phi3/small-8k").as_dict()
    assert {**model.as_dict(), "init": None} == {**card, "init": None}
    written = write_config(model, "export")[0]
    # Left out are what computes nothing here, and null.
    silent = {"reorder_and_upcast_attn", "pad_sequence_to_multiple_of_64", "transformers_version", "use_cache",
              "attention_bias", "ff_dim_multiplier", "gegelu_pad_to_256", "torch_dtype", "bos_token_id",
              "eos_token_id", *(name for name in PUBLISHED if "dropout" in name)}  # fmt: skip
    assert {name: written[name] for name in PUBLISHED if name not in silent} == {
        name: value for name, value in PUBLISHED.items() if name not in silent
    }


def test_the_fixture_is_what_the_loops_give() -> None:
    """The committed logits and tensors are those of phi3small.py as it is now."""
    saved, found = np.load(OWN / "phi3small" / "logits.npz"), tensors(OWN / "phi3small")
    drawn = phi3small.random_tensors(phi3small.CONFIG)
    assert found.keys() == drawn.keys()
    for name, array in drawn.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    again = phi3small.logits(phi3small.CONFIG, found, saved["input_ids"])
    np.testing.assert_allclose(saved["logits"], again, atol=1e-6)


def test_every_part_of_the_fixture_shows_in_its_logits() -> None:
    """Another mask, limit, factor or rotary embedding gives other logits by far more than the tests allow."""
    saved, found = np.load(OWN / "phi3small" / "logits.npz"), tensors(OWN / "phi3small")
    others: list[dict[str, Any]] = [
        {"blocksparse_block_size": 3}, {"blocksparse_num_local_blocks": 1}, {"blocksparse_vert_stride": 4},
        {"blocksparse_homo_head_pattern": True}, {"dense_attention_every_n_layers": 1}, {"gegelu_limit": 1.0},
        {"gegelu_limit": None}, {"mup_use_scaling": False}, {"mup_embedding_multiplier": 2.9},
        {"mup_width_multiplier": 2.4}, {"rope_embedding_base": 4000}, {"rope_position_scale": 0.6},
    ]  # fmt: skip
    for other in others:
        changed = phi3small.logits(phi3small.CONFIG | other, found, saved["input_ids"][:1])
        assert np.abs(changed - saved["logits"][:1]).max() > 0.01, other


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": LONG},
        {"rope_scaling": LONG | {"original_max_position_embeddings": 32, "short_mscale": 1.2, "long_mscale": -1}},
        {"rope_scaling": LONG | {"type": "longrope", "short_mscale": -1, "long_mscale": 1.4}},
        {"dense_attention_every_n_layers": None, "gegelu_limit": None, "tie_word_embeddings": False},
        {"blocksparse_homo_head_pattern": True, "mup_use_scaling": False, "mup_embedding_multiplier": None},
        {"blocksparse_vert_stride": 13, "mup_width_multiplier": None, "num_key_value_heads": 1},
    ],
    ids=["long", "short_given", "long_given", "all_sparse", "alike", "wide_stride"],
)
def test_other_configs(fields: dict[str, Any], tmp_path: Path) -> None:
    """Logits of the loops, and the same tensors and model after export."""
    phi3small.write(tmp_path / "hub", config_of(**fields), seed=3)
    model, config = load_hf(tmp_path / "hub")
    saved = np.load(tmp_path / "hub" / "logits.npz")
    ours = jax.jit(lambda m, t: m(t))(model, saved["input_ids"].astype(np.int32))
    np.testing.assert_allclose(ours, saved["logits"], atol=2e-4, rtol=1e-4)
    export_hf(model, config, tmp_path / "back")
    there, back = tensors(tmp_path / "hub"), tensors(tmp_path / "back")
    assert {name: array.tobytes() for name, array in there.items()} == {n: a.tobytes() for n, a in back.items()}
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert read_config(again, "exported")[0] == config.model
    kept = {name: value for name, value in config_of(**fields).items() if name != "rope_scaling"}
    ignored = {"mup_attn_multiplier"} if not kept["mup_use_scaling"] else set()
    assert {name: again[name] for name in kept if name not in ignored} == {
        name: value for name, value in kept.items() if name not in ignored
    }


def test_gradients_are_finite() -> None:
    model, _ = load_hf(OWN / "phi3small")
    tokens = np.load(OWN / "phi3small" / "logits.npz")["input_ids"].astype(np.int32)

    def loss(model: Any) -> jax.Array:
        nats, _, count, _ = next_token_loss(model, jnp.asarray(tokens), None, None, jnp.float32(0.0), None, Execution())
        return nats / count

    value, gradient = jax.jit(jax.value_and_grad(loss))(model)
    assert np.isfinite(value)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_the_width_by_a_multiple() -> None:
    """ff_dim_multiplier x 2 x floor(hidden_size / 3), raised to a multiple of 256 where asked for."""
    other = {"ff_intermediate_size": None, "ff_dim_multiplier": 4, "hidden_size": 600, "num_attention_heads": 6}
    assert model_of(**other, gegelu_pad_to_256=False).mlp.d_ff == 1600  # type: ignore[union-attr]
    assert model_of(**other).mlp.d_ff == 1792  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu': llamax has only gegelu"),
        ({"dummy_token_indices": [3, 5]}, r"dummy_token_indices = \[3, 5\]: .*remove the field"),
        ({"ff_dim_multiplier": 4}, r"ff_dim_multiplier = 4: give it or ff_intermediate_size = 14"),
        ({"ff_intermediate_size": None}, r"ff_dim_multiplier = None: give it or ff_intermediate_size = None"),
        ({"gegelu_limit": -1.0}, r"gegelu_limit = -1\.0: give a positive number"),
        ({"blocksparse_block_size": 0}, r"blocksparse_block_size = 0: give a positive integer"),
        ({"blocksparse_homo_head_pattern": "no"}, r"blocksparse_homo_head_pattern = 'no': give true or false"),
        ({"dense_attention_every_n_layers": 1.5}, r"dense_attention_every_n_layers = 1\.5: give a positive integer"),
        ({"mup_width_multiplier": 0}, r"mup_width_multiplier = 0: give a positive number"),
        ({"rope_position_scale": -1}, r"rope_position_scale = -1: give a positive number"),
        ({"rope_scaling": LONG | {"factor": 2.0}}, r"rope_scaling: factor = 2\.0: .*no such field"),
        ({"rope_scaling": LONG | {"type": "yarn"}}, r"rope_scaling: type = 'yarn': llamax has only longrope, su"),
        ({"rope_scaling": LONG | {"short_factor": [1.0]}}, r"short has 1 factors and long 2"),
        ({"rope_scaling": LONG | {"long_mscale": 0}}, r"long_mscale = 0: give a positive number"),
    ],
)
def test_refused(fields: dict[str, Any], pattern: str) -> None:
    with pytest.raises(UserError, match=pattern):
        model_of(**fields)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"attention": {"window": 4, "block_sparse": None}}, "layers.0.attention.window = 4"),
        (
            {"mlp": {"kind": "geglu", "limit": 0.9, "linear": "one_plus", "bias": True, "d_ff": 14}},
            "mlp.kind = 'geglu'",
        ),
        ({"mlp": {"linear": "one"}}, "mlp.linear = 'one'"),
        ({"embedding": {"scale": "sqrt_d_model"}}, "embedding.scale = 'sqrt_d_model'"),
        ({"position": {"fraction": 0.5}}, "position.fraction = 0.5"),
        ({"segments": [{"repeat": 1, "unit": [{}, {"attention": {"block_sparse": None}}]}, {"repeat": 2}]}, "layers.3"),
    ],
)
def test_what_it_cannot_express_is_named(change: dict[str, Any], lost: str) -> None:
    data = model_of().as_dict()
    data |= {key: data[key] | value if isinstance(value, dict) else value for key, value in change.items()}
    config = validate(ModelConfig, data, "model")
    with pytest.raises(UserError, match=r"model\.dialect=phi3small cannot express") as error:
        write_config(config, "export")
    assert lost in "; ".join(inexpressible(config, DIALECTS["phi3small"])), error.value


def test_no_other_dialect_takes_its_components() -> None:
    """Block-sparse attention, the limit, 1 + linear and a numeric embedding scale alone are more than others say."""
    plain = {"vocab_size": 32, "d_model": 16, "segments": [{"repeat": 2}], "attention": {"heads": 2},
             "position": {"kind": "rope"}, "mlp": {"kind": "swiglu", "d_ff": 8}}  # fmt: skip
    others = [dialect for name, dialect in DIALECTS.items() if name != "phi3small"]
    expressed = validate(ModelConfig, plain, "model")
    assert any(not inexpressible(expressed, dialect) for dialect in others)
    for change in (
        {"attention": {"heads": 2, "block_sparse": {"size": 4, "local": 1, "stride": 2}}},
        {"mlp": {"kind": "swiglu", "d_ff": 8, "limit": 2.0}},
        {"mlp": {"kind": "swiglu", "d_ff": 8, "linear": "one_plus"}},
        {"mlp": {"kind": "quick_geglu", "d_ff": 8}},
        {"embedding": {"scale": 2.0}},
    ):
        config = validate(ModelConfig, plain | change, "model")
        assert all(inexpressible(config, dialect) for dialect in others), change
