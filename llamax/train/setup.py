"""What a run needs before its first step: its data, its mesh, the shapes of its state, the batches of a dispatch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int64

from llamax.accounting.horizon import horizon
from llamax.config.mesh import Rules, load_rules
from llamax.config.run import RunConfig
from llamax.data.batches import TrainBatches, eval_batches
from llamax.data.open import open_data
from llamax.data.store import Store
from llamax.errors import UserError
from llamax.mesh.job import ALONE, Job
from llamax.mesh.rules import batch_sharding, batch_ways, make_mesh
from llamax.mesh.slices import on_mesh, rows_of
from llamax.train.axes import check_axes, pipeline_note
from llamax.train.layout import layout_notes, ranked_layouts, with_layout
from llamax.train.precision import Precision
from llamax.train.remat import rematerialization
from llamax.train.replicas import replicas
from llamax.train.state import TrainState, abstract_state, initializer


class Common(NamedTuple):
    """What runs of one shape on the same data share; `initialize(hyper, seed)` is the program that makes a state."""

    store: Store
    rules: Rules
    mesh: Mesh
    abstract: TrainState  # shapes with shardings
    initialize: Callable[[dict[str, jax.Array], np.int32], TrainState]


def share(config: RunConfig, devices: list[jax.Device] | None = None, job: Job = ALONE) -> Common:
    """`Common` of a run on `devices` (None: all). Raises UserError: horizon, data or mesh do not fit the config."""
    horizon(config)  # less than a step is refused before any data is built
    store = _open(config, job)
    _check_vocabulary(config, store)
    rules, mesh, abstract = share_places(config, devices)
    return Common(store, rules, mesh, abstract, initializer(config, abstract))


def share_places(config: RunConfig, devices: list[jax.Device] | None = None) -> tuple[Rules, Mesh, TrainState]:
    """The part of `share` that needs no data: mesh rules, mesh, and the state as shapes with shardings."""
    if config.mesh.layout == "sizes":
        return _places(config, devices)
    ranked = ranked_layouts(config, jax.devices() if devices is None else devices)
    refused = "nothing divides batch, heads, widths and layers"
    for layout in ranked:
        try:
            return _places(with_layout(config, layout), devices)
        except UserError as error:  # an array that its axes do not divide
            refused = str(error)
    raise UserError(f"mesh=auto finds no layout for {len(devices or jax.devices())} devices: {refused}")


def _places(config: RunConfig, devices: list[jax.Device] | None) -> tuple[Rules, Mesh, TrainState]:
    rules = load_rules(config.mesh.rules)
    mesh = make_mesh(config.mesh, devices)
    check_axes(config, mesh)
    _check_batch(config, batch_ways(rules, mesh))
    return rules, mesh, abstract_state(config, rules, mesh)


def _open(config: RunConfig, job: Job) -> Store:
    """The data, opened and perhaps built by the leader first. Raises UserError where they are not the leader's."""
    store = open_data(config.data) if job.leader else None
    leaders = job.agree(store.fingerprint if store else "")
    store = store or open_data(config.data)
    if leaders != store.fingerprint:
        raise UserError(
            f"{store.path}: the data's fingerprint is {store.fingerprint[:12]} in process {job.index} and "
            f"{leaders[:12]} in process 0; train from one store that all processes read (data.store)"
        )
    return store


def batches_of(config: RunConfig, common: Common) -> TrainBatches:
    """The training batches of a run, of each the rows that this process's devices hold."""
    place, shape = batch_sharding(common.rules, common.mesh), (config.train.batch_size, config.train.seq_len + 1)
    return TrainBatches(
        common.store,
        batch_size=config.train.batch_size,
        seq_len=config.train.seq_len,
        seed=config.train.seed,
        mask_documents=config.data.mask_documents,
        rows=rows_of(place, shape, axis=0),
    )


def load_dispatch(
    batches: TrainBatches, first: int, stop: int, capacity: int, place: NamedSharding
) -> dict[str, jax.Array]:
    """The batches of steps `first` to `stop` - 1, at most `capacity`, as arrays [capacity, batch, seq + 1] on the mesh.

    Padded with zeros to `capacity`, which the dispatch is compiled for.
    """
    count, loaded = min(capacity, stop - first), {}
    for name, rows in batches.of_steps(first, count).items():
        if count < capacity:
            rows = np.concatenate([rows, np.zeros((capacity - count, *rows.shape[1:]), rows.dtype)])
        loaded[name] = on_mesh(place, rows, batches.rows, batches.batch_size, axis=1)
    return loaded


def held_out(config: RunConfig, common: Common, rows: Int64[np.ndarray, " rows"]) -> Iterator[dict[str, jax.Array]]:
    """The held-out split as batches [batch, ...] on the mesh (see `eval_batches`); this process reads `rows`."""
    place, size = batch_sharding(common.rules, common.mesh), config.train.batch_size
    for batch in eval_batches(
        common.store,
        batch_size=size,
        seq_len=config.train.seq_len,
        max_tokens=config.data.eval_tokens,
        mask_documents=config.data.mask_documents,
        rows=rows,
    ):
        yield {name: on_mesh(place, part, rows, size, axis=0) for name, part in batch.items()}


def dispatch_shapes(config: RunConfig, common: Common) -> tuple[TrainState, dict[str, Any], Any]:
    """What a dispatch is given, (state, batches, count), as shapes with shardings: enough to compile it."""
    train, place = config.train, batch_sharding(common.rules, common.mesh, leading=1)
    shape = (train.steps_per_dispatch, train.batch_size, train.seq_len + 1)
    names = ["tokens", "segments"] if config.data.mask_documents else ["tokens"]
    batches = {name: jax.ShapeDtypeStruct(shape, np.int32, sharding=place) for name in names}
    return common.abstract, batches, jax.ShapeDtypeStruct((), np.int32)


def notes(asked: str, chosen: Precision, config: RunConfig, mesh: Mesh) -> list[str]:
    """What a run says before it compiles: what its config left to the machine (`asked` is its own compute_dtype), and
    what stages cost."""
    found = [f"products in {chosen.dtype}: {chosen.why}"] if asked == "auto" else []
    if replicas(config, load_rules(config.mesh.rules), mesh):
        found.append(f"{mesh.size} CPU devices share every batch (JAX_NUM_CPU_DEVICES=1 leaves a default mesh to one)")
    found += layout_notes(config, mesh) if config.mesh.layout == "auto" else []
    found += [rematerialization(config, mesh)[1]] if config.train.remat == "auto" else []
    return found + ([pipeline_note(config, mesh)] if mesh.shape["stage"] > 1 else [])


def _check_vocabulary(config: RunConfig, store: Store) -> None:
    padded = -(-store.vocab_size // 256) * 256
    if not store.vocab_size <= config.model.vocab_size <= padded:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} does not fit the store's vocabulary of "
            f"{store.vocab_size} ({store.path}); "
            f"set model.vocab_size={store.vocab_size}, or up to {padded} to pad, or use another store"
        )


def _check_batch(config: RunConfig, ways: int) -> None:
    micro = config.train.batch_size // config.train.grad_accumulation
    if micro % ways:
        raise UserError(
            f"train.batch_size={config.train.batch_size} / train.grad_accumulation={config.train.grad_accumulation} = "
            f"{micro} sequences are not divisible by the mesh's {ways} batch shards; "
            f"choose a multiple of {ways * config.train.grad_accumulation}"
        )
