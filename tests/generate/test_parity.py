"""Greedy continuations equal those of transformers on the reference checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llamax
from llamax.generate.engine import Engine
from llamax.generate.sampling import GREEDY

NEW = 12
# One of each kind of attention, rotary scaling, norm and router there is.
FIXTURES = [
    *("llama2_gqa", "llama31", "mistral_swa", "mixtral", "qwen3_moe", "gemma2", "gemma3_text", "phi2", "phi3_4k"),
    *("command_r_plus", "dbrx", "deepseek_v2", "deepseek_v3", "llama4_scout_text", "glm5_dsa", "qwen2_moe"),
]


@pytest.mark.parity
@pytest.mark.parametrize("name", FIXTURES)
def test_greedy_equals_transformers(shared_reference: Path, name: str) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    folder = shared_reference / "fixtures" / name
    tokens = np.load(folder / "logits.npz")["input_ids"].astype(np.int32)
    prompts = [tokens[0], tokens[1][: tokens.shape[1] // 2]]
    model, _ = llamax.load(folder)
    ours, _ = Engine(model).run(prompts, [GREEDY] * 2, [0] * 2, NEW)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for prompt, row in zip(prompts, ours, strict=True):
        ids = torch.tensor(prompt[None].astype(np.int64))
        for i, token in enumerate(row.tolist()):
            with torch.no_grad():
                logits = theirs(ids, use_cache=False).logits[0, -1]
            best = float(logits.max())
            # The same choice, or one that float32 cannot tell from it.
            assert float(logits[token]) >= best - 1e-4, f"token {i} of {name}"
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama31", "mistral_swa", "gemma3_text", "deepseek_v3"])
def test_greedy_equals_their_generate(shared_reference: Path, name: str) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    folder = shared_reference / "fixtures" / name
    prompt = np.load(folder / "logits.npz")["input_ids"][0].astype(np.int64)
    model, _ = llamax.load(folder)
    ours, _ = Engine(model).run([prompt.astype(np.int32)], [GREEDY], [0], NEW)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    given = torch.tensor(prompt[None])
    out = theirs.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert ours[0].tolist() == out[0, len(prompt) :].tolist()
