"""From the one horizon a config gives to steps, tokens and FLOPs, with the derivation in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamax.accounting.flops import training_flops_per_token
from llamax.accounting.params import count_params
from llamax.config.horizons import HORIZONS
from llamax.errors import UserError

if TYPE_CHECKING:
    from llamax.config.run import RunConfig


@dataclass(frozen=True)
class Horizon:
    """How long a run is.

    `tokens` = steps x batch_size x seq_len, what is really trained on; `n` the model size N (active_matmul);
    `tokens_per_param` = tokens / n; `flops` training FLOPs of the whole run by convention; `rule` how steps came about.
    A branch's are those of the whole horizon, its trunk's part included; `trained_tokens` leaves that part out.
    """

    steps: int
    tokens: int
    n: int
    tokens_per_param: float
    flops: dict[str, float]
    rule: str
    trained_tokens: int


def horizon(config: RunConfig) -> Horizon:
    """Resolves the horizon of `config.train` to whole steps (rounded to the nearest).

    Raises:
        UserError: the horizon is less than one step, or ends before its warmup or the start of the branch.
    """
    train, n = config.train, count_params(config.model).active_matmul
    per_step = train.batch_size * train.seq_len
    name = next(h for h in HORIZONS if getattr(train, h) is not None)
    given = getattr(train, name)
    if name == "steps":
        steps, rule = given, f"steps = {given:,}, as given; D = steps x batch x seq = {given * per_step:,} tokens"
    else:
        tokens, why = _tokens(name, given, n)
        steps = round(tokens / per_step)
        rule = f"{why}; steps = round(D / ({train.batch_size} x {train.seq_len})) = {steps:,}"
    if steps < 1:
        raise UserError(
            f"train.{name}={given:g} is less than one step of {per_step:,} tokens "
            f"(train.batch_size={train.batch_size} x train.seq_len={train.seq_len}); "
            f"raise it or lower the batch ({rule})"
        )
    _check_phases(config, steps)
    tokens = steps * per_step
    before = 0 if config.branch is None else config.branch.step * per_step
    flops = {
        convention: value * tokens
        for convention, value in training_flops_per_token(config.model, train.seq_len).items()
    }
    return Horizon(steps, tokens, n, tokens / n, flops, rule, tokens - before)


def _check_phases(config: RunConfig, steps: int) -> None:
    schedule, branch = config.schedule, config.branch
    warmup = schedule.warmup_steps
    if warmup is not None and warmup > steps:
        raise UserError(f"schedule.warmup_steps={warmup} is longer than the {steps:,} steps of the horizon; change one")
    if warmup is not None and schedule.kind == "wsd" and warmup + round(schedule.decay * steps) > steps:
        raise UserError(
            f"schedule.warmup_steps={warmup} and schedule.decay={schedule.decay:g} of {steps:,} steps "
            f"({round(schedule.decay * steps):,}) are longer than the horizon; lower one or raise the horizon"
        )
    if branch is not None and branch.step >= steps:
        raise UserError(
            f"branch.step={branch.step:,} is not before the end of the horizon, {steps:,} steps; "
            "branch earlier or raise the horizon"
        )


def _tokens(name: str, given: float, n: int) -> tuple[float, str]:
    """Tokens D for a horizon that is not steps, and the sentence that says why."""
    if name == "flops":
        tokens = given / (6 * n)
        return tokens, f"D = C / (6 N) = {given:g} / (6 x {n:,}) = {tokens:,.0f} tokens"
    if name == "tokens_per_param":
        return given * n, f"D = {given:g} N = {given:g} x {n:,} = {given * n:,.0f} tokens"
    return given, f"D = {given:,.0f} tokens, as given"
