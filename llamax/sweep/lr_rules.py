"""What each published learning-rate rule gives for a run, as an object that prints its derivation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llamax.accounting import count_params
from llamax.config.lr_rules import Marin, Nanochat, SqrtBatch, StepLaw
from llamax.config.run import RunConfig

LrRule = StepLaw | SqrtBatch | Marin | Nanochat


@dataclass(frozen=True)
class Derived:
    """A number and how it came about; `str` is the sentence, with its formula, its numbers and its source."""

    value: float
    formula: str
    numbers: str
    raw: float
    source: str
    note: str = ""

    def __str__(self) -> str:
        kept = f"{self.raw:.4g}, {self.note}" if self.note else f"{self.raw:.4g}"
        return f"lr = {self.formula} = {self.numbers} = {kept}; three digits: {self.value:g} ({self.source})"


def derive(rule: LrRule, config: RunConfig, tokens: float) -> Derived:
    """The peak learning rate that `rule` gives a run of its model, batch and optimizer over `tokens` tokens."""
    batch = config.train.batch_size * config.train.seq_len
    width = config.model.d_model
    match rule:
        case StepLaw():
            n = inner_parameters(config)
            raw = 1.79 * n**-0.713 * tokens**0.307
            numbers = f"1.79 x {n:,}^-0.713 x {tokens:,.0f}^0.307"
            return _rounded("1.79 N^-0.713 D^0.307", numbers, raw, "Step Law, arXiv:2503.04715; N: no tables", rule.max)
        case SqrtBatch():
            raw = rule.lr * math.sqrt(batch / rule.batch_tokens)
            numbers = f"{rule.lr:g} x ({batch:,} / {rule.batch_tokens:,.0f})^0.5"
            return _rounded("lr0 (B / B0)^0.5", numbers, raw, "square root, arXiv:2205.10287; B in tokens")
        case Marin():
            sequences = batch / rule.seq_len
            raw = rule.constant * math.sqrt(sequences) / width
            numbers = f"{rule.constant:g} x {sequences:g}^0.5 / {width}"
            source = f"marin, c_adamc.py; B in sequences of {rule.seq_len}"
            return _rounded("c B^0.5 / d_model", numbers, raw, source, rule.max)
        case Nanochat():
            raw = rule.lr * math.sqrt(batch / rule.batch_tokens)
            formula, numbers = "lr0 (B / B0)^0.5", f"{rule.lr:g} x ({batch:,} / {rule.batch_tokens:,.0f})^0.5"
            if config.optimizer.kind != "muon":
                raw *= (width / rule.width) ** -0.5
                formula, numbers = f"{formula} (d_model / d0)^-0.5", f"{numbers} x ({width} / {rule.width})^-0.5"
            return _rounded(formula, numbers, raw, "nanochat, base_train.py and gpt.py; B in tokens")


def inner_parameters(config: RunConfig) -> int:
    """Parameters without embeddings, learned positions and head: the N of Step Law."""
    params = count_params(config.model)
    return params.total - params.embedding - params.position - params.head


def _rounded(formula: str, numbers: str, raw: float, source: str, most: float | None = None) -> Derived:
    kept = raw if most is None else min(raw, most)
    note = f"kept at most {most:g}" if kept != raw else ""
    return Derived(float(f"{kept:.3g}"), formula, numbers, raw, source, note)
