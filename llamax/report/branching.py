"""Trunks and branches in the ledger: what each run is, and its cost as trained beside its cost as if separate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llamax.report.read import number

if TYPE_CHECKING:
    import pandas as pd

FLOPS = ("flops_6n", "flops_chinchilla", "flops_palm", "flops_causal")
TRAINED = ("trained_tokens", *(f"trained_{name}" for name in FLOPS))
BRANCHING = ("stage", "trunk", "branch_step", *TRAINED)


def branching(config: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns `BRANCHING` of one run, from its config and its row of the ledger (`hash`, `tokens`, `flops_*`).

    A branch took `tokens` - branch_step x batch x seq_len tokens itself, and that part of its FLOPs; any other run took
    all of them. What is not known is nan.
    """
    branch, checkpoint, train = (_section(config, name) for name in ("branch", "checkpoint", "train"))
    step = number(branch.get("step")) if branch else 0.0
    own = (
        row["tokens"] - step * number(train.get("batch_size")) * number(train.get("seq_len")) if step else row["tokens"]
    )
    share = own / row["tokens"] if row["tokens"] > 0 else float("nan")
    is_trunk = bool(checkpoint.get("branch_steps"))
    return {
        "stage": "branch" if branch else "trunk" if is_trunk else "whole",
        "trunk": str(branch.get("trunk"))[-8:] if branch else row["hash"] if is_trunk else None,
        "branch_step": step if branch else float("nan"),
        "trained_tokens": own,
        **{f"trained_{name}": share * row[name] for name in FLOPS},
    }


def costs(frame: pd.DataFrame, convention: str = "6n") -> tuple[float, float]:
    """(as trained, as if separate) training FLOPs of a ledger: trunks once and branches from where they start, against
    every run but the trunks over its whole horizon."""
    trained = frame[f"trained_flops_{convention}"].sum()
    return float(trained), float(frame.loc[frame["stage"] != "trunk", f"flops_{convention}"].sum())


def saving(frame: pd.DataFrame) -> str:
    """Both costs in a sentence."""
    trained, separate = costs(frame)
    return f"as trained {trained:.3g} FLOPs (6n), each horizon from scratch {separate:.3g}"


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    return value if isinstance(value, Mapping) else {}
