"""Published learning-rate rules as data: what each one's formula leaves open. `llamax/sweep/lr_rules.py` derives."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from llamax.config.base import Frozen


class StepLaw(Frozen):
    """Peak learning rate = 1.79 N^-0.713 D^0.307, N without embeddings and head (Step Law, arXiv:2503.04715).

    Fitted on AdamW, cosine to a fixed final rate of 1e-5, models of 60 million to a billion parameters and batches near
    `0.58 D^0.571` tokens; below that it extrapolates. `max` caps it.
    """

    kind: Literal["step_law"]
    max: PositiveFloat | None = None


class SqrtBatch(Frozen):
    """Peak learning rate = lr sqrt(B / batch_tokens), B the batch in tokens: the square-root rule of adaptive methods
    (arXiv:2205.10287). `lr` is the best one known at `batch_tokens`."""

    kind: Literal["sqrt_batch"]
    lr: PositiveFloat
    batch_tokens: PositiveFloat


class Marin(Frozen):
    """Peak learning rate = constant sqrt(B) / d_model, B in sequences of `seq_len` tokens, at most `max`.

    marin-community/marin, experiments/scaling_law_sweeps/c_adamc.py, CAdamCRecipe (lr_constant, max_learning_rate); its
    sequences have 4096 tokens. There a batch is halved until the rate is below the cap; here the rate is capped.
    """

    kind: Literal["marin"]
    constant: PositiveFloat = 0.33
    seq_len: PositiveInt = 4096
    max: PositiveFloat = 0.01


class Nanochat(Frozen):
    """Peak learning rate = lr sqrt(B / batch_tokens) (d_model / width)^-0.5, B the batch in tokens.

    karpathy/nanochat, scripts/base_train.py (batch_lr_scale; B_REF = 2^19 tokens) and nanochat/gpt.py, setup_optimizer
    (dmodel_lr_scale, at 768). `lr` is the best one known at both. There Muon's matrices do not follow the width, and so
    with optimizer.kind=muon the last factor is left out.
    """

    kind: Literal["nanochat"]
    lr: PositiveFloat
    batch_tokens: PositiveFloat = 524288
    width: PositiveInt = 768


class StepLawBatch(Frozen):
    """Batch = 0.58 D^0.571 tokens (Step Law, arXiv:2503.04715), as the nearest power of two of sequences within
    [min, max]."""

    kind: Literal["step_law"]
    min: PositiveInt = 1
    max: PositiveInt | None = None
