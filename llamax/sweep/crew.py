"""A worker of several processes: the first claims cells, all of them train.

The leader runs the loop of `worker.work` and says before each cell which it is; the others wait for its word. A cell
that fails, or whose lease is lost, leaves them at different points of a program they run together, so then all end,
with `AGAIN`, and whoever started them starts them again: the failure is written down, and the next cell is another.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamax.errors import Interrupted, UserError
from llamax.mesh.job import Job, Several
from llamax.storage.copies import at_hand, refresh
from llamax.sweep.study import read_study
from llamax.train.progress import Progress

AGAIN = 3  # exit code: start this worker again
ASKED = 143  # exit code: asked to stop, all saved; 128 + SIGTERM
OWN_SECONDS = 15.0  # in which the leader finds by itself what went wrong in another process

Train = Callable[..., Any]


class Crew:
    """This process's part in a worker of several, or a worker alone. `stopping` is filled by its signal handler."""

    def __init__(self, job: Job, stopping: list[int]) -> None:
        self.job, self._stopping, self._training = job, stopping, False

    def should_stop(self) -> bool:
        """Whether to stop between cells. Several processes stop inside a cell where the training loop has them all."""
        return bool(self._stopping) and not (self._training and self.job.count > 1)

    def trains(self, train: Train) -> Train:
        """`train` with the others."""
        if self.job.count == 1:
            return train
        return lambda config, run_dir, report: self._train(train, config, run_dir, report)

    def follow(self, study: Path, train: Train) -> int:
        """What the leader says, until it says the exit code."""
        study = at_hand(study)
        while isinstance(order := self.job.agree(None), str):
            refresh(study)
            cells = {cell.name: cell for cell in read_study(study).cells}
            if order not in cells:
                raise UserError(f"{study}: process {self.job.index} sees no cell {order}; is the storage shared?")
            try:
                self._train(train, cells[order].config, study / cells[order].run_name, lambda progress: None)
            except Interrupted:
                continue
            except Exception:
                time.sleep(OWN_SECONDS)
                raise
        return int(order or 0)

    def _train(self, train: Train, config: Any, run_dir: Path, report: Callable[[Progress], None]) -> Any:
        def reported(progress: Progress) -> None:
            if self._stopping and progress.phase == "train":  # now the loop listens, and stops all at one step
                self._stopping.clear()
                os.kill(os.getpid(), signal.SIGTERM)
            report(progress)

        import jax

        self._training = True
        try:
            return train(config, run_dir, report=reported, job=self.job)
        except jax.errors.JaxRuntimeError as error:
            if isinstance(self.job, Several) and "RESOURCE_EXHAUSTED" not in str(error):
                self.job.fail(error)  # a collective, so the network or a peer: a death (deaths.py)
            raise
        finally:
            self._training = False
