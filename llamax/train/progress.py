"""Where a training run is: what the loop reports and what workers, status and live views show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report of a run.

    `step` of `steps` and `tokens` are done; `loss` is the newest, in nats per token; `seconds_left` estimates the time
    to the end of the run; `phase` is a word for what goes on ("compiling", "training", "evaluating", ...). None: not
    known yet.
    """

    step: int
    steps: int
    tokens: int
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    phase: str
