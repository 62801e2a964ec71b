"""The step that a GPU would run, lowered for it on this machine: what fast runs have in common is in it."""

from __future__ import annotations

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from llamax.config.load import run_from_data
from llamax.config.mesh import load_rules
from llamax.config.run import RunConfig
from llamax.mesh.rules import make_mesh
from llamax.model.execution import Execution
from llamax.train.state import TrainState, abstract_state
from llamax.train.step import train_step

BATCH, SEQ, VOCAB, CHUNK = 2, 64, 512, 32
MIXTURE = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 96}}


def config_of(mlp: dict[str, object]) -> RunConfig:
    model = {
        "vocab_size": VOCAB,
        "d_model": 48,
        "max_seq_len": SEQ,
        "segments": [{"repeat": 3}],
        "attention": {"heads": 4, "kv_heads": 2, "head_dim": 16},
        "position": {"kind": "rope"},
        "mlp": mlp,
        "head": {"tied": False},
    }
    train = {"batch_size": BATCH, "seq_len": SEQ, "steps": 10, "loss_chunk": CHUNK, "activation_dtype": "bfloat16"}
    return run_from_data({"model": model, "train": {**train, "compute_dtype": "bfloat16"}, "mesh": {"data": 1}})


def lowered_for_cuda(config: RunConfig, state: TrainState, monkeypatch: pytest.MonkeyPatch) -> str:
    from jax._src.cudnn import fused_attention_stablehlo as library

    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(library, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda capability: False)
    batch = {"tokens": jax.ShapeDtypeStruct((BATCH, SEQ + 1), jnp.int32)}
    execution = Execution("bfloat16", "bfloat16", kernels=("cudnn",))
    step = jax.jit(lambda state, batch: train_step(state, batch, config, execution), donate_argnums=0)
    return step.trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()


def products(text: str) -> Counter[tuple[str, str, str]]:
    """How many dot_general have which (left, right, result) types."""
    found = re.findall(r"dot_general.*?: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>", text)
    return Counter(found)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_the_step_of_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = MIXTURE if kind == "mixture" else {"kind": "swiglu", "d_ff": 96}
    config = config_of(mlp)
    state = abstract_state(config, load_rules("default"), make_mesh(config.mesh, jax.devices()[:1]))
    text = lowered_for_cuda(config, state, monkeypatch)
    calls = re.findall(r"custom_call @(__cudnn\$\w+)", text)
    assert len(calls) == 2  # one body of the scan forward, one backward
    assert any("Backward" in call for call in calls)
    assert f"tensor<{BATCH}x4x{SEQ}x{SEQ}x" not in text  # no scores
    assert f"tensor<{BATCH}x{SEQ}x{VOCAB}x" not in text  # no logits of all positions
    assert f"tensor<{BATCH}x{CHUNK // BATCH}x{VOCAB}xf32>" in text
    found = products(text)
    wide = {types for types in found if "f32" in types[:2]}
    # A router multiplies in float32: forward, and the two of its backward pass. Nothing else does.
    assert sum(found[types] for types in wide) == (3 if kind == "mixture" else 0), found
    assert found["bf16", "bf16", "bf16"] > 0  # results that join the stream
    assert found["bf16", "bf16", "f32"] > 0  # gradients of weights, logits
    # Both norms that a step reports in one sum an array; every norm of the backward pass reads its input for itself.
    assert text.count("stablehlo.complex ") >= len(jax.tree.leaves(state.model))
    assert re.search(r"optimization_barrier %\w+ : tensor<\d+x\d+x48xbf16>", text)
    donated = len(re.findall(r"tf.aliasing_output|jax.buffer_donor", text))
    assert donated >= 3 * len(jax.tree.leaves(state.model))  # weights and both moments
