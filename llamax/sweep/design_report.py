"""What is said about a chosen design: plain data for plan.json, and tables of 100 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llamax.config.sweep import Design
from llamax.sweep.expand import exponent
from llamax.sweep.tables import plain_table, si

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llamax.scaling.laws import Law
    from llamax.sweep.design import Judged

SHOWN = 10  # rows of the table


def tokens_per_param(law: Law, budgets: Sequence[float]) -> float:
    """D* / N* of the law at the geometric middle of some budgets, three digits."""
    from llamax.scaling.laws import optimal_allocation

    middle = math.exp(sum(math.log(c) for c in budgets) / len(budgets))
    return float(f"{optimal_allocation(law, middle).tokens_per_param:.3g}")


def report(design: Design, law: Law, total: float, judged: Sequence[Judged], considered: int) -> dict[str, Any]:
    """Plain data of a choice: `chosen`, `table` (it and others), `considered`, `prior`, `target`, `rules`."""
    from llamax.scaling.design import regret
    from llamax.scaling.laws import optimal_allocation, plain

    chosen = judged[0]
    errors = chosen.simulated or chosen.errors
    wasted = {f"approach{k}": plain(regret(law, design.target_flops, e)) for k, e in errors.items()}
    return {
        "prior": law.as_dict(),
        "seed_noise": design.seed_noise,
        "minimize": design.minimize,
        "approaches": list(design.approaches),
        "total_flops": total,
        "target": optimal_allocation(law, design.target_flops).as_dict(),
        "considered": considered,
        "chosen": chosen.as_dict() | {"regret": wasted},
        "table": [one.as_dict() for one in judged[:SHOWN]],
        "rules": _rules(design, total),
    }


def _rules(design: Design, total: float) -> dict[str, str]:
    what = "predicted loss" if design.minimize == "loss" else "best size N*"
    factor, places = design.centre_factor, ""
    if factor > 1:
        places = f";\n    the optimum where the prior has it, and {factor:g}x above and below"
    approaches = " and ".join(f"A{k}" for k in design.approaches)
    return {
        "design": "design = budgets x sizes a budget x seeds; budgets even in log C; A2, A3 = approach 2, 3",
        "sizes": "sizes even in log N, from the prior's N* / reach to N* x reach, snapped to the ladder",
        "cost": f"cost = 6 N D of whole steps, together at most {total:.4g} FLOPs",
        "bias": "bias = what the approach finds without noise, less the truth of the prior, in %",
        "sd": f"sd = its spread from {100 * design.seed_noise:g} % seed noise, by derivatives, in %",
        "simulated": f"simulated = median and spread of {design.draws} noisy studies, each refitted",
        "error": f"error = root mean square of bias and sd of the {what}, {approaches}{places}",
    }


def design_tables(found: Mapping[str, Any]) -> list[RenderableType]:
    """What a designed plan prints before its cells: the designs considered, the one chosen, the rules."""
    from rich.text import Text

    names = list(found["chosen"]["expected"])
    target = found["target"]
    columns = ("design", "budgets", "reach", "runs")
    errors = [f"{what} A{name[-1]}" for what in ("N*", "loss") for name in names]
    title = f"Designs of {found['total_flops']:.3g} FLOPs: bias ± sd in % at {target['flops']:.3g} FLOPs"
    shown = plain_table(*columns, *errors, "error", title=title)
    chosen = found["chosen"]
    for row in found["table"]:
        first = all(row[k] == chosen[k] for k in ("budgets", "sizes", "replicates"))
        style = "bold" if first else None
        shown.add_row(*_about(row), *_errors(row["expected"], names), _percent(row["error"]), style=style)
        if row["simulated"]:
            cells = (*_errors(row["simulated"], names), _percent(row["simulated_error"]) or "none")
            shown.add_row("simulated", "", "", "", *cells, style=style)
    lines = [Text("Rules of the design", style="bold"), *(Text(f"  {rule}") for rule in found["rules"].values())]
    return [shown, Text(_verdict(found)), *lines]


def _verdict(found: Mapping[str, Any]) -> str:
    chosen, target = found["chosen"], found["target"]
    budgets = ", ".join(exponent(c) for c in chosen["budgets"])
    lost = ", ".join(f"{100 * v:.2g} % (A{k[-1]})" for k, v in chosen["regret"].items() if v is not None)
    return (
        f"Chosen of {found['considered']:,}: budgets {budgets}; {chosen['runs']} runs, "
        f"{chosen['flops_6n']:.4g} FLOPs.\n"
        f"The prior at {exponent(target['flops'])}: N* = {si(target['n'])}, D* = {si(target['d'])}, loss "
        f"{target['loss']:.4f}.\n"
        f"Training the N* found, not the true one, is expected to add to it {lost or 'an unknown part'}."
    )


def _about(row: Mapping[str, Any]) -> tuple[str, ...]:
    counts = f"{len(row['budgets'])}x{len(row['sizes'][0])}x{row['replicates']}"
    ends = (exponent(float(f"{row['budgets'][i]:.2g}")) for i in (0, -1))
    return counts, "-".join(ends), f"{row['width']:g}x", str(row["runs"])


def _errors(errors: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """`bias±sd` in per cent, of N* by each approach, then of the loss."""
    cells = []
    for what in ("n", "loss"):
        for name in names:
            bias, sd = errors[name][f"{what}_bias"], errors[name][f"{what}_sd"]
            cells.append("none" if bias is None or sd is None else f"{_percent(bias, '+')}±{_percent(sd)}")
    return cells


def _percent(value: float | None, sign: str = "") -> str:
    """Two digits, never an exponent: 0.052, 3.1, 12, 240."""
    if value is None:
        return ""
    two = float(f"{100 * value:.2g}")
    if abs(two) < 1e-3:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(max(abs(two), 1e-2))))
    return f"{two:{sign}.{digits}f}"


def next_tables(found: Mapping[str, Any]) -> list[RenderableType]:
    """What `llamax sweep next` prints: the sizes, why they are where they are, the error before and after."""
    from rich.text import Text

    title = f"Next budget: {exponent(found['flops'])} FLOPs, {found['seeds']} seed{'s' * (found['seeds'] != 1)} a size"
    shown = plain_table("size", "N", "N / N*", "D", "D/N", title=title)
    for size, n, tokens in zip(found["sizes"], found["n"], found["tokens"], strict=True):
        shown.add_row(size, si(n), f"{n / found['n_opt']:.3g}", si(tokens), f"{tokens / n:.3g}")
    pair = found["n_interval"]
    between = "" if pair is None else f", 95 % interval {si(pair[0])} to {si(pair[1])}"
    lines = [f"N* = {si(found['n_opt'])}{between}: {found['rule']}", f"cost = {found['cost']:.4g} FLOPs (6 N D)"]
    renderables: list[RenderableType] = [shown, *map(Text, lines)]
    if found["before"]:
        names = list(found["before"])
        columns = [f"{what} A{name[-1]}" for what in ("N*", "loss") for name in names]
        errors = plain_table("runs", *columns, title=f"Bias ± sd in % at {exponent(found['target'])} FLOPs, expected")
        for label, key in (("those finished", "before"), ("with the next", "after")):
            errors.add_row(label, *_errors(found[key], names))
        renderables.append(errors)
        renderables.append(Text(f"sd from {100 * found['noise']:.2g} % noise of a run; the law fitted so far as truth"))
    else:
        renderables.append(
            Text("expected errors: none yet; they need a law (three budgets, or a designed study's prior)")
        )
    return renderables + [Text(f"warning: {word}", style="yellow") for word in found["warnings"]]
