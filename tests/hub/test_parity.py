"""Models made here, exported, load in transformers with equal logits. Live: `pytest -m parity`.

The interpreter that has torch and transformers is this one, or LLAMAX_TORCH_PYTHON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.load import validate
from llamax.config.model import ModelConfig
from llamax.hub.dialects import read_config
from llamax.hub.export import export_hf
from llamax.model.transformer import Transformer

from .folders import NAMES, OWN, WITHOUT_CLASS

PYTHON = os.environ.get("LLAMAX_TORCH_PYTHON", sys.executable)
SCRIPT = """
import sys, json, numpy as np, torch, transformers
transformers.utils.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
    wrong = {k: sorted(map(str, v)) for k, v in told.items() if v and k != "error_msgs"}
    ids = torch.from_numpy(np.load(folder + "/ids.npy"))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    np.save(folder + "/theirs.npy", logits.float().numpy())
    json.dump(wrong, open(folder + "/wrong.json", "w"))
"""


@pytest.mark.parity
def test_exported_models_load_in_transformers(tmp_path: Path) -> None:
    """Every dialect with a fixture, from a config of ours without a dialect named, initialized here."""
    names = [name for name in NAMES if name not in WITHOUT_CLASS]
    if subprocess.run([PYTHON, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip("needs torch and transformers: pip install llamax[torch], or set LLAMAX_TORCH_PYTHON")
    tokens = np.random.default_rng(0).integers(3, 40, (2, 21))
    ours: dict[str, np.ndarray] = {}
    for i, name in enumerate(names):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = read_config(json.loads((OWN / name / "config.json").read_text()), name)[0]
        plain = {"init": {"kind": "fan_in"}, "mtp": 0}
        config = validate(ModelConfig, config.as_dict() | plain, name)
        model = jax.jit(lambda key, config=config: Transformer(config, key=key))(jax.random.key(i))
        ours[name] = np.asarray(jax.jit(lambda m, t: m(t))(model, jnp.asarray(tokens)))
        np.save(export_hf(model, config, tmp_path / name) / "ids.npy", tokens)
    folders = [str(tmp_path / name) for name in names]
    done = subprocess.run([PYTHON, "-c", SCRIPT, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in names:
        assert json.loads((tmp_path / name / "wrong.json").read_text()) == {}, name
        theirs = np.load(tmp_path / name / "theirs.npy")
        assert theirs.std() > 0.01
        np.testing.assert_allclose(ours[name], theirs, atol=2e-4, rtol=1e-4, err_msg=name)
