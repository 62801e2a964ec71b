"""Choosing a layout: what is allowed, what fits, and that the estimate turns where it should."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from llamax.accounting.layout import SHARE, SIMULATED, candidates, estimate, layouts, rates_of, why
from llamax.accounting.memory import training_state_bytes
from llamax.config.mesh import AXES
from llamax.config.run import RunConfig

H100 = "NVIDIA H100 80GB HBM3"


LATENT = {"kind": "mla", "heads": 4, "q_rank": 8, "kv_rank": 12, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}


def run_config(
    name: str | None = None,
    mlp: dict[str, Any] | None = None,
    attention: dict[str, Any] | None = None,
    **train: Any,
) -> RunConfig:
    from llamax.config.load import model_data

    small = {
        "vocab_size": 256,
        "d_model": 64,
        "max_seq_len": 128,
        "segments": [{"repeat": 6}],
        "attention": attention or {"heads": 4, "kv_heads": 2},
        "position": {"kind": "rope"},
        "mlp": mlp or {"kind": "swiglu", "d_ff": 96},
    }
    settings = {"batch_size": 16, "seq_len": 64, "steps": 10, "compute_dtype": "bfloat16", **train}
    return RunConfig.model_validate({"model": small if name is None else model_data(name), "train": settings})


def test_candidates_are_all_that_divide() -> None:
    """Against every tuple of sizes: 2 key heads bound tensor, 6 layers and 2 microbatches stage, no experts expert."""
    config = run_config(grad_accumulation=2)
    expected = {
        (stage, data, fsdp, 1, context, tensor)
        for stage, data, fsdp, context, tensor in itertools.product((1, 2, 4, 8), repeat=5)
        if stage * data * fsdp * context * tensor == 8 and stage <= 2 and tensor <= 2 and data * fsdp <= 8
    }
    assert {tuple(sizes[axis] for axis in AXES) for sizes in candidates(config, 8)} == expected


@pytest.mark.parametrize("experts", [4, 6])
def test_experts_are_cut_by_what_divides_them(experts: int) -> None:
    mixture = {"kind": "moe", "experts": experts, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 32}}
    assert max(sizes["expert"] for sizes in candidates(run_config(mlp=mixture), 8)) == math.gcd(experts, 8)


def test_a_latent_bounds_what_cuts_the_matrices_that_read_it() -> None:
    """A rank of 12 goes over 4 devices and not over 8."""
    found = list(candidates(run_config(attention=LATENT), 8))
    assert max(sizes["fsdp"] * sizes["context"] for sizes in found) == 4
    assert {(sizes["fsdp"], sizes["context"]) for sizes in found} >= {(4, 1), (2, 2), (1, 4)}


def test_memory_decides_before_time() -> None:
    """An 8B does not fit a GPU of 80 GB whole (16 bytes a parameter are 128 GB); what fits comes first, by time."""
    config = run_config("llama3/8b", batch_size=16, seq_len=4096, remat="full", activation_dtype="bfloat16")
    state = sum(training_state_bytes(config.model).values())
    assert state > 80e9
    found = layouts(config, 8, rates_of(H100), 80e9, flash=True)
    fits = [one.memory <= SHARE * 80e9 for one in found]
    assert fits == sorted(fits, reverse=True)
    assert not fits[-1]
    assert [one.seconds for one in found if one.memory <= SHARE * 80e9] == sorted(
        one.seconds for one in found if one.memory <= SHARE * 80e9
    )
    assert found[0].sizes["fsdp"] * found[0].sizes["tensor"] >= 2
    assert next(one for one in found if one.sizes["data"] == 8).memory > state


def test_plenty_of_memory_prefers_replicas_on_accelerators_and_words_say_why() -> None:
    """Small weights: one all-reduce of gradients beats gathering and beats the stream over tensor."""
    config = run_config(batch_size=64, seq_len=128)
    found = layouts(config, 8, rates_of(H100), 80e9)
    tensor = estimate(config, {**found[0].sizes, "data": 4, "tensor": 2}, rates_of(H100))
    assert found[0].sizes["tensor"] == found[0].sizes["context"] == 1
    assert found[0].seconds < tensor.seconds
    lines = why(found, 80e9)
    assert len(lines) == 3
    assert lines[0].startswith(found[0].name)
    assert "compute" in lines[0]
    assert "a device sends" in lines[0]


def test_stages_wait() -> None:
    """Two stages and two microbatches: a third of the turns are empty."""
    config = run_config(grad_accumulation=2)
    one, two = (estimate(config, {"stage": n, "data": 4 // n}, SIMULATED) for n in (1, 2))
    assert two.compute == pytest.approx(1.5 * one.compute)


def test_unknown_devices_have_rates() -> None:
    assert rates_of("Accelerator X").peak > 0
    assert rates_of("cpu").cpu
