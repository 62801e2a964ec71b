from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from llamax.accounting.memory import memory_bytes
from llamax.accounting.params import count_params
from llamax.config.load import load_run
from llamax.config.mesh import load_rules
from llamax.config.run import MeshConfig
from llamax.mesh.rules import make_mesh
from llamax.train.remat import SHARE, device_bytes, fitting, for_devices, rematerialization
from llamax.train.step import execution_of

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}


def tiny(*overrides: str) -> Any:
    return load_run("tiny", overrides)


def test_the_first_policy_that_fits() -> None:
    config = tiny("train.remat=auto")
    none, dots, full = (device_bytes(config, policy, False, ONE) for policy in ("none", "dots", "full"))
    assert none > dots > full
    assert none == memory_bytes(tiny("train.remat=none"))["total"]
    for room, policy in ((none, "none"), (none - 1, "dots"), (dots, "dots"), (dots - 1, "full"), (full, "full")):
        found, rule = fitting(config, int(np.ceil(room / SHARE)), False, ONE)
        assert found == policy
        assert rule.startswith(f"remat={policy}: none needs ")
        assert "may not fit" not in rule
    found, rule = fitting(config, int(full / SHARE / 2), False, ONE)
    assert found == "full"
    assert "it may not fit: lower train.batch_size" in rule


def test_flash_attention_keeps_no_scores() -> None:
    """Attention weights are heads x keys operands a token and layer, and one layer's float32 scores, twice."""
    config = tiny("train.remat=none", "train.compute_dtype=float32")
    model, train = config.model, config.train
    heads, tokens = model.layers[0].attention.heads, train.batch_size * train.seq_len
    saved = tokens * heads * train.seq_len * (4 * len(model.layers) + 8)
    assert memory_bytes(config)["activations"] - memory_bytes(config, flash=True)["activations"] == saved
    capped = tiny("train.remat=none", "train.compute_dtype=float32", "model.attention.softcap=5.0")
    assert memory_bytes(capped, flash=True) == memory_bytes(capped)


def test_a_mesh_divides_weights_by_some_axes_and_activations_by_all() -> None:
    config = tiny("train.remat=auto")
    parts = memory_bytes(tiny("train.remat=none"))
    state = parts["parameters"] + parts["gradients"] + parts["optimizer"]
    found = device_bytes(config, "none", False, {"data": 2, "fsdp": 4, "tensor": 1, "expert": 1})
    assert found == pytest.approx(state / 4 + (parts["activations"] + parts["logits"]) / 8)


def test_context_divides_both_and_stages_the_layers() -> None:
    """By hand, for tiny in 2 stages and 4 microbatches: 5 turns are kept, of which a stage has its half."""
    parts = memory_bytes(tiny("train.remat=full"))
    state = parts["parameters"] + parts["gradients"] + parts["optimizer"]
    cut = device_bytes(tiny("train.remat=auto"), "full", False, {"context": 4, "data": 2})
    assert cut == pytest.approx(state / 4 + (parts["activations"] + parts["logits"]) / 8)

    config = tiny("train.remat=auto", "train.grad_accumulation=4")
    model, train = config.model, config.train
    kept = train.batch_size * train.seq_len * len(model.layers) * model.d_model * 4
    scratch = parts["activations"] - kept
    params = count_params(model)
    outside = params.embedding + params.head + model.d_model
    state = 4 * (1 + 2 + 2) * (outside + (params.total - outside) / 2)
    found = device_bytes(config, "full", False, {"stage": 2})
    assert found == pytest.approx(state + kept / 4 * 5 / 2 + scratch / 4 + parts["logits"] / 2)


def test_on_this_machine_nothing_is_recomputed() -> None:
    """A CPU device does not say its memory."""
    config = tiny("train.remat=auto")
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    assert rematerialization(config, mesh)[0] == "none"
    assert execution_of(config, load_rules("default"), mesh).remat == "none"


def test_a_device_that_says_its_memory_decides() -> None:
    device = SimpleNamespace(
        platform="gpu",
        device_kind="fake",
        compute_capability="9.0",
        client=SimpleNamespace(platform_version="cuda"),
        memory_stats=lambda: {"bytes_limit": 20_000_000},
    )
    config = tiny("train.remat=auto", "train.compute_dtype=float32")
    assert for_devices(config, [device], ONE) == fitting(config, 20_000_000, False, ONE)
    narrow = tiny("train.remat=auto")
    assert for_devices(narrow, [device], ONE) == fitting(narrow, 20_000_000, True, ONE)


def test_a_named_policy_is_kept() -> None:
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    assert rematerialization(tiny("train.remat=dots"), mesh)[0] == "dots"
