"""Small dense models whole on several CPU devices: the numbers of one device, and one sum a step."""

from __future__ import annotations

import re
from typing import Any

import jax
import pytest

from llamax.config.load import load_run
from llamax.config.mesh import load_rules
from llamax.config.run import RunConfig
from llamax.mesh.cpu import simulate_devices
from llamax.mesh.rules import make_mesh
from llamax.train.replicas import devices_for, replicas

from .training import assert_trains_as_alone, run_config


# ---------------------------------------------------------------- the step
@pytest.mark.parametrize("kind", ["dense", "documents", "latent"])
def test_trains_as_one_device(kind: str) -> None:
    text = assert_trains_as_alone({"data": 8}, kind)
    sums = re.findall(r"= (\S+) all-reduce\(", text)
    gradient = [shape for shape in sums if shape.startswith("f32[") and shape != "f32[]"]
    assert len(gradient) == 1, sums  # of one vector; what is left counts the targets of documents


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["window", "chunk", "learned", "alibi"])
def test_every_dense_kind_trains_as_one_device(kind: str) -> None:
    assert_trains_as_alone({"data": 8}, kind)


def test_a_loss_in_chunks_trains_as_on_one_device() -> None:
    assert_trains_as_alone({"data": 4}, "dense", loss_chunk=64)


@pytest.mark.parametrize(
    ("mesh", "kind", "train"),
    [
        ({"data": 8}, "experts", {}),  # losses of a batch are not sums over its sequences
        ({"data": 8}, "sparse", {}),
        ({"data": 4, "fsdp": 2}, "dense", {}),
        ({"data": 1}, "dense", {}),
        ({"data": 2}, "dense", {"grad_accumulation": 2}),
    ],
    ids=str,
)
def test_others_are_left_to_the_compiler(mesh: dict[str, Any], kind: str, train: dict[str, Any]) -> None:
    config = run_config(mesh, kind, **train)
    assert replicas(config, load_rules("default"), make_mesh(config.mesh)) is None


# ---------------------------------------------------------------- which runs, how many devices
def run_of(*overrides: str) -> RunConfig:
    return load_run("tiny", ["model=ladder/d32", "train.batch_size=8", "train.seq_len=128", *overrides])


def test_two_cores_share_the_batches_of_a_small_dense_model() -> None:
    assert [devices_for(run_of(), available) for available in (1, 2, 64)] == [1, 2, 2]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.mlp={kind: moe, experts: 4, top_k: 2, expert: {kind: swiglu, d_ff: 32}}"],
        ["model=llama1/7b"],
        ["train.batch_size=7"],
        ["train.batch_size=1"],
        ["train.seq_len=16"],  # 64 tokens for a device
        ["train.grad_accumulation=2"],
        ["mesh.data=1"],
        ["mesh.fsdp=2"],
        ["mesh=auto"],
    ],
    ids=str,
)
def test_one_device_for_all_others(overrides: list[str]) -> None:
    assert devices_for(run_of(*overrides), 2) == 1


# ---------------------------------------------------------------- devices
def test_devices_are_simulated_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(jax.config, "update", lambda name, count: asked.append(count))
    assert not simulate_devices(2)  # the tests' own XLA_FLAGS
    monkeypatch.setenv("XLA_FLAGS", "")
    assert simulate_devices(2)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert not simulate_devices(2)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    assert not simulate_devices(2)
    assert asked == [2]


def test_a_started_platform_keeps_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(jax.devices())
    monkeypatch.setenv("XLA_FLAGS", "")
    assert not simulate_devices(2)
    assert len(jax.devices()) == count
