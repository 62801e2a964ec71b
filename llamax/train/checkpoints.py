"""Checkpoints of a run: asynchronous, atomic, verified. Orbax writes and reads the arrays; only this file talks to it.

    checkpoints/
      1200/              a permanent checkpoint: its name appears only when everything in it is on the disk
        state/           Orbax, one array a key, the key being its path in the state: `.model.head.value`
        digests.json     SHA-256 of each file, shapes of the arrays, the meta given with it
      1234.temporary/    the newest checkpoint by time; deleted once a newer one is complete
      1240.saving/       not complete: ignored, and cleared by the next process that trains here

Orbax alone restores flipped bytes silently, hence the digests; the folder's last rename is what makes a step exist.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np

from llamax.config.run import CheckpointConfig
from llamax.errors import UserError
from llamax.mesh.job import ALONE, Job
from llamax.storage.copies import fill
from llamax.storage.files import sync_folder
from llamax.train.digests import Damaged, read_note, verify_digests, write_digests
from llamax.train.files import disk_cause, hush_closed_loops
from llamax.train.run_dir import CHECKPOINTS

# Orbax's patience with a save goes by the wall clock, which may leap; dead peers are noticed by mesh/channel.py. So: a
# century, less than the most that threads can wait, and no folders made behind a save: for them it waits 5 minutes.
SAVE_SECONDS = 100 * 365 * 86400

T = TypeVar("T")
Warn = Callable[[str], None]


class Found(NamedTuple):
    """A checkpoint folder that is complete by its name (not yet verified)."""

    step: int
    permanent: bool
    path: Path


def find_checkpoints(directory: Path) -> list[Found]:
    """The complete checkpoints in a `checkpoints/` folder, newest first."""
    names = os.listdir(directory) if directory.is_dir() else []
    matches = [match for name in names if (match := re.fullmatch(r"(\d+)(\.temporary)?", name))]
    return sorted((Found(int(m[1]), m[2] is None, directory / m[0]) for m in matches), reverse=True)


class Checkpoints:
    """The checkpoints of the run this process trains. One process at a time: it holds the run directory's lock.

    Saving returns as soon as the arrays are safe from the caller, who may donate them at once; the rest happens behind
    the loop. A failure there is raised by the next `save`, `wait` or `close`. The processes of a job all call every
    method alike, on a shared file system, but for `due`: the leader asks it and the others are told.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        on_warning: Warn = warnings.warn,
        clock: Callable[[], float] = time.monotonic,
        job: Job = ALONE,
    ) -> None:
        self._directory, self._config = Path(directory).absolute(), config  # Orbax refuses relative paths
        self._warn, self._clock, self._processes = on_warning, clock, job
        self._last = clock()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[None] | None = None
        self._good: dict[int, bool] = {}  # steps this process saved or restored, and whether they are permanent

    @functools.cached_property
    def _writer(self) -> Any:
        hush_closed_loops()
        patient = _orbax().options.AsyncOptions(SAVE_SECONDS, create_directories_asynchronously=False)
        return _orbax().AsyncCheckpointer(_orbax().PyTreeCheckpointHandler(), async_options=patient)

    def due(self, step: int) -> Literal["permanent", "temporary"] | None:
        """Which kind of checkpoint `step` calls for: permanent by step, else `every_seconds` after the last."""
        if self._config.following(step - 1) == step:
            return "permanent"
        if self._config.every_seconds is None:
            return None
        waited = self._clock() - self._last >= self._config.every_seconds and (self._job is None or self._job.done())
        return "temporary" if waited else None

    def save(self, step: int, state: Any, meta: dict[str, Any], permanent: bool) -> None:
        """Start saving `state` (any pytree of arrays, PRNG keys included) and `meta` (JSON data) as `step`.

        A step is saved once: asking again can only make it permanent.

        Raises:
            UserError: this or the previous save failed, such as for lack of space; earlier checkpoints are intact.
        """
        self.wait()
        self._last = self._clock()
        if step in self._good:
            return self._make_permanent(step) if permanent else None
        arrays = _by_path(state)
        note = {"step": step, "meta": meta, "arrays": {key: _describe(leaf) for key, leaf in arrays.items()}}
        note = json.loads(json.dumps(note))  # the caller may go on changing meta
        work = self._directory / f"{step}.saving"
        with self._in_words(work):
            if self._processes.leader:
                self._directory.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(work, ignore_errors=True)
            self._writer.save(work / "state", args=_orbax().args.PyTreeSave(_stored(arrays)))
        self._good[step] = permanent
        self._job = self._thread.submit(self._complete, work, step, note, permanent)

    def restore(self, abstract_state: T) -> tuple[int, T, dict[str, Any]] | None:
        """The newest good checkpoint as `(step, state, meta)`, or None if none was ever completed.

        `abstract_state` is a pytree of `jax.ShapeDtypeStruct`; arrays arrive with its shardings, whatever mesh wrote
        them. A damaged checkpoint is passed over with a warning.

        Raises:
            UserError: there are checkpoints and none is good, or they hold other arrays than asked for.
        """
        self.wait()
        if self._processes.leader:
            for path in self._directory.glob("*"):
                if path.suffix in (".saving", ".deleting"):
                    shutil.rmtree(path, ignore_errors=True)
        restored = _restore(self._directory, abstract_state, self._warn, job=self._processes)
        if restored is None:
            return None
        checkpoint, state, meta = restored
        self._good = {checkpoint.step: checkpoint.permanent}
        return checkpoint.step, state, meta

    def wait(self) -> None:
        """Return when the last save is complete on the disk. Raises UserError if it failed."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Wait, and end the thread. Raises UserError if the last save failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if "_writer" in vars(self):
                self._writer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError as error:
            if kind is None:
                raise
            self._warn(str(error))  # the exception on its way out is the one to show

    def _complete(self, work: Path, step: int, note: dict[str, Any], permanent: bool) -> None:
        """In the thread: wait for Orbax, add the digests, give the folder its name, drop what it replaces."""
        try:
            with self._in_words(work):
                self._writer.wait_until_finished()
                if not self._processes.leader:
                    return
                write_digests(work, note)
                final = self._directory / (str(step) if permanent else f"{step}.temporary")
                _remove(final)  # only a damaged one can be there
                os.replace(work, final)
                sync_folder(self._directory)
        except BaseException:
            self._good.pop(step, None)
            raise
        for other in find_checkpoints(self._directory):
            if not other.permanent and other.path != final:
                _remove(other.path)

    def _make_permanent(self, step: int) -> None:
        temporary, final = self._directory / f"{step}.temporary", self._directory / str(step)
        if self._processes.leader and not self._good[step]:
            with self._in_words(temporary):
                _remove(final)  # only a damaged one can be there
                os.replace(temporary, final)
                sync_folder(self._directory)
        self._good[step] = True

    @contextmanager
    def _in_words(self, work: Path) -> Iterator[None]:
        """Clear what a failed save left, and say what the disk said and what is still saved."""
        try:
            yield
        except Exception as error:
            for _ in range(10 if work.suffix == ".saving" else 0):  # TensorStore's threads may still be writing there
                shutil.rmtree(work, ignore_errors=True)
                time.sleep(0.02)
            if (cause := disk_cause(error)) is None:
                raise
            steps = [str(found.step) for found in find_checkpoints(self._directory)][::-1]
            kept = f"still saved: step {', '.join(steps)}" if steps else "no earlier checkpoint was saved"
            raise UserError(
                f"checkpoint of step {work.stem} could not be saved in {self._directory}: {cause}; {kept}; "
                "then give the same command again to continue"
            ) from error


def load_state(
    run_dir: Path, abstract_state: T, step: int | None = None, *, on_warning: Warn = warnings.warn
) -> tuple[int, T, dict[str, Any]] | None:
    """`Checkpoints.restore` of `step`, or the newest, for a reader: changes nothing on the disk, the run may go on.

    Raises:
        UserError: there are such checkpoints and none is good, or they hold other arrays than asked for.
    """
    restored = _restore(Path(run_dir).absolute() / CHECKPOINTS, abstract_state, on_warning, step)
    return None if restored is None else (restored[0].step, *restored[1:])


def load_params(run_dir: Path, abstract_model: T, step: int | None = None, *, on_warning: Warn = warnings.warn) -> T:
    """The model part alone of a checkpoint of `run_dir`: of `step`, or of the newest good one.

    `abstract_model` is the model with `jax.ShapeDtypeStruct` leaves (`jax.eval_shape`); arrays arrive with its
    shardings, on the first device where it names none, in the float types they were saved in (an imported model keeps
    its own). Changes nothing on the disk: the run may be training.

    Raises:
        UserError: no checkpoint, no good one, not that step, or other arrays than the model's.
    """
    directory = Path(run_dir).absolute() / CHECKPOINTS
    found = _newest_good(directory, on_warning, step)
    if found is None:
        have = ", ".join(str(item.step) for item in find_checkpoints(directory)[::-1])
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(f"{directory}: {what}; " + (f"take one of the steps {have}" if have else "train the run first"))
    return _read(found[0].path, _as_saved(abstract_model, found[1]), found[1], prefix=".model")


def _restore(
    directory: Path, abstract: T, warn: Warn, step: int | None = None, job: Job = ALONE
) -> tuple[Found, T, dict[str, Any]] | None:
    """(checkpoint, state, meta) of the newest good one, or of that of `step`."""
    found = _newest_good(directory, warn, step, job)
    return None if found is None else (found[0], _read(found[0].path, abstract, found[1]), found[1]["meta"])


# ---------------------------------------------------------------- choosing
def _newest_good(
    directory: Path, warn: Warn, step: int | None = None, job: Job = ALONE
) -> tuple[Found, dict[str, Any]] | None:
    """The newest checkpoint that verifies, with its note; the leader of a job looks and the others follow."""
    if not job.leader:
        chosen: Any = job.agree(None)
        if chosen is None:
            return None
        item = Found(chosen[0], chosen[1], directory / chosen[2])
        return item, read_note(item.path)
    found = [item for item in find_checkpoints(directory) if step is None or item.step == step]
    bad: list[str] = []
    good: tuple[Found, dict[str, Any]] | None = None
    for item in found:
        fill(item.path)
        try:
            good = item, verify_digests(item.path)
            break
        except Damaged as damage:
            if not item.path.exists():  # read while the run trains: a newer one has just taken its place
                return _newest_good(directory, warn, step, job)
            bad.append(f"{item.path.name}: {damage}")
    if found and good is None:
        raise UserError(
            f"{directory}: no checkpoint can be restored ({'; '.join(bad)}); "
            "put the files back from a copy, or delete the folder to start from step 0"
        )
    job.agree(None if good is None else [good[0].step, good[0].permanent, good[0].path.name])
    for text in bad if good else []:
        warn(f"{directory}: checkpoint {text}; using step {good[0].step} instead")  # type: ignore[index]
    return good


def _remove(path: Path) -> None:
    """Delete a checkpoint so that an interruption leaves no half of it under its own name."""
    if path.exists():
        aside = path.with_name(path.name + ".deleting")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


# ---------------------------------------------------------------- arrays
def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> list[Any]:
    return [str(leaf.dtype), *leaf.shape]


def _stored(arrays: dict[str, Any]) -> dict[str, Any]:
    """What Orbax is given: PRNG keys as their integers, and no empty arrays, which it refuses."""
    given = {key: jax.random.key_data(leaf) if _is_key(leaf) else leaf for key, leaf in arrays.items() if leaf.size}
    return {key: leaf.addressable_data(0) if _on_simulated(leaf) else leaf for key, leaf in given.items()}


def _on_simulated(leaf: Any) -> bool:
    """Whether several devices simulated on one CPU hold all of an array. One's is enough: Orbax would have each write a
    part of it, and compile a program for every shape to cut that out."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or not sharding.is_fully_replicated or len(sharding.device_set) == 1:
        return False
    return jax.process_count() == 1 and all(device.platform == "cpu" for device in sharding.device_set)


