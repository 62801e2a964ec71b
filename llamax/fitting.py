"""`llamax fit`: from a study directory or a table of runs to fits, a recommendation and a prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from llamax.report.ledger import ledger
from llamax.scaling import fit_frame, predict, read_table, recommend

LEDGER_COLUMNS = {"n": "n", "d": "tokens", "loss": "eval_loss", "flops": "flops_6n", "budget": "budget"}


def usable_runs(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The finished runs of a ledger that a law may be fitted to, and in words which were left out."""
    words = []
    good = (frame["status"] == "done") & (frame["stage"] != "trunk")
    if (~good).any():
        why = frame["status"].where(frame["status"] != "done", "a trunk: its learning rate has not decayed")
        left = ", ".join(f"{name} ({reason})" for name, reason in zip(frame["run"][~good], why[~good], strict=True))
        words.append(f"left out of the fit: {left}")
    return frame[good], words


def fit_data(
    path: Path,
    columns: dict[str, str | None],
    approaches: list[int],
    *,
    bootstrap: int,
    delta: float,
    seed: int,
    at: float | None,
) -> dict[str, Any]:
    """Fits as a dict: `approach2`, `approach3`, `coupled`, `warnings`, and `at` (allocation, loss) where it is given.

    Raises:
        UserError: no such table, or a table that cannot be fitted.
    """
    words: list[str] = []
    if path.is_dir():
        frame, words = usable_runs(ledger(path))
    else:
        frame = read_table(path)
    usual = {name: LEDGER_COLUMNS[name] for name in ("flops", "budget") if LEDGER_COLUMNS[name] in frame}
    columns = {name: usual.get(name) if column is None else column for name, column in columns.items()}
    fit = fit_frame(frame, tuple(approaches), **columns, bootstrap=bootstrap, delta=delta, seed=seed)  # type: ignore[arg-type]
    result = fit.as_dict() | {"warnings": [*words, *fit.all_warnings()]}
    if at is None:
        return result
    advice = recommend(fit, at)
    if fit.approach3 is None:
        return result | {"at": advice.as_dict()}
    return result | {"at": predict(fit, flops=at, n=advice.n, d=advice.d).as_dict()}


def fit_tables(result: dict[str, Any]) -> list[Any]:
    """What `llamax fit` prints: exponents and parameters with their intervals, valleys, warnings."""
    from rich.table import Table
    from rich.text import Text

    shown: list[Any] = []
    if two := result["approach2"]:
        table = Table(
            "budget", "N at minimum", "D at minimum", "loss", "curvature", "interior", title="Approach 2: valleys"
        )
        for row in two["budgets"]:
            cells = (row.get("budget"), row.get("vertex"), row.get("vertex_d"), row.get("loss"), row.get("curvature"))
            table.add_row(*(_number(c) for c in cells), "yes" if row.get("interior") else "no")
        shown.append(table)
        names = ("n_exponent", "n_coefficient", "d_exponent", "d_coefficient")
        shown.append(
            _parameters(
                "Approach 2: N* = n_coefficient C^n_exponent, and D*", {k: two[k] for k in names}, two["intervals"]
            )
        )
    if three := result["approach3"]:
        shown.append(_parameters("Approach 3: L = E + A/N^alpha + B/D^beta", three["params"], three["intervals"]))
    if coupled := result["coupled"]:
        title = "Coupled law: L = E + (A/N^alpha + B/D^beta)^gamma"
        shown.append(_parameters(title, coupled["params"], coupled["intervals"]))
    if at := result.get("at"):
        advice = at.get("recommendation", at)
        shown.append(
            Text(f"at {at['flops']:.3g} FLOPs: N* = {advice['n']:.4g}, D* = {advice['d']:.4g} ({advice['rule']})")
        )
        if "loss" in at:
            shown.append(
                Text(f"predicted loss {at['loss']:.4f} nats/token, one new run within {_pair(at['interval'])}")
            )
    return shown + [Text(f"warning: {word}", style="yellow") for word in result["warnings"]]


def _parameters(title: str, values: dict[str, Any], intervals: dict[str, Any] | None) -> Any:
    from rich.table import Table

    table = Table("parameter", "value", "95 % interval", title=title)
    for name, value in values.items():
        table.add_row(name, _number(value), _pair((intervals or {}).get(name)))
    return table


def _number(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _pair(pair: Any) -> str:
    return "-" if not pair else f"[{pair[0]:.4g}, {pair[1]:.4g}]"
