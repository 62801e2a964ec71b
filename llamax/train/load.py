"""A trained run back as a model, and its held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from llamax.accounting.bits import bits_per_byte
from llamax.config.load import run_from_data
from llamax.config.mesh import MeshConfig, load_rules
from llamax.config.run import RunConfig
from llamax.data.batches import eval_batches
from llamax.data.open import open_data
from llamax.errors import UserError
from llamax.mesh.rules import batch_sharding, batch_ways, make_mesh, shardings
from llamax.mesh.start import start
from llamax.model.transformer import Transformer
from llamax.storage.copies import at_hand
from llamax.train.axes import check_axes
from llamax.train.checkpoints import load_params
from llamax.train.evaluate import evaluate
from llamax.train.run_dir import is_run, read_config
from llamax.train.step import execution_of


def load_run(run_dir: str | Path, *, step: int | None = None) -> tuple[Transformer, RunConfig]:
    """The model of a run directory, from its newest good checkpoint (or that of `step`), and its config.

    `model(tokens)` gives float32 logits [batch, seq, vocab]. Arrays are placed on this process's devices by the run's
    own mesh rules, with a mesh of data parallelism only.

    Raises:
        UserError: not a run, or no good checkpoint.
    """
    path = at_hand(run_dir)
    if not is_run(path):
        raise UserError(f"{path}: not a run directory (no config.yaml); give the --run-dir of a training run")
    config = read_config(path)
    mesh = make_mesh(MeshConfig())
    shapes = jax.eval_shape(lambda key: Transformer(config.model, key=key), jax.random.key(0))
    places = shardings(shapes, shapes, load_rules(config.mesh.rules), mesh)
    abstract = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, places)
    return load_params(path, abstract, step), config


def evaluate_run(run_dir: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Held-out loss of a run's newest checkpoint: nats per token, bits per byte, tokens.

    `overrides` change how it is evaluated (`data.store=STORE`, `data.eval_tokens=100000`, `train.seq_len=512`,
    `train.batch_size=8`, `mesh.*`), not the model.

    Raises:
        UserError: as `load_run`, or data that does not fit the model.
    """
    start()
    model, trained = load_run(run_dir)
    here = {**trained.as_dict(), "mesh": {"rules": trained.mesh.rules}}  # this machine's devices, not the training's
    config = run_from_data(here, overrides, where=str(run_dir))
    if config.model != trained.model:
        raise UserError(f"{run_dir}: model.* cannot be changed for an evaluation; drop those overrides")
    store = open_data(config.data)
    if store.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{store.path}: the store's vocabulary of {store.vocab_size} exceeds "
            f"model.vocab_size={config.model.vocab_size}; "
            "evaluate on a store made with the run's tokenizer"
        )
    mesh = make_mesh(config.mesh)
    check_axes(config, mesh)
    rules = load_rules(config.mesh.rules)
    place = batch_sharding(rules, mesh)
    ways = batch_ways(rules, mesh) * (config.train.grad_accumulation if mesh.shape["stage"] > 1 else 1)
    batches = eval_batches(
        store,
        batch_size=-(-config.train.batch_size // ways) * ways,  # padding does not count
        seq_len=config.train.seq_len,
        max_tokens=config.data.eval_tokens,
        mask_documents=config.data.mask_documents,
    )
    placed = ({name: jax.device_put(a, place) for name, a in batch.items()} for batch in batches)
    loss, tokens = evaluate(
        model, placed, loss_chunk=config.train.loss_chunk, execution=execution_of(config, rules, mesh)
    )
    bits = bits_per_byte(loss, store.tokens("held_out"), store.bytes("held_out"))
    return {"run": str(run_dir), "loss": loss, "bits_per_byte": bits, "eval_tokens": tokens, "store": str(store.path)}
