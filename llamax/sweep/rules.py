"""Rules to numbers: a cell's batch and peak learning rate from its N and D, each with the sentence that derives it."""

from __future__ import annotations

import math
from typing import Any

from llamax.accounting import count_params
from llamax.config.lr_rules import StepLawBatch
from llamax.config.run import RunConfig, TrainConfig
from llamax.config.sweep import FixedBatch, FixedLr, PowerBatch, PowerLr, Rules
from llamax.errors import UserError
from llamax.sweep.lr_rules import derive


def resolve(config: RunConfig, rules: Rules) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields the rules set in a cell (dotted path -> value) and a sentence for each derived number.

    N is `active_matmul`, D the tokens the horizon asks for before rounding to whole steps.

    Raises:
        UserError: a batch rule in D on a horizon in steps, whose D is itself steps x batch.
    """
    n, train = count_params(config.model).active_matmul, config.train
    sets: dict[str, Any] = {}
    said: dict[str, str] = {}
    batch = train.batch_size
    if rules.batch is not None:
        if train.steps is not None and not isinstance(rules.batch, FixedBatch):
            raise UserError(
                f"rules.batch: kind {rules.batch.kind} needs D, and train.steps={train.steps} fixes D by the batch; "
                "give train.tokens, train.tokens_per_param or train.flops, or a fixed batch"
            )
        batch, said["batch"] = _batch(_as_power(rules.batch), planned_tokens(train, n), train.seq_len)
    if rules.min_steps is not None and train.steps is None:
        fewer = _lowered(batch, rules, planned_tokens(train, n), train.seq_len)
        if fewer != batch:
            before = said.get("batch", f"batch = {batch}")
            said["batch"] = f"{before}; lowered to {fewer} for at least {rules.min_steps} steps"
            batch = fewer
    if batch != train.batch_size or rules.batch is not None:
        sets["train.batch_size"] = batch
    if rules.lr is not None:
        d = train.steps * batch * train.seq_len if train.steps is not None else planned_tokens(train, n)
        if isinstance(rules.lr, FixedLr | PowerLr):
            sets["optimizer.lr"], said["lr"] = _lr(rules.lr, n, d)
        else:
            cell = config.model_copy(update={"train": train.model_copy(update={"batch_size": batch})})
            found = derive(rules.lr, cell, d)
            sets["optimizer.lr"], said["lr"] = found.value, str(found)
    return sets, said


def planned_tokens(train: TrainConfig, n: int) -> float:
    """D as the horizon states it, before rounding to whole steps."""
    if train.flops is not None:
        return train.flops / (6 * n)
    if train.tokens_per_param is not None:
        return train.tokens_per_param * n
    if train.tokens is not None:
        return train.tokens
    return float((train.steps or 0) * train.batch_size * train.seq_len)


def whole_steps(train: TrainConfig, rules: Rules, n: int, flops: float) -> tuple[int, int]:
    """Steps and tokens of a cell of `n` parameters with a budget of `flops`: what `resolve` and `horizon` come to."""
    tokens, batch = flops / (6 * n), train.batch_size
    if rules.batch is not None:
        batch = _batch(_as_power(rules.batch), tokens, train.seq_len)[0]
    if rules.min_steps is not None:
        batch = _lowered(batch, rules, tokens, train.seq_len)
    steps = round(tokens / (batch * train.seq_len))
    return steps, steps * batch * train.seq_len


def _lr(rule: FixedLr | PowerLr, n: int, d: float) -> tuple[float, str]:
    if isinstance(rule, FixedLr):
        return rule.value, f"lr = {rule.value:g}, fixed"
    raw = rule.coefficient * n**rule.n_exponent * d**rule.d_exponent
    kept = min(max(raw, rule.min or 0.0), rule.max or math.inf)
    lr = float(f"{kept:.3g}")
    symbols, values = f"{rule.coefficient:g}", f"{rule.coefficient:g}"
    for symbol, value, power in (("N", n, rule.n_exponent), ("D", d, rule.d_exponent)):
        if power:
            symbols += f" x {symbol}^{power:g}"
            values += f" x {value:,.0f}^{power:g}"
    bound = "" if kept == raw else f", kept within [{rule.min or 0:g}, {rule.max or math.inf:g}]"
    return lr, f"lr = {symbols} = {values} = {raw:.4g}{bound}; three digits: {lr:g}"


def _as_power(rule: FixedBatch | PowerBatch | StepLawBatch) -> FixedBatch | PowerBatch:
    if not isinstance(rule, StepLawBatch):
        return rule
    law = {"coefficient": 0.58, "d_exponent": 0.571, "unit": "tokens", "min": rule.min, "max": rule.max}
    return PowerBatch(kind="power_law", **law)  # type: ignore[arg-type]


def _batch(rule: FixedBatch | PowerBatch, d: float, seq_len: int) -> tuple[int, str]:
    if isinstance(rule, FixedBatch):
        return rule.value, f"batch = {rule.value} sequences, fixed"
    raw = rule.coefficient * d**rule.d_exponent
    sequences = raw / seq_len if rule.unit == "tokens" else raw
    batch = max(_rounded(sequences, rule.multiple), rule.min)
    batch = batch if rule.max is None else min(batch, rule.max)
    c, power = f"{rule.coefficient:g}", f"{rule.d_exponent:g}"
    law = f"batch = {c} x D^{power} = {c} x {d:,.0f}^{power} = {raw:.4g}"
    unit = f" tokens / {seq_len} = {sequences:.4g} sequences" if rule.unit == "tokens" else " sequences"
    grid = "nearest power of two" if rule.multiple == "power_of_two" else f"nearest multiple of {rule.multiple}"
    within = f" within [{rule.min}, {rule.max if rule.max is not None else 'inf'}]"
    return batch, f"{law}{unit}; {grid}{within}: {batch}"


def _rounded(sequences: float, multiple: int | str) -> int:
    if isinstance(multiple, int):
        return max(1, round(sequences / multiple)) * multiple
    return 1 << max(0, round(math.log2(sequences)))


def _lowered(batch: int, rules: Rules, tokens: float, seq_len: int) -> int:
    """The batch, lowered on the rule's grid (halved without one) until there are `min_steps` steps, or to its floor."""
    rule = None if rules.batch is None else _as_power(rules.batch)
    multiple = rule.multiple if isinstance(rule, PowerBatch) else "power_of_two"
    floor = rule.min if isinstance(rule, PowerBatch) else 1
    while round(tokens / (batch * seq_len)) < (rules.min_steps or 0):
        fewer = batch - multiple if isinstance(multiple, int) else batch // 2
        if fewer < max(floor, 1):
            break
        batch = fewer
    return batch
