"""The sweep behind a transfer study: learning rates x sizes x parametrizations x seeds, and its runs as one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamax.config.ladder import ladder_model
from llamax.config.load import validate
from llamax.config.sweep import SweepConfig
from llamax.errors import UserError
from llamax.sweep.study import failure_path, read_json, read_study

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("standard", "mup", "completep")


def transfer_spec(
    *,
    widths: Sequence[int],
    depths: Sequence[int],
    lrs: Sequence[float],
    parametrizations: Sequence[str] = KINDS,
    seeds: int = 2,
    base: str | dict[str, Any] = "quickstart",
    base_width: int | None = None,
    base_depth: int | None = None,
    overrides: Sequence[str] = (),
) -> SweepConfig:
    """Ladder models of several `widths` or several `depths` (not both), each at every learning rate and seed.

    The base of muP and CompleteP is `base_width` x `base_depth`, by default the smallest of each, with the head_dim of
    the ladder at that width. Every cell trains as many tokens, as `base` and `overrides` say.

    Raises:
        UserError: sizes vary in both ways or in none, fewer than three rates, or an unknown parametrization.
    """
    if (len(widths) > 1) == (len(depths) > 1):
        raise UserError(
            f"widths {list(widths)} and depths {list(depths)}: give several of one and one of the other, so that the "
            "optimum can be followed along it"
        )
    for name, values, least in (("widths", widths, 1), ("depths", depths, 1), ("lrs", lrs, 3)):
        if len(set(values)) < max(least, len(values)) or min(values) <= 0:
            need = f"{least} or more different positive numbers"
            raise UserError(f"{name} {list(values)}: give {need}")
    if odd := [name for name in parametrizations if name not in KINDS] or [""] * (not parametrizations):
        raise UserError(f"parametrization {odd[0]!r}: choose among {', '.join(KINDS)}")
    shape = {"base_width": base_width or min(widths), "base_depth": base_depth or min(depths)}
    if odd_width := [w for w in (*widths, shape["base_width"]) if w % 8]:
        raise UserError(f"width {odd_width[0]}: ladder widths are multiples of 8")
    own = ladder_model(f"ladder/d{shape['base_width']}") or {}
    rules = {
        "standard": {"kind": "standard"},
        "mup": {
            "kind": "mup",
            "base_width": shape["base_width"],
            "base_head_dim": own["attention"]["head_dim"],
        },
    }
    rules["completep"] = {**rules["mup"], "kind": "completep", "base_depth": shape["base_depth"]}
    sizes: dict[str, list[Any]] = {
        "model.base": [f"ladder/d{width}" for width in sorted(widths)],
        "model.segments.0.repeat": sorted(depths),
    }
    one = [f"{path}={values[0]}" for path, values in sizes.items() if len(values) == 1]
    several = {path: values for path, values in sizes.items() if len(values) > 1}
    axes: list[dict[str, Any]] = [
        {"kind": "product", "fields": {"model.parametrization": [rules[name] for name in parametrizations]}},
        {"kind": "product", "fields": several},
        {"kind": "product", "fields": {"optimizer.lr": sorted(lrs)}},
        {"kind": "seeds", "count": seeds},
    ]
    data = {"name": "lr-transfer", "base": base, "overrides": [*one, *overrides], "axes": axes}
    return validate(SweepConfig, data, "lr-transfer")


def transfer_runs(study: Path) -> pd.DataFrame:
    """One row a cell of a transfer study: parametrization, width, depth, lr, seed, n, tokens, flops_6n, seconds,
    status ("done", "diverged", "failed", "pending") and loss (held out, nats per token; nan unless done).

    Raises:
        UserError: no study.
    """
    import pandas as pd

    rows = []
    for cell in read_study(study).cells:
        model = cell.config.model
        result = read_json(study / cell.run_name / "result.json")
        failed = failure_path(study, cell.name).exists()
        status = result.get("status", "done") if result else ("failed" if failed else "pending")
        row = {
            "parametrization": model.parametrization.kind,
            "width": model.d_model,
            "depth": len(model.layers),
            "lr": cell.lr,
            "seed": cell.config.train.seed,
            "n": cell.n,
            "tokens": cell.tokens,
            "flops_6n": cell.flops["6n"],
            "seconds": (result or {}).get("seconds"),
            "status": status,
            "loss": (result or {}).get("eval_loss") if status == "done" else None,
        }
        rows.append(row)
    return pd.DataFrame(rows).astype({"loss": float, "seconds": float})
