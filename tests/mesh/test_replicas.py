"""Small dense models whole on several CPU devices: the numbers of one device, and one sum a step."""

from __future__ import annotations

import re
from pathlib import Path
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
    text = assert_trains_as_alone({"data": 2}, kind)
    sums = [line.split(" = ")[1].split()[0] for line in text.splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    # One vector, also where the compiler would put arrays into a tuple; besides, the number of targets of documents.
    assert len([shape for shape in sums if "f32[]" not in shape]) == 1, sums
    assert not any(shape.startswith("(") for shape in sums), sums


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["window", "chunk", "learned", "alibi"])
def test_every_dense_kind_trains_as_one_device(kind: str) -> None:
    assert_trains_as_alone({"data": 2}, kind)


def test_a_loss_in_chunks_trains_as_on_one_device() -> None:
    assert_trains_as_alone({"data": 2}, "dense", loss_chunk=64)


@pytest.mark.parametrize(
    ("mesh", "kind", "train", "rules"),
    [
        ({"data": 2}, "experts", {}, {}),  # losses of a batch are not sums over its sequences
        ({"data": 2}, "sparse", {}, {}),
        ({"data": 2}, "dense", {"compute_dtype": "float8"}, {}),
        ({"data": 2}, "dense", {"grad_accumulation": 2}, {}),
        ({"data": 2}, "dense", {}, {"embed": ("data",)}),
        ({"data": 2}, "dense", {}, {"batch": ("fsdp",)}),
        ({"data": 1, "fsdp": 2}, "dense", {}, {}),
        ({"data": 8}, "dense", {}, {}),
        ({"data": 1}, "dense", {}, {}),
    ],
    ids=str,
)
def test_others_are_left_to_the_compiler(
    mesh: dict[str, Any], kind: str, train: dict[str, Any], rules: dict[str, tuple[str, ...]]
) -> None:
    config = run_config(mesh, kind, **train)
    assert replicas(config, load_rules("default") | rules, make_mesh(config.mesh)) is None
    plain = run_config({"data": 2})
    assert replicas(plain, load_rules("default"), make_mesh(plain.mesh)) is not None


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
        ["train.batch_size=64"],
        ["train.compute_dtype=float8"],
        ["train.grad_accumulation=2"],
        ["mesh.data=1"],
        ["mesh.fsdp=2"],
        ["mesh=auto"],
    ],
    ids=str,
)
def test_one_device_for_all_others(overrides: list[str]) -> None:
    assert devices_for(run_of(*overrides), 2) == 1


def test_one_device_where_rules_cut_weights_over_data(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("batch: [data]\nembed: data\n")
    assert devices_for(run_of(f"mesh.rules={own}"), 2) == 1


# ---------------------------------------------------------------- devices
@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tests' own XLA_FLAGS."""
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")


def test_what_the_user_says_holds(monkeypatch: pytest.MonkeyPatch, nothing_said: None) -> None:
    asked: list[int] = []
    monkeypatch.setattr(jax.config, "update", lambda name, count: asked.append(count))
    assert simulate_devices(2)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    assert not simulate_devices(2)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    assert not simulate_devices(2)
    assert asked == [2]


def test_a_started_platform_keeps_its_devices(nothing_said: None) -> None:
    count = len(jax.devices())
    assert not simulate_devices(2)
    assert len(jax.devices()) == count
