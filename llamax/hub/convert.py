"""Between a Hugging Face folder and a run directory: what `llamax model import` and `export` do."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llamax.accounting.params import count_params
from llamax.config.load import dump_yaml, run_from_data
from llamax.config.run import RunConfig
from llamax.errors import UserError
from llamax.hub.export import copy_tokenizer, export_hf, fresh_folder
from llamax.hub.load import load_hf
from llamax.model.transformer import Transformer
from llamax.train.checkpoints import Checkpoints
from llamax.train.env import environment
from llamax.train.load import load_run
from llamax.train.run_dir import CHECKPOINTS, CONFIG, ENV, TOKENIZER, is_run


class _Weights(NamedTuple):
    """The part of a training state that an imported model has; its paths are the training state's."""

    model: Transformer


def load(path: str | Path, *, step: int | None = None) -> tuple[Transformer, RunConfig]:
    """The model of a run directory (`load_run`) or of a Hugging Face folder (`load_hf`, on the first device), and its
    config. `model(tokens)` gives float32 logits [batch, seq, vocab].

    Raises:
        UserError: neither of the two, no good checkpoint, or a `step` of a folder that has none.
    """
    if is_run(Path(path)):
        return load_run(path, step=step)
    if step is not None:
        raise UserError(f"{path}: not a run directory (no config.yaml), so it has no step {step}; leave step out")
    return load_hf(path)


def import_run(source: str | Path, run_dir: str | Path) -> dict[str, Any]:
    """Make a run directory of a Hugging Face folder: its config, its weights as the checkpoint of step 0, its
    tokenizer. `llamax.load` and `llamax eval` take it; training starts from it in Python (see `load_hf`).

    Raises:
        UserError: what is wrong with the folder, or a run directory that is not empty; nothing is left behind.
    """
    model, config = load_hf(source)
    final = Path(run_dir).absolute()
    with fresh_folder(final) as work:
        (work / TOKENIZER).mkdir()
        copy_tokenizer(Path(source), work / TOKENIZER)
        data = config.as_dict()
        if name := data["data"]["tokenizer"].get("path"):
            data["data"]["tokenizer"]["path"] = str(final / TOKENIZER / Path(name).name)
        config = run_from_data(data, where=str(source))
        with Checkpoints(work / CHECKPOINTS, config.checkpoint) as checkpoints:
            checkpoints.save(0, _Weights(model), {}, permanent=True)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        session = {"started": started, "imported": str(Path(source).absolute())}
        env = {"fingerprint": "imported", **environment(), "sessions": [session]}
        (work / ENV).write_text(json.dumps(env, indent=1) + "\n", encoding="utf-8")
        (work / CONFIG).write_text(dump_yaml(config), encoding="utf-8")  # last: it makes the folder a run
    types = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(model)})
    return {
        "run_dir": str(run_dir),
        "dialect": config.model.dialect,
        "params_total": count_params(config.model).total,
        "layers": len(config.model.layers),
        "dtype": ", ".join(types),
        "tokenizer": config.data.tokenizer.kind,
    }


def export_run(run_dir: str | Path, folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """Write the model of a run directory as a Hugging Face folder.

    Raises:
        UserError: no run or no good checkpoint there, no dialect for the model, or a folder that is not empty.
    """
    model, config = load_run(run_dir, step=step)
    imported = Path(run_dir) / TOKENIZER  # kept by import_run; a trained run names its tokenizer's file in its config
    export_hf(model, config, folder, tokenizer=imported if imported.is_dir() else None)
    written = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return {"folder": str(folder), "model_type": written["model_type"], "dtype": written["torch_dtype"]}
