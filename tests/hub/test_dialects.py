"""Configs at the edges of a dialect: what transformers reads otherwise than it looks, and models without a mixture."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llamax.config.load import validate
from llamax.config.model import ModelConfig
from llamax.errors import UserError
from llamax.hub.dialects import inexpressible, read_config, write_config
from tests.hub.folders import OWN


def config_of(name: str) -> dict[str, Any]:
    return json.loads((OWN / name / "config.json").read_text(encoding="utf-8"))


def test_gemma3_has_no_cap_on_attention() -> None:
    # transformers reads the field for this model_type and then attends without it
    data = config_of("gemma3_text")
    with pytest.raises(UserError, match=r"attn_logit_softcapping = 3\.0"):
        read_config(data | {"attn_logit_softcapping": 3.0}, "config.json")
    model, dialect, _ = read_config(data, "config.json")
    data = model.as_dict()
    capped = validate(ModelConfig, data | {"attention": data["attention"] | {"softcap": 3.0}}, "model")
    assert inexpressible(capped, dialect)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe"])
def test_a_mixture_family_of_dense_layers_alone(name: str) -> None:
    data = config_of(name)
    layers = data["num_hidden_layers"]
    data |= {"first_k_dense_replace": layers, "mlp_only_layers": list(range(layers))}
    data.pop("mlp_layer_types", None)
    model = read_config(data, "config.json")[0]
    assert all(layer.mlp.kind != "moe" for layer in model.layers)
    assert read_config(write_config(model, "export")[0], "config.json")[0].layers == model.layers
