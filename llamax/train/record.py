"""What a run says of itself: the numbers of a logged row, of the result, and why it diverged. No effects."""

from __future__ import annotations

import math
from typing import Any

from llamax.accounting.bits import bits_per_byte
from llamax.accounting.horizon import Horizon
from llamax.accounting.params import count_params
from llamax.accounting.peaks import mfu
from llamax.config.run import RunConfig
from llamax.data.batches import TrainBatches
from llamax.train.setup import Common


class Record:
    """The numbers of one run: steps, rates and losses in, rows of metrics.jsonl and result.json out."""

    def __init__(self, config: RunConfig, length: Horizon, common: Common, batches: TrainBatches) -> None:
        self.config, self.store, self.batches = config, common.store, batches
        self.tokens_per_step = config.train.batch_size * config.train.seq_len
        self.flops_per_token = {name: total / length.tokens for name, total in length.flops.items()}
        self.devices, self.device_kind = common.mesh.size, common.mesh.devices.flat[0].device_kind

    def row(self, step: int, metrics: dict[str, float], rate: float, seconds: float) -> dict[str, Any]:
        """A row of metrics.jsonl: step `step` done, at `rate` tokens a second, `seconds` after the start."""
        tokens = step * self.tokens_per_step
        row: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            **metrics,
            "tokens_per_second": rate,
            "seconds": seconds,
        }
        row |= {f"flops_{name}": per_token * tokens for name, per_token in self.flops_per_token.items()}
        dtype = self.config.train.compute_dtype
        found = mfu(self.flops_per_token["causal"] * rate, self.device_kind, self.devices, dtype)
        return (
            row
            if found is None
            else {**row, "mfu": found.fraction, "mfu_convention": "causal", "mfu_peak": found.peak_flops_per_second}
        )

    def evaluation(self, step: int, loss: float, tokens: int, seconds: float) -> dict[str, Any]:
        """A row of evals.jsonl: `loss` over `tokens` held-out tokens."""
        row = {"step": step, "tokens": step * self.tokens_per_step, "loss": loss, "eval_tokens": tokens}
        return {**row, "bits_per_byte": self.bits_per_byte(loss), "seconds": seconds}

    def diverged(self, row: dict[str, Any]) -> str | None:
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

    def bits_per_byte(self, loss: float) -> float:
        """Held-out bits per byte of `loss` nats per token."""
        return bits_per_byte(loss, self.store.tokens("held_out"), self.store.bytes("held_out"))

    def result(self, step: int, cause: str | None, loss: float, tokens: int) -> dict[str, Any]:
        """The part of result.json that follows from steps and losses."""
        params = count_params(self.config.model)
        seen = step * self.tokens_per_step
        return {
            "status": "diverged" if cause else "done",
            "cause": cause,
            "compute_dtype": self.config.train.compute_dtype,
            "steps": step,
            "tokens": seen,
            "eval_loss": loss,
            "eval_bits_per_byte": self.bits_per_byte(loss),
            "eval_tokens": tokens,
            "params_total": params.total,
            "params_active": params.active,
            "n": params.active_matmul,
            **{f"flops_{name}": per_token * seen for name, per_token in self.flops_per_token.items()},
            "unique_tokens": self.batches.unique_tokens(step),
            "epochs": self.batches.epochs(step),
            "fingerprint": self.store.fingerprint,
        }
