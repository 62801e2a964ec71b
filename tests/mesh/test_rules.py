from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec

from llamax.config.cards import card_names
from llamax.config.load import load_model
from llamax.config.mesh import AXES, MeshConfig, Rules, load_rules
from llamax.config.run import RunConfig
from llamax.errors import UserError
from llamax.mesh.rules import batch_sharding, batch_ways, make_mesh, shardings, spec_of
from llamax.model.transformer import Transformer
from llamax.train.state import abstract_state

RULES: Rules = load_rules("default")


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices())


def run_config(mesh: dict[str, int], **model: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {
                "vocab_size": 64,
                "d_model": 32,
                "segments": [{"repeat": 2}],
                "attention": {"kind": "gqa", "heads": 8, "kv_heads": 4},
                "position": {"kind": "rope"},
                "mlp": {"kind": "swiglu", "d_ff": 32},
                **model,
            },
            "mesh": mesh,
            "train": {"steps": 1, "seq_len": 16},
        }
    )


@pytest.mark.parametrize("name", ["default", "replicated"])
def test_presets_cover_every_axis_of_every_component(name: str) -> None:
    """A model that has every kind of parameter finds a rule for each of its axes."""
    expert = {"kind": "swiglu", "d_ff": 16}
    config = run_config(
        {"data": 8},
        position={"kind": "learned"},
        norm={"kind": "layernorm"},
        attention={"kind": "gqa", "heads": 8, "qkv_bias": True, "out_bias": True, "qk_norm": {"kind": "rmsnorm"}},
        mlp={"kind": "moe", "experts": 8, "top_k": 2, "expert": expert, "shared": {**expert, "bias": True}},
        head={"bias": True},
    )
    abstract_state(config, load_rules(name), make_mesh(config.mesh, jax.devices()))


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "expected"),
    [
        (("embed", "heads", "head_dim"), (2, 32, 8, 4), {"fsdp": 2, "tensor": 4}, (None, "fsdp", "tensor", None)),
        (("embed", "heads", "head_dim"), (32, 8, 4), {"data": 8}, (None, None, None)),
        (("experts", "embed", "mlp"), (2, 8, 32, 16), {"fsdp": 2, "expert": 4}, (None, "expert", "fsdp", None)),
        (("vocab", "embed"), (64, 32), {"tensor": 8}, ("tensor", None)),
        (("embed", "mlp"), (2, 32, 16), {"stage": 2, "fsdp": 2, "context": 2}, ("stage", ("fsdp", "context"), None)),
    ],
)
def test_partition(
    axes: tuple[str, ...], shape: tuple[int, ...], sizes: dict[str, int], expected: tuple[str | None]
) -> None:
    assert spec_of(axes, shape, RULES, mesh_of(**sizes), "w") == PartitionSpec(*expected)


def test_an_axis_over_two_mesh_axes() -> None:
    rules = {**RULES, "embed": ("fsdp", "tensor"), "heads": ()}
    assert spec_of(("embed", "heads"), (32, 8), rules, mesh_of(fsdp=2, tensor=4), "w") == PartitionSpec(
        ("fsdp", "tensor"), None
    )


def test_optimizer_state_lies_with_its_parameter() -> None:
    config = run_config({"fsdp": 2, "tensor": 4, "data": 1})
    state = abstract_state(config, RULES, make_mesh(config.mesh, jax.devices()))
    placed = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 32, 8, 4)]
    assert len(placed) == 3  # query and its two moments
    assert {leaf.sharding.spec for leaf in placed} == {PartitionSpec(None, "fsdp", "tensor", None)}
    assert state.step.sharding.spec == PartitionSpec()


def sizes_of_every_family() -> Iterator[Any]:
    """All shipped models; those beside the first of each family are slow."""
    families: set[str] = set()
    for name in card_names():
        family = name.partition("/")[0]
        yield pytest.param(name, marks=[pytest.mark.slow] if family in families else [])
        families.add(family)


