"""The loop: one run from its config to its result, resumable anywhere.

Everything with an effect is here: the run directory, checkpoints, the clock. The step itself is in step.py.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from llamax.accounting.bits import bits_per_byte
from llamax.accounting.horizon import Horizon, horizon
from llamax.accounting.params import count_params
from llamax.accounting.peaks import mfu
from llamax.config.run import RunConfig
from llamax.data.batches import TrainBatches, eval_batches
from llamax.errors import Interrupted
from llamax.mesh.rules import batch_sharding
from llamax.mesh.start import start
from llamax.train.branch import check_trunk, first_state
from llamax.train.checkpoints import Checkpoints
from llamax.train.evaluate import evaluate
from llamax.train.population import Answer, Ask, Coroutine, Seat, alone, whole
from llamax.train.precision import Precision, begun_with, with_dtype
from llamax.train.progress import Progress
from llamax.train.rows import plain
from llamax.train.run_dir import Run, open_run
from llamax.train.setup import Common, batches_of, dispatch_shapes, load_dispatch, notes, share
from llamax.train.signals import StopRequest, stop_signals
from llamax.train.state import TrainState
from llamax.train.step import Batch, Dispatch, execution_of, make_dispatch

SECONDS_PER_DISPATCH = 1.0  # a dispatch is cut to about this, so that a signal is answered and progress is seen

Report = Callable[[Progress], None]
Signals = Callable[[], AbstractContextManager[StopRequest]]
Pending = tuple[int, dict[str, Any], Any]  # first step, metrics, steps run: still on the device


def train(
    config: RunConfig, run_dir: Path, *, report: Report | None = None, devices: list[jax.Device] | None = None
) -> dict[str, Any]:
    """Train to the horizon, or resume to it, and return what result.json holds.

    A finished run returns its stored result. On the same mesh an interrupted and resumed run gives the numbers of an
    uninterrupted one bit for bit. SIGTERM or Ctrl-C saves a checkpoint and raises `Interrupted`. `devices` are those
    of the mesh (None: all).

    Raises:
        UserError: data, mesh or run directory do not fit the config.
        Interrupted: a signal asked to stop; the same call resumes.
    """
    start()
    chosen = begun_with(config, run_dir, jax.devices() if devices is None else devices)
    common = share(config, devices)
    with ThreadPoolExecutor(1, "compile") as beside:  # XLA compiles on the cores that restoring leaves idle
        program: list[Future[Dispatch]] = []

        def begin() -> None:
            program.append(beside.submit(compile_dispatch, with_dtype(config, chosen.dtype), common))

        run = run_steps(config, run_dir, common, chosen, report=report, signals=stop_signals, begin=begin)
        return alone(run, lambda: program[0].result())


def compile_dispatch(config: RunConfig, common: Common) -> Dispatch:
    """The program of a run, compiled from shapes alone."""
    dispatch = make_dispatch(config, common.rules, common.mesh, common.abstract)
    return dispatch.lower(*dispatch_shapes(config, common)).compile()  # type: ignore[attr-defined]


def run_steps(
    config: RunConfig,
    run_dir: Path,
    common: Common,
    chosen: Precision,
    *,
    report: Report | None,
    signals: Signals,
    begin: Callable[[], None] = lambda: None,
) -> Coroutine:
    """`train` as a coroutine, which asks for its dispatches instead of running them (see population.py).

    `begin` is called before anything slow once there are steps to run, as far as checkpoints' names tell.
    """
    check_trunk(config, run_dir)
    batches = batches_of(config, common.store)
    with open_run(run_dir, config, common.store.fingerprint, chosen._asdict()) as run:
        if run.result is not None:
            return run.result
        session = _Session(config, horizon(config), run, common, batches, chosen, report or _silent)
        return (yield from session.run(signals, begin))


class _Session:
    """One process's part in a run: from the newest checkpoint to the end, or to a signal."""

    def __init__(
        self,
        config: RunConfig,
        length: Horizon,
        run: Run,
        common: Common,
        batches: TrainBatches,
        chosen: Precision,
        report: Report,
    ):
        self.hash, self.asked = config.hash8, config.train.compute_dtype
        self.config, self.chosen = with_dtype(config, chosen.dtype), chosen
        self.run_dir, self.batches, self.report = run, batches, report
        self.common, self.store, self.rules, self.mesh = common, common.store, common.rules, common.mesh
        self.horizon = length
        self.tokens_per_step = config.train.batch_size * config.train.seq_len
        self.flops_per_token = {name: total / self.horizon.tokens for name, total in self.horizon.flops.items()}
        self.clock = time.perf_counter()
        self.seconds_before = 0.0
        self.fetched_at = (0, self.clock)  # (step, clock) of the newest metrics on the host
        self.loss: float | None = None
        self.rate: float | None = None
        self.train_seconds = 0.0
        self.train_steps = 0
        self.data_seconds = 0.0  # in which the device may have waited for batches

    # ------------------------------------------------------------ the run, top to bottom
    def run(self, signals: Signals, begin: Callable[[], None]) -> Coroutine:
        """Restore, compile, train, evaluate, finish."""
        steps = self.horizon.steps
        begin()
        with Checkpoints(self.run_dir.path / "checkpoints", self.config.checkpoint, on_warning=_warn) as checkpoints:
            self._progress(0, "restore")
            state: TrainState | Seat
            state, step, cause = self._restore(checkpoints)
            left = step < steps and cause is None
            if left:
                self._progress(step, "compile")
                self._say_choices()
                batches = self._load(step, None)
                state = (yield Ask(state, batches, 0)).state
            with signals() as stop:
                if left:
                    state, cause = yield from self._train(state, step, batches, checkpoints, stop)
                final = whole(state)
                step = int(final.step)
                self._save(checkpoints, step, final, permanent=True, cause=cause)
                found = self._evaluate(final, step, stop)
                checkpoints.wait()
                if found is None:
                    raise Interrupted(stop.signal or "", step)
                loss, tokens = found
            result = self._result(step, cause, int(final.skipped), loss, tokens)
            result = plain(result)
            self.run_dir.finish(result)
        self._progress(step, "done")
        return result

    def _restore(self, checkpoints: Checkpoints) -> tuple[TrainState, int, str | None]:
        """(state, steps tried, cause of divergence) to continue from."""
        found = checkpoints.restore(self.common.abstract)
        if found is None:
            step, state = first_state(self.config, self.run_dir.path, self.common)
            self.run_dir.rewind(step)
            return state, step, None
        step, state, meta = found
        self.seconds_before, self.loss = float(meta.get("seconds", 0.0)), meta.get("loss")
        self.data_seconds = float(meta.get("data_seconds", 0.0))
        self.run_dir.rewind(step, meta.get("newest"))
        return state, step, meta.get("cause")

    def _train(
        self, state: TrainState | Seat, step: int, batches: Batch, checkpoints: Checkpoints, stop: StopRequest
    ) -> Generator[Ask, Answer, tuple[TrainState | Seat, str | None]]:
        """Dispatch until the horizon, one dispatch ahead of the metrics; (state, cause of divergence)."""
        steps, cause = self.horizon.steps, None
        if self._evaluation_due(step):  # a checkpoint is saved before its evaluation, which may not have ended
            self._evaluate(whole(state), step, stop)
        self.fetched_at = (step, time.perf_counter())
        pending: Pending | None = None
        while step < steps and cause is None:
            state, metrics, ran, count = yield Ask(state, batches, self._count(step))
            previous, pending = pending, (step, metrics, ran)
            step += count
            batches = self._load(step, ran) if step < steps else batches
            cause = self._fetch(previous)
            save = checkpoints.due(step) if step < steps else None
            if cause is not None or not (self._evaluation_due(step) or save or stop):
                continue
            cause, pending = self._fetch(pending), None
            if cause is None:
                self._pause(whole(state), step, save, checkpoints, stop)
                self.fetched_at = (step, time.perf_counter())
        cause = cause or self._fetch(pending)
        return state, cause

    def _pause(
        self, state: TrainState, step: int, save: str | None, checkpoints: Checkpoints, stop: StopRequest
    ) -> None:
        """Between two dispatches: save, evaluate, and end here if a signal asks for it."""
        if save:
            self._save(checkpoints, step, state, permanent=save == "permanent")
        if self._evaluation_due(step) and not stop:
            self._evaluate(state, step, stop)
        if stop.signal:
            self._save(checkpoints, step, state, permanent=False)
            checkpoints.wait()
            raise Interrupted(stop.signal, step)

    # ------------------------------------------------------------ pieces
    def _say_choices(self) -> None:
        """What the config left to the machine, and what the mesh costs."""
        for note in notes(self.asked, self.chosen, self.config, self.mesh):
            print(f"note: {note}", file=sys.stderr)

    def _count(self, step: int) -> int:
        """How many steps the next dispatch takes: up to the next boundary, and to about SECONDS_PER_DISPATCH.

        One until a step has been timed: ten steps of a large model on a small machine would answer no signal for
        minutes.
        """
        train, save = self.config.train, self.config.checkpoint.following(step)
        count = min(train.steps_per_dispatch, self.horizon.steps - step)
        if save is not None:
            count = min(count, save - step)
        if train.eval_every_steps is not None:
            count = min(count, train.eval_every_steps - step % train.eval_every_steps)
        timed = SECONDS_PER_DISPATCH * self.train_steps / max(self.train_seconds, 1e-9)
        return min(count, max(1, int(timed)))

    def _evaluation_due(self, step: int) -> bool:
        every, branch = self.config.train.eval_every_steps, self.config.branch
        return every is not None and (branch.step if branch else 0) < step < self.horizon.steps and step % every == 0

    def _load(self, step: int, running: Any) -> dict[str, jax.Array]:
        """The batches of the dispatch that starts at `step` on the mesh, padded with zeros to the compiled capacity.

        Loading takes no time from training while the device is busy: its seconds count as waited for unless `running`,
        a result of the dispatch before, is still to come when they are over.
        """
        start = time.perf_counter()
        capacity, place = self.config.train.steps_per_dispatch, batch_sharding(self.rules, self.mesh, leading=1)
        loaded = load_dispatch(self.batches, step, self.horizon.steps, capacity, place)
        if running is None or running.is_ready():
            self.data_seconds += time.perf_counter() - start
        return loaded

    def _fetch(self, pending: Pending | None) -> str | None:
        """Bring one dispatch's metrics to the host, log its rows, report; the cause if the run diverged."""
        if pending is None:
            return None
        first, metrics, ran = pending
        metrics, ran = jax.device_get((metrics, ran))
        now, count = time.perf_counter(), int(ran)
        if count == 0:
            return None
        before, then = self.fetched_at
        elapsed = max(now - then, 1e-9)
        self.train_seconds, self.train_steps = self.train_seconds + elapsed, self.train_steps + first + count - before
        self.fetched_at = (first + count, now)
        rate = (first + count - before) * self.tokens_per_step / elapsed
        rows = [self._row(first + i + 1, {k: float(v[i]) for k, v in metrics.items()}, rate) for i in range(count)]
        every, last = self.config.log.every_steps, self.horizon.steps
        self.run_dir.log([r for r in rows if r["step"] % every == 0 or r["step"] in (1, last) or r["bad"]])
        self.loss, self.rate = rows[-1]["loss"], rate
        self._progress(first + count, "train")
        return self._diverged(rows[-1]) if self.config.train.on_divergence == "stop" else None

    def _diverged(self, row: dict[str, Any]) -> str | None:
        """Why this row's step was refused, or None; the limit is the step's own, seen in whether weights moved."""
        if not math.isfinite(row["loss"]):
            return f"loss is {row['loss']} at step {row['step']}"
        if not math.isfinite(row["grad_norm"]):
            return f"gradient norm is {row['grad_norm']} at step {row['step']}"
        if row["bad"]:
            return (
                f"loss {row['loss']:.4f} at step {row['step']} exceeds train.divergence_factor="
                f"{self.config.train.divergence_factor:g} x the running average"
            )
        return None

    def _row(self, step: int, metrics: dict[str, float], rate: float) -> dict[str, Any]:
        tokens = step * self.tokens_per_step
        row: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            **metrics,
            "tokens_per_second": rate,
            "seconds": self._seconds(),
        }
        row |= {f"flops_{name}": per_token * tokens for name, per_token in self.flops_per_token.items()}
        device = self.mesh.devices.flat[0].device_kind
        found = mfu(self.flops_per_token["causal"] * rate, device, self.mesh.size, self.config.train.compute_dtype)
        return (
            row
            if found is None
            else {**row, "mfu": found.fraction, "mfu_convention": "causal", "mfu_peak": found.peak_flops_per_second}
        )

    def _evaluate(self, state: TrainState, step: int, stop: StopRequest) -> tuple[float, int] | None:
        """(loss, tokens) of the held-out split, logged to evals.jsonl; None if a signal cut it short."""
        self._progress(step, "eval")
        train = self.config.train
        place = batch_sharding(self.rules, self.mesh)

        def placed() -> Iterator[dict[str, jax.Array]]:
            for batch in eval_batches(
                self.store,
                batch_size=train.batch_size,
                seq_len=train.seq_len,
                max_tokens=self.config.data.eval_tokens,
                mask_documents=self.config.data.mask_documents,
            ):
                if stop:
                    return
                yield {name: jax.make_array_from_process_local_data(place, a) for name, a in batch.items()}

        execution = execution_of(self.config, self.rules, self.mesh)
        loss, tokens = evaluate(state.model, placed(), loss_chunk=train.loss_chunk, execution=execution)
        if stop:
            return None
        row = {"step": step, "tokens": step * self.tokens_per_step, "loss": loss, "eval_tokens": tokens}
        self.run_dir.log_eval({**row, "bits_per_byte": self._bits_per_byte(loss), "seconds": self._seconds()})
        return loss, tokens

    def _bits_per_byte(self, loss: float) -> float:
        return bits_per_byte(loss, self.store.tokens("held_out"), self.store.bytes("held_out"))

    def _result(self, step: int, cause: str | None, skipped: int, loss: float, tokens: int) -> dict[str, Any]:
        params = count_params(self.config.model)
        seen = step * self.tokens_per_step
        return {
            "status": "diverged" if cause else "done",
            "cause": cause,
            "name": self.run_dir.path.name,
            "hash": self.hash,
            "compute_dtype": self.chosen.dtype,
            "steps": step,
            "skipped_steps": skipped,
            "tokens": seen,
            "train_loss": self.loss,
            "eval_loss": loss,
            "eval_bits_per_byte": self._bits_per_byte(loss),
            "eval_tokens": tokens,
            "params_total": params.total,
            "params_active": params.active,
            "n": params.active_matmul,
            **{f"flops_{name}": per_token * seen for name, per_token in self.flops_per_token.items()},
            "seconds": self._seconds(),
            "data_seconds": self.data_seconds,
            "tokens_per_second": self.train_steps * self.tokens_per_step / self.train_seconds
            if self.train_seconds
            else None,
            "unique_tokens": self.batches.unique_tokens(step),
            "epochs": self.batches.epochs(step),
            "fingerprint": self.store.fingerprint,
        }

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.clock

    def _save(
        self, checkpoints: Checkpoints, step: int, state: TrainState, *, permanent: bool, cause: str | None = None
    ) -> None:
        """Start a checkpoint, with what the next process needs besides the state."""
        self.run_dir.sync()
        meta: dict[str, Any] = {"seconds": self._seconds(), "data_seconds": self.data_seconds, "loss": self.loss}
        meta |= {"cause": cause, "newest": self.run_dir.newest, "fingerprint": self.store.fingerprint}
        checkpoints.save(step, state, meta, permanent)

    def _progress(self, step: int, phase: str) -> None:
        rate = self.rate
        left = (self.horizon.steps - step) * self.tokens_per_step / rate if rate else None
        self.report(
            Progress(
                step=step,
                steps=self.horizon.steps,
                tokens=step * self.tokens_per_step,
                loss=self.loss,
                tokens_per_second=rate,
                seconds_left=left,
                phase=phase,
            )
        )


def _silent(progress: Progress) -> None:
    pass


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
