"""Every family against transformers: logits, both spellings of config.json, and a round trip byte for byte.

Phi-3-small, which transformers has not, against the loops of phi3small.py.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from llamax.hub.dialects import DIALECTS, _meaning, inexpressible, read_config, write_config
from llamax.hub.export import export_hf
from llamax.hub.load import load_hf
from llamax.model.cache import Cache, init_cache
from llamax.model.execution import Execution
from llamax.model.transformer import Transformer

from .folders import NAMES, OWN, SPELLINGS, tensors

# Of the reference's, those that hold nothing a fixture of ours does not run in slow tests alone.
REFERENCE = [
    "arctic_handwritten", "codellama", "command_r", "command_r_plus", "dbrx", "deepseek_v2", "deepseek_v2_lite",
    "deepseek_v3", "deepseek_v32_dsa", "gemma1", "gemma2", "gemma3_mm", "gemma3_text", "glm5_dsa", "llama1",
    "llama2_gqa", "llama3", "llama31", "llama32_tied", "llama32_vision", "llama4_maverick_text", "llama4_mm",
    "llama4_scout_text", "mistral_nemo", "mistral_swa", "mixtral", "phi1", "phi2", "phi3_4k", "phi3_5_moe",
    "phi3_longrope", "qwen1_5", "qwen2_moe", "qwen2_tied", "qwen3_moe", "qwen3_tied",
]  # fmt: skip
NORMAL = {
    "arctic_handwritten",
    "command_r",
    "dbrx",
    "gemma3_mm",
    "llama1",
    "llama32_vision",
    "llama4_mm",
    "phi3_longrope",
}
SLOW = [name if name in NORMAL else pytest.param(name, marks=pytest.mark.slow) for name in REFERENCE]


def check(folder: Path, out: Path) -> None:
    """Logits as transformers gives them; exported tensors are the file's; the exported config is the same model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, config = load_hf(folder)
    text = read_config(json.loads((folder / "config.json").read_text()), folder.name)[2]
    saved = np.load(folder / "logits.npz")
    forward = jax.jit(lambda m, t: m(t))
    for part in [name.removesuffix("logits") for name in saved.files if name.endswith("logits")]:
        if text and part != "text_only_":
            continue
        ours = forward(model, saved[f"{part}input_ids"].astype(np.int32))
        atol = 1e-3 if config.model.dialect == "dbrx" else 2e-4
        np.testing.assert_allclose(ours, saved[f"{part}logits"], atol=atol, rtol=1e-4)
    export_hf(model, config, out)
    there, back = tensors(folder), tensors(out)
    theirs = there
    if text:
        own = {n: a for name, a in there.items() if (n := text.rename(name)) is not None}
        theirs = {n: a[: len(a) - text.spare.get(n, 0)] for n, a in own.items()}
    assert theirs.keys() == back.keys()
    for name, array in back.items():
        assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert array.tobytes() == theirs[name].tobytes(), name
    again = read_config(json.loads((out / "config.json").read_text()), "exported")[0]
    assert again == config.model


@pytest.mark.parametrize("name", NAMES)
def test_own_fixture(name: str, tmp_path: Path) -> None:
    check(OWN / name, tmp_path / "out")


@pytest.mark.parametrize("name", SLOW)
def test_reference_fixture(shared_reference: Path, name: str, tmp_path: Path) -> None:
    check(shared_reference / "fixtures" / name, tmp_path / "out")


def check_decoding(folder: Path) -> None:
    """One token at a time through the cache gives the logits of the whole sequence at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, config = load_hf(folder)
    saved = np.load(folder / "logits.npz")
    part = "text_only_" if "text_only_input_ids" in saved.files else ""
    tokens = saved[f"{part}input_ids"].astype(np.int32)

    @jax.jit
    def one_by_one(model: Transformer, tokens: jax.Array) -> jax.Array:
        def step(cache: Cache, column: jax.Array) -> tuple[Cache, jax.Array]:
            logits, cache = model.decode(column[:, None], cache)
            return cache, logits[:, 0]

        return jax.lax.scan(step, init_cache(config.model, *tokens.shape), tokens.T)[1].swapaxes(0, 1)

    atol = 1e-3 if config.model.dialect == "dbrx" else 2e-4
    np.testing.assert_allclose(one_by_one(model, tokens), saved[f"{part}logits"], atol=atol, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_own_fixture_decodes(name: str) -> None:
    check_decoding(OWN / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE)
def test_reference_fixture_decodes(shared_reference: Path, name: str) -> None:
    check_decoding(shared_reference / "fixtures" / name)


def both(folder: Path) -> tuple[dict, dict]:
    hub = next(folder / name for name in SPELLINGS if (folder / name).is_file())
    return json.loads((folder / "config.json").read_text()), json.loads(hub.read_text())


def assert_same_model(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new, hub = (_meaning(read_config(data, folder.name)[0]) for data in both(folder))
    # transformers 5 writes a count of multi-token modules whether or not the file has them
    assert {**new, "mtp": 0} == {**hub, "mtp": 0}


@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_are_one_model(name: str) -> None:
    assert_same_model(OWN / name)


@pytest.mark.parametrize("name", REFERENCE)
def test_both_spellings_of_the_reference(shared_reference: Path, name: str) -> None:
    assert_same_model(shared_reference / "fixtures" / name)


@pytest.mark.parametrize("name", NAMES)
def test_every_dialect_says_what_it_cannot_express(name: str) -> None:
    """No dialect fails on the model of another; those that take it give the same model back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = read_config(both(OWN / name)[0], name)[0]
    taken = [dialect.name for dialect in DIALECTS.values() if not inexpressible(config, dialect)]
    assert config.dialect in taken
    free = config.model_validate(config.as_dict() | {"dialect": None})
    assert write_config(free, name)[1].name == taken[0]


def test_published_configs_have_the_published_size(shared_reference: Path) -> None:
    """Every model of models.yaml whose model_type is a dialect: its config gives exactly its parameters."""
    import yaml

    from llamax.accounting.params import count_params

    rows = yaml.safe_load((shared_reference / "models.yaml").read_text())["models"]
    checked = 0
    for row in rows:
        kind = row["model_type"]
        if kind not in DIALECTS or row["params"].get("vision"):
            continue
        config = read_config({**row["config"], "model_type": kind, "transformers_version": "4.40.0"}, row["name"])[0]
        assert count_params(config).total == row["params"]["total"], row["name"]
        checked += 1
    assert checked > 70


@pytest.mark.parametrize("name", ["gemma2", "mixtral"])
def test_bfloat16_products_stay_near_float32(name: str) -> None:
    model, _ = load_hf(OWN / name)
    saved = np.load(OWN / name / "logits.npz")
    ours = jax.jit(lambda m, t: m(t, None, Execution("bfloat16", "bfloat16")))(model, saved["input_ids"])
    error = np.sqrt(np.mean((np.asarray(ours) - saved["logits"]) ** 2)) / saved["logits"].std()
    assert 0 < error < 0.1