@pytest.mark.parametrize("name", list(sizes_of_every_family()))
def test_fsdp_cuts_every_large_weight(name: str) -> None:
    """No array of more than 1e5 numbers a layer is whole on a device; biases and norm weights are smaller."""
    config = load_model(name)
    model = jax.eval_shape(lambda: Transformer(config, key=jax.random.key(0)))
    places = jax.tree.leaves(shardings(model, model, RULES, mesh_of(fsdp=8)))
    whole = []
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(model), places, strict=True):
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        layers = leaf.shape[0] if where.startswith("stacks.") else 1
        if leaf.size > 1e5 * layers and 8 * math.prod(place.shard_shape(leaf.shape)) != leaf.size:
            whole.append(where)
    assert not whole


def test_batch_lies_over_everything_but_tensor() -> None:
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    assert batch_ways(RULES, mesh) == 4
    sharding = batch_sharding(RULES, mesh, leading=1)
    assert sharding.shard_shape((3, 8, 16)) == (3, 2, 16)


# ---------------------------------------------------------------- messages
def test_a_mesh_axis_used_twice_names_the_array() -> None:
    rules = {**RULES, "mlp": ("fsdp",)}
    config = run_config({"fsdp": 8, "data": 1})
    with pytest.raises(
        UserError, match=r"mlp\.(up|gate|down) would use mesh axis 'fsdp' twice \(for (embed and mlp|mlp and embed)\)"
    ):
        abstract_state(config, rules, make_mesh(config.mesh, jax.devices()))


def test_an_axis_that_does_not_divide_names_the_array() -> None:
    config = run_config({"tensor": 8, "data": 1})
    with pytest.raises(UserError, match=r"attention\.key, axis kv_heads of 4, is not divisible by tensor=8"):
        abstract_state(config, RULES, make_mesh(config.mesh, jax.devices()))


def test_an_axis_without_a_rule_names_the_array_and_the_line_to_add() -> None:
    rules = {name: axes for name, axes in RULES.items() if name != "vocab"}
    with pytest.raises(UserError, match=r"array embedding has the axis 'vocab', which has no rule; add `vocab: null`"):
        spec_of(("vocab", "embed"), (64, 32), rules, mesh_of(data=8), "embedding")


def test_a_rule_to_no_mesh_axis(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("batch: data\nmlp: [fsdp, model]\n")
    with pytest.raises(UserError, match=r"mlp -> 'model' is not a mesh axis; use one of stage, data, fsdp, expert"):
        load_rules(str(path))


@pytest.mark.parametrize("rule", ["batch: [data, context]", "mlp: stage", "batch: [stage]"])
def test_a_rule_that_cuts_what_its_axis_cannot(tmp_path: Path, rule: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("batch: data\n" * (not rule.startswith("batch")) + rule)
    with pytest.raises(UserError, match=r"context cuts sequences and weights but no batch, stage cuts layers alone"):
        load_rules(str(path))


def test_rules_that_are_no_file() -> None:
    with pytest.raises(UserError, match="nowhere"):
        load_rules("nowhere")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": 3}, r"mesh\.fsdp=3.* multiply to 3, which does not fit the 8 devices"),
        ({"data": 16}, r"multiply to 16, which does not fit the 8 devices"),
        ({"data": -1, "tensor": 16}, r"multiply to 16, which does not fit the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(**sizes), jax.devices())


def test_minus_one_takes_the_rest() -> None:
    assert dict(make_mesh(MeshConfig(tensor=2), jax.devices()).shape) == {
        "stage": 1,
        "data": 4,
        "fsdp": 1,
        "expert": 1,
        "context": 1,
        "tensor": 2,
    }
    assert make_mesh(MeshConfig(), jax.devices()[:1]).axis_names == AXES


def test_a_mesh_may_leave_devices_idle() -> None:
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices())
    assert mesh.devices.ravel().tolist() == jax.devices()[:4]