def _read(folder: Path, abstract: T, note: dict[str, Any], prefix: str = "") -> T:
    """The arrays of `abstract` from a verified checkpoint, where they are under `prefix`."""
    wanted = {prefix + key: leaf for key, leaf in _by_path(abstract).items()}
    stored = {key: described for key, described in note["arrays"].items() if key.startswith(prefix)}
    _check_same({key: _describe(leaf) for key, leaf in wanted.items()}, stored, folder)
    target = {key: _target(leaf) for key, leaf in wanted.items() if leaf.size}
    ocp = _orbax()
    how = {
        key: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
        for key, leaf in target.items()
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
        arrays = reader.restore(folder / "state", args=args)
    leaves = [_as_asked(leaf, arrays.get(key)) for key, leaf in wanted.items()]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract), leaves)


def _as_saved(abstract: T, note: dict[str, Any]) -> T:
    """`abstract` with the float types of a checkpoint's model."""

    def typed(path: Any, leaf: Any) -> Any:
        saved = note["arrays"].get(".model" + jax.tree_util.keystr(path), [str(leaf.dtype)])[0]
        if saved == str(leaf.dtype) or not jax.dtypes.issubdtype(leaf.dtype, np.floating):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, jax.numpy.dtype(saved), sharding=getattr(leaf, "sharding", None))

    return jax.tree_util.tree_map_with_path(typed, abstract)


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, type and place in which Orbax is to deliver `leaf`."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _as_asked(leaf: Any, array: jax.Array | None) -> jax.Array:
    if array is None:
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), _target(leaf).sharding)
    if not _is_key(leaf):
        return array
    kinds: list[Any] = []  # an abstract key names its kind only inside a trace
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), leaf)
    return jax.random.wrap_key_data(array, impl=kinds[0])


def _check_same(wanted: dict[str, list[Any]], stored: dict[str, list[Any]], folder: Path) -> None:
    if wanted == stored:
        return
    key = next(key for key in [*wanted, *stored] if wanted.get(key) != stored.get(key))
    count = sum(wanted.get(key) != stored.get(key) for key in {*wanted, *stored})
    there, asked = stored.get(key, "absent"), wanted.get(key, "absent")
    raise UserError(
        f"{folder}: {count} arrays differ from the ones asked for, first {key}: {there} there, {asked} asked for; "
        "use the config and the llamax version that wrote it"
    )


# ---------------------------------------------------------------- Orbax
@functools.cache
def _orbax() -> Any:
    """Orbax, imported when first needed, with its log silenced: each of its failures also arrives as an exception."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    return ocp
