"""What `llamax fit` prints for a person: parameters with their intervals, valleys, the answer, warnings."""

from __future__ import annotations

from typing import Any

TITLES = {
    "chinchilla": "Approach 3: L = E + A/N^alpha + B/D^beta",
    "coupled": "Coupled law: L = E + (A/N^alpha + B/D^beta)^gamma",
}
POWER_LAWS = ("n_exponent", "n_coefficient", "d_exponent", "d_coefficient")


def fit_tables(result: dict[str, Any]) -> list[Any]:
    """Rich renderables of a result of `llamax.fitting.fit_data`, none wider than 100 columns."""
    from rich.text import Text

    shown: list[Any] = []
    if two := result.get("approach2"):
        shown += [_valleys(two), _parameters("Approach 2: N* = n_coefficient C^n_exponent, and D*", two, POWER_LAWS)]
    if result.get("approaches") == [1]:
        shown.append(_parameters("Approach 1: N* = n_coefficient C^n_exponent, and D*", result, POWER_LAWS))
    sections = [(name, result.get(key)) for name, key in (("chinchilla", "approach3"), ("coupled", "coupled"))]
    for name, record in sections:
        if record:
            shown += [_parameters(TITLES[name], record, tuple(record["params"])), Text(_how(record))]
    if "formula" in result:
        shown += [
            _parameters(f"{result['law']}: {result['formula']}", result, tuple(result["params"])),
            Text(_how(result)),
        ]
    for name, found in (result.get("profile") or {}).items():
        low, high = (_number(end) if end is not None else "open" for end in found["interval"])
        shown.append(Text(f"profile likelihood of {name}: 95 % within [{low}, {high}] (independent runs of one scale)"))
    if at := result.get("at"):
        shown += _answer(result, at)
        shown += _beyond(result)
    elif "n_opt" in result:
        at_optimum = ("n_opt", "d_opt", "tokens_per_param", "loss")
        shown.append(_parameters("At the optimum of these FLOPs", {**result, "params": None}, at_optimum))
    return shown + [Text(f"warning: {word}", style="yellow") for word in result["warnings"]]


def _valleys(two: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(
        "budget", "N at minimum", "D at minimum", "loss", "curvature", "interior", title="Approach 2: valleys"
    )
    for row in two["budgets"]:
        cells = (row.get("budget"), row.get("vertex"), row.get("vertex_d"), row.get("loss"), row.get("curvature"))
        table.add_row(*(_number(c) for c in cells), "yes" if row.get("interior") else "no")
    return table


def _parameters(title: str, record: dict[str, Any], names: tuple[str, ...]) -> Any:
    from rich.table import Table

    table = Table("parameter", "value", "95 % interval", title=title, min_width=min(len(title), 100))
    values = {**record, **(record.get("params") or {})}
    for name in names:
        table.add_row(name, _number(values[name]), _pair((record.get("intervals") or {}).get(name)))
    return table


def _how(record: dict[str, Any]) -> str:
    """By what rule the parameters were made, and how sure the search is."""
    words = (
        f"minimum of the {record['objective_rule']} over {record['n_points']} runs: {record['objective']:.6g}; "
        f"{record['starts_at_best']} of {record['starts']} starts reached it"
    )
    if record.get("condition") is not None:
        words += f"; condition number {record['condition']:.3g}"
    if record.get("holdout_error_percent") is not None:
        words += f"; fitted without the largest compute it misses that by {record['holdout_error_percent']:.2g} %"
    return words


def _answer(result: dict[str, Any], at: dict[str, Any]) -> list[Any]:
    from rich.table import Table
    from rich.text import Text

    target = at["target"]
    table = Table("at the optimum", "value", "95 % interval", title=f"At {target['flops']:.4g} training FLOPs")
    for name, what in (
        ("n_opt", "N*, parameters"),
        ("d_opt", "D*, tokens"),
        ("tokens_per_param", "tokens per parameter"),
        ("loss", "loss, nats per token"),
    ):
        table.add_row(what, _number(result[name]), _pair(result["intervals"].get(name)))
    shown: list[Any] = [table, Text(target["rule"])]
    if regret := result.get("regret"):
        shown.append(
            Text(
                f"if a bootstrap draw is the truth, this choice loses {_number(regret['extra_loss'])} nats in the "
                f"middle draw and {_number(regret['extra_loss_95'])} in one of twenty, which waste "
                f"{100 * regret['wasted_compute']:.2g} % and {100 * regret['wasted_compute_95']:.2g} % of the compute"
            )
        )
    if claim := at.get("prediction"):
        advice = claim["recommendation"]
        shown.append(Text(f"recommended: N = {_number(advice['n'])}, D = {_number(advice['d'])} ({advice['rule']})"))
        span = _pair(claim["interval"])
        shown.append(Text(f"its loss: {claim['loss']:.4f} nats per token, one new run within {span}"))
    return shown


def _beyond(result: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    shown: list[Any] = []
    if served := result.get("served"):
        shown.append(
            Text(
                f"served: N = {_number(served['n'])}, D = {_number(served['d'])}, {100 * served['saving']:.3g} % less "
                f"than N*, D* in all ({served['rule']})"
            )
        )
    if limited := result.get("limited"):
        shown.append(
            Text(
                f"limited data: N = {_number(limited['n'])}, {limited['epochs']:.3g} epochs, loss "
                f"{limited['loss']:.4f} ({limited['rule']})"
            )
        )
    return shown


def _number(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _pair(pair: Any) -> str:
    return "-" if not pair else f"[{pair[0]:.4g}, {pair[1]:.4g}]"
