"""Where a training run is: what the loop reports and what workers, status and live views show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report of a run.

    `step` of `steps` and `tokens` are done; `loss` is the newest in nats per token; `seconds_left` an estimate of the time
    to the end of the run; `phase` says what is going on ("data", "compile", "train", "eval", "save", ...). None: not known yet.
    """

    step: int
    steps: int
    tokens: int
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    phase: str
