"""The whole model against logits of Hugging Face transformers (float32, random weights)."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from llamax.model.execution import Execution

from .hf import read_fixture

FAMILIES = ["llama1", "llama2_gqa", "llama3", "llama31", "llama32_tied", "mistral_swa", "mistral_nemo", "mixtral"]
# Families we ship no card for: here because each exercises components that no Llama has.
OTHERS = ["gemma2", "gemma3_text", "qwen1_5", "qwen3_tied", "phi1"]
REPEATS = ["codellama", "gemma1", "qwen2_tied", "qwen3_moe", "phi2"]


@pytest.mark.parametrize("name", FAMILIES + OTHERS + [pytest.param(name, marks=pytest.mark.slow) for name in REPEATS])
def test_logits_equal_transformers(shared_reference: Path, name: str) -> None:
    model, tokens, logits = read_fixture(shared_reference / "fixtures" / name)
    ours = jax.jit(lambda m, t: m(t))(model, tokens.astype(np.int32))
    np.testing.assert_allclose(ours, logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "mixtral"])
def test_bfloat16_products_stay_near_float32(shared_reference: Path, name: str) -> None:
    model, tokens, logits = read_fixture(shared_reference / "fixtures" / name)
    ours = jax.jit(lambda m, t: m(t, None, Execution("bfloat16", "bfloat16")))(model, tokens.astype(np.int32))
    error = np.sqrt(np.mean((np.asarray(ours) - logits) ** 2)) / logits.std()
    assert 0 < error < 0.1
