"""The loop: one run from its config to its result, resumable anywhere, by one process or several.

Everything with an effect is here: the run directory, checkpoints, the clock. The step itself is in step.py, the numbers
that are written in record.py, and what several processes must agree on in mesh/job.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llamax.accounting.horizon import Horizon, horizon
from llamax.config.run import RunConfig
from llamax.data.batches import TrainBatches
from llamax.errors import Interrupted
from llamax.mesh.job import ALONE, Job
from llamax.mesh.rules import batch_sharding
from llamax.mesh.start import start
from llamax.train.branch import check_trunk, first_state
from llamax.train.checkpoints import Checkpoints
from llamax.train.evaluate import evaluate
from llamax.train.goodput import Spent, carried
from llamax.train.population import Answer, Ask, Coroutine, Seat, alone, whole
from llamax.train.precision import Precision, begun_with, with_dtype
from llamax.train.progress import Progress
from llamax.train.record import Record
from llamax.train.rows import plain
from llamax.train.run_dir import Run, open_run, read_time, stage
from llamax.train.setup import Common, batches_of, dispatch_shapes, held_out, load_dispatch, notes, share
from llamax.train.signals import StopRequest, stop_signals
from llamax.train.state import TrainState
from llamax.train.step import Batch, Dispatch, execution_of, make_dispatch

SECONDS_PER_DISPATCH = 1.0  # a dispatch is cut to about this, so that a signal is answered and progress is seen
TIME_SECONDS = 10.0  # between two records of where the time went: so much a kill can leave out

Report = Callable[[Progress], None]
Signals = Callable[[], AbstractContextManager[StopRequest]]
Pending = tuple[int, dict[str, Any], Any]  # first step, metrics, steps run: still on the device


def train(
    config: RunConfig,
    run_dir: str | Path,
    *,
    report: Report | None = None,
    devices: list[jax.Device] | None = None,
    job: Job = ALONE,
) -> dict[str, Any]:
    """Train to the horizon, or resume to it, and return what result.json holds.

    A finished run returns its stored result. On the same mesh an interrupted and resumed run gives the numbers of an
    uninterrupted one bit for bit. SIGTERM or Ctrl-C saves a checkpoint and raises `Interrupted`. `devices` are those
    of the mesh (None: all). The processes of a `job` (mesh/job.py) all call this with the same arguments; `run_dir` is
    on a file system that they share, and a signal to any of them stops all.

    Raises:
        UserError: data, mesh or run directory do not fit the config.
        Interrupted: a signal asked to stop; the same call resumes.
    """
    spent = Spent()
    start()
    run_dir = stage(run_dir, config.branch, job)
    chosen = Precision(*job.agree(begun_with(config, run_dir, jax.devices() if devices is None else devices)))
    common = share(config, devices, job)
    with ThreadPoolExecutor(1, "compile") as beside:  # XLA compiles on the cores that restoring leaves idle
        program: list[Future[Dispatch]] = []

        def begin() -> None:
            program.append(beside.submit(compile_dispatch, with_dtype(config, chosen.dtype), common))

        run = run_steps(
            config, run_dir, common, chosen, report=report, signals=stop_signals, begin=begin, job=job, spent=spent
        )
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
    job: Job = ALONE,
    spent: Spent | None = None,
) -> Coroutine:
    """`train` as a coroutine, which asks for its dispatches instead of running them (see population.py).

    `begin` is called before anything slow once there are steps to run, as far as checkpoints' names tell; `spent`
    accounts for the time, from now on where there is none yet.
    """
    spent = spent or Spent()
    if job.leader:
        check_trunk(config, run_dir)
    batches = batches_of(config, common)  # refuses a corpus too short for a window before anything is written
    with open_run(run_dir, config, common.store.fingerprint, chosen._asdict(), writer=job.leader) as run:
        if (result := job.agree(run.result if job.leader else None)) is not None:
            return result
        session = _Session(config, horizon(config), run, common, batches, chosen, report or _silent, job, spent)
        return (yield from session.run(signals, begin))


class _Next(NamedTuple):
    """What the leader decided between two dispatches."""

    steps: int  # of the next dispatch
    save: str | None  # the kind of checkpoint to save first
    signal: str | None  # that asks to stop


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
        job: Job,
        spent: Spent,
    ):
        self.hash, self.asked = config.hash8, config.train.compute_dtype
        self.config, self.chosen = with_dtype(config, chosen.dtype), chosen
        self.run_dir, self.batches, self.report, self.job = run, batches, report, job
        self.common, self.store, self.rules, self.mesh = common, common.store, common.rules, common.mesh
        self.horizon, self.record = length, Record(self.config, length, common, batches)
        self.clock = time.perf_counter()
        self.seconds_before = 0.0
        self.fetched_at = (0, self.clock)  # (step, clock) of the newest metrics on the host
        self.loss: float | None = None
        self.rate: float | None = None
        self.train_seconds = 0.0
        self.train_steps = 0
        self.data_seconds = 0.0  # in which the device may have waited for batches
        self.spent, self.time_logged = spent, self.clock

    # ------------------------------------------------------------ the run, top to bottom
    def run(self, signals: Signals, begin: Callable[[], None]) -> Coroutine:
        """Restore, compile, train, evaluate, finish."""
        steps = self.horizon.steps
        begin()
        directory, how = self.run_dir.path / "checkpoints", self.config.checkpoint
        with Checkpoints(directory, how, on_warning=self._warn, job=self.job) as checkpoints:
            self._progress(0, "restore")
            state: TrainState | Seat
            state, step, cause = self._restore(checkpoints)
            left = step < steps and cause is None
            if left:
                self._progress(step, "compile")
                self._say_choices()
                batches = self._load(step, None)
                with self.spent.on("compile"):
                    state = (yield Ask(state, batches, 0)).state
                    self.job.meet()
            with signals() as stop:
                self.run_dir.stopping(lambda: self.job.wish(stop.signal) is not None)
                if left:
                    state, cause = yield from self._train(state, step, batches, checkpoints, stop)
                final = whole(state)
                step = int(final.step)
                self._save(checkpoints, step, final, permanent=True, cause=cause)
                found = self._evaluate(final, step, stop)
                with self.spent.on("checkpoint"):
                    checkpoints.wait()
                if isinstance(found, str):
                    self._log_time(step)
                    raise Interrupted(found, step)
            result = plain(self._result(step, cause, int(final.skipped), *found))
            self._log_time(step)
            self.run_dir.finish(result)
        self._progress(step, "done")
        return result

    def _restore(self, checkpoints: Checkpoints) -> tuple[TrainState, int, str | None]:
        """(state, steps tried, cause of divergence) to continue from."""
        last, began = read_time(self.run_dir.path), time.time() - sum(self.spent.seconds().values())
        found = checkpoints.restore(self.common.abstract)
        if found is None:
            step, state = first_state(self.config, self.run_dir.path, self.common)
            if last is not None:
                self.spent.resume(carried({}, last, began))
            self.run_dir.rewind(step)
            return state, step, None
        step, state, meta = found
        self.spent.resume(carried(meta.get("spent", {}), last, began))
        self.seconds_before, self.loss = float(meta.get("seconds", 0.0)), meta.get("loss")
        self.data_seconds = float(meta.get("data_seconds", 0.0))
        self.run_dir.rewind(step, meta.get("newest"))
        return state, step, meta.get("cause")

    def _train(
        self, state: TrainState | Seat, step: int, batches: Batch, checkpoints: Checkpoints, stop: StopRequest
    ) -> Generator[Ask, Answer, tuple[TrainState | Seat, str | None]]:
        """Dispatch until the horizon, one dispatch ahead of the metrics; (state, cause of divergence)."""
        steps, cause = self.horizon.steps, None
        self.spent.now("step")
        self._log_time(step)
        if self._evaluation_due(step):  # a checkpoint is saved before its evaluation, which may not have ended
            self._evaluate(whole(state), step, stop)
        self.fetched_at = (step, time.perf_counter())
        pending: Pending | None = None
        follows = self._next(step, None, stop)
        while step < steps and cause is None:
            state, metrics, ran, count = yield Ask(state, batches, follows.steps)
            previous, pending = pending, (step, metrics, ran)
            step += count
            batches = self._load(step, ran) if step < steps else batches
            cause = self._fetch(previous)
            if cause is not None:
                continue
            follows = self._next(step, checkpoints.due(step) if self.job.leader and step < steps else None, stop)
            if not (self._evaluation_due(step) or follows.save or follows.signal):
                continue
            cause, pending = self._fetch(pending), None
            if cause is None:
                self._pause(whole(state), step, follows, checkpoints, stop)
                self.fetched_at = (step, time.perf_counter())
        cause = cause or self._fetch(pending)
        return state, cause

    def _pause(self, state: TrainState, step: int, follows: _Next, checkpoints: Checkpoints, stop: StopRequest) -> None:
        """Between two dispatches: save, evaluate, and end here if a signal asks for it."""
        signal = follows.signal
        if follows.save:
            self._save(checkpoints, step, state, permanent=follows.save == "permanent")
        if self._evaluation_due(step) and not signal:
            found = self._evaluate(state, step, stop)
            signal = found if isinstance(found, str) else None
        if signal:
            self._save(checkpoints, step, state, permanent=False)
            with self.spent.on("checkpoint"):
                checkpoints.wait()
            self._log_time(step)
            raise Interrupted(signal, step)

    # ------------------------------------------------------------ pieces
    def _say_choices(self) -> None:
        """What the config left to the machine, and what the mesh costs."""
        for note in notes(self.asked, self.chosen, self.config, self.mesh):
            self._say(f"note: {note}")

    def _next(self, step: int, save: str | None, stop: StopRequest) -> _Next:
        """What comes after `step`, as the leader sees it: clocks and signals of the others are not asked."""
        return _Next(*self.job.agree(_Next(self._count(step), save, self.job.wish(stop.signal))))

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
            seconds = time.perf_counter() - start
            self.data_seconds += seconds
            self.spent.take("data", seconds)
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
        self.rate = (first + count - before) * self.record.tokens_per_step / elapsed
        values = [{k: float(v[i]) for k, v in metrics.items()} for i in range(count)]
        rows = [self.record.row(first + i + 1, v, self.rate, self._seconds()) for i, v in enumerate(values)]
        every, last = self.config.log.every_steps, self.horizon.steps
        self.run_dir.log([r for r in rows if r["step"] % every == 0 or r["step"] in (1, last) or r["bad"]])
        self.loss = rows[-1]["loss"]
        if now - self.time_logged > TIME_SECONDS:
            self._log_time(first + count)
        self._progress(first + count, "train")
        return self.record.diverged(rows[-1]) if self.config.train.on_divergence == "stop" else None

    def _evaluate(self, state: TrainState, step: int, stop: StopRequest) -> tuple[float, int] | str:
        """(loss, tokens) of the held-out split, logged to evals.jsonl; or the signal that cut it short."""
        self._progress(step, "eval")
        signals: list[str | None] = [None]

        def batches() -> Iterator[dict[str, jax.Array]]:
            for batch in held_out(self.config, self.common, self.batches.rows):
                signals.append(self.job.agree(self.job.wish(stop.signal)))
                if signals[-1]:
                    return
                yield batch

        with self.spent.on("evaluation"):
            execution, chunk = execution_of(self.config, self.rules, self.mesh), self.config.train.loss_chunk
            loss, tokens = evaluate(state.model, batches(), loss_chunk=chunk, execution=execution)
        if signals[-1]:
            return signals[-1]
        self.run_dir.log_eval(self.record.evaluation(step, loss, tokens, self._seconds()))
        return loss, tokens

    def _result(self, step: int, cause: str | None, skipped: int, loss: float, tokens: int) -> dict[str, Any]:
        rate = self.train_steps * self.record.tokens_per_step / self.train_seconds if self.train_seconds else None
        return {
            "name": self.run_dir.path.name,
            "hash": self.hash,
            **self.record.result(step, cause, loss, tokens),
            "skipped_steps": skipped,
            "train_loss": self.loss,
            "seconds": self._seconds(),
            "data_seconds": self.data_seconds,
            "tokens_per_second": rate,
        }

    def _log_time(self, step: int) -> None:
        self.time_logged = time.perf_counter()
        self.run_dir.log_time(step, self.spent.seconds())

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.clock

    def _save(
        self, checkpoints: Checkpoints, step: int, state: TrainState, *, permanent: bool, cause: str | None = None
    ) -> None:
        """Start a checkpoint, with what the next process needs besides the state."""
        with self.spent.on("checkpoint"):
            self.run_dir.sync()
            meta: dict[str, Any] = {"seconds": self._seconds(), "data_seconds": self.data_seconds, "loss": self.loss}
            meta |= {"cause": cause, "newest": self.run_dir.newest, "fingerprint": self.store.fingerprint}
            checkpoints.save(step, state, {**meta, "spent": self.spent.seconds()}, permanent)
            self._log_time(step)

    def _progress(self, step: int, phase: str) -> None:
        rate, tokens = self.rate, self.record.tokens_per_step
        left = (self.horizon.steps - step) * tokens / rate if rate else None
        done: dict[str, Any] = {"step": step, "steps": self.horizon.steps, "tokens": step * tokens, "phase": phase}
        self.report(Progress(**done, loss=self.loss, tokens_per_second=rate, seconds_left=left))

    def _say(self, text: str) -> None:
        if self.job.leader:
            print(text, file=sys.stderr)

    def _warn(self, text: str) -> None:
        self._say(f"warning: {text}")


def _silent(progress: Progress) -> None:
    pass
