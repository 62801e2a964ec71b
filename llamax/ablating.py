"""`llamax ablate`: plan, run, report; everything heavy imported inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamax.console import AtHand, Json, NewAtHand, Overrides, print_json, show
from llamax.errors import UserError
from llamax.sweeping import Packing, SweepSpec, opened, planned, train_cells

if TYPE_CHECKING:
    from rich.table import Table

    from llamax.scaling import Ablation
    from llamax.sweep.plan import Plan

app = typer.Typer(no_args_is_help=True, help="Ablate components against a base: matched, paired by seed, tested.")
COLUMNS_A_TABLE = 4


@app.command("plan")
def ablate_plan(
    spec: SweepSpec,
    overrides: Overrides = None,
    out: Annotated[Path | None, NewAtHand(help="Write the plan as a study directory, ready to run.")] = None,
    corpus_tokens: Annotated[int | None, typer.Option(help="Training tokens of the corpus, for epochs.")] = None,
    as_json: Json = False,
) -> None:
    """Every variant at every size: parameters and FLOPs before and after matching, and what could be detected."""
    from llamax.sweep.study import open_study

    plan = _planned(spec, overrides, corpus_tokens)
    if out is not None:
        open_study(out, plan)
    power = _power(plan)
    if as_json:
        print_json(plan.as_dict() | {"power": power})
    else:
        show(*plan_tables(plan, power))


@app.command("run")
def ablate_run(
    spec: SweepSpec,
    overrides: Overrides = None,
    directory: Annotated[Path | None, NewAtHand("--dir", help="Study directory; default runs/<name>.")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes on this machine.")] = 1,
    retry_failed: Annotated[bool, typer.Option(help="Try failed cells again.")] = False,
    pack: Packing = "auto",
    as_json: Json = False,
) -> None:
    """Train every variant, size and seed; the same command continues, and several may race on one study."""
    from llamax.sweep.packing import parse_pack

    how = parse_pack(pack)
    train_cells(opened(spec, overrides, directory, _planned), workers, retry_failed, how, as_json)


@app.command("report")
def ablate_report(
    study: Annotated[Path, AtHand(metavar="DIR", help="A study directory, or its runs as .parquet or .csv.")],
    sizes: Annotated[str | None, typer.Option(help="Only these sizes, comma-separated.")] = None,
    unit: Annotated[str, typer.Option(help="nats, or log for differences of log loss.")] = "nats",
    flops: Annotated[str, typer.Option(help="Column of the compute that gains are counted in.")] = "flops_causal",
    out: Annotated[Path | None, typer.Option(help="Write the runs as .parquet or .csv.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the page here; default ablation.html in the study.")] = None,
    as_json: Json = False,
) -> None:
    """Effects with intervals, noise and power, compute-equivalent gain and its trend; and a page with the figures."""
    from llamax.report.ablation import ablation_page, ablation_runs
    from llamax.report.ledger import save_ledger
    from llamax.scaling import ablation
    from llamax.storage.files import write_atomic

    runs = ablation_runs(study)
    if sizes is not None:
        wanted = sizes.split(",")
        if absent := [size for size in wanted if size not in set(runs["size"])]:
            raise UserError(f"--sizes {absent[0]}: sizes are {', '.join(dict.fromkeys(map(str, runs['size'])))}")
        runs = runs[runs["size"].isin(wanted)]
    found = ablation(runs, unit=unit, flops=flops)
    if out is not None:
        save_ledger(runs, out)
    where = page or (study if study.is_dir() else study.parent) / "ablation.html"
    write_atomic(where, ablation_page(study.resolve().stem, found))
    if as_json:
        print_json(found.as_dict() | {"page": str(where)})
    else:
        show(*report_tables(found), f"page: {where}")


def _planned(name: str, overrides: list[str] | None, corpus_tokens: int | None) -> Plan:
    plan = planned(name, overrides, corpus_tokens)
    if plan.spec.ablate is None:
        raise UserError(
            f"{name}: a sweep without `ablate`; add ablate: {{norm: [...], mlp: [...], seeds: 3}}, or use llamax sweep"
        )
    return plan


# ---------------------------------------------------------------- tables
def _power(plan: Plan) -> dict[str, Any]:
    """What a comparison at one size could detect, in units of the noise of a paired run."""
    from llamax.scaling.paired import ALPHA, detectable

    own = {(c.tags["rung"], c.tags["variant"], w) for c in plan.cells for w in str(c.tags["match"]).split("+")}
    comparisons = sum(variant != "base" for _, variant, _ in own)
    assert plan.spec.ablate is not None
    seeds, ways = plan.spec.ablate.seeds, len(plan.spec.ablate.matches)
    variants = 1 + comparisons // max(1, ways * len({rung for rung, _, _ in own}))
    df, se = (seeds - 1) * (variants - 1), (2 / seeds) ** 0.5
    alone, beside = (detectable(se, df, alpha) if df else None for alpha in (ALPHA, ALPHA / max(1, comparisons)))
    return {"seeds": seeds, "comparisons": comparisons, "df": df, "detectable": alone, "detectable_holm": beside}


def plan_tables(plan: Plan, power: Mapping[str, Any]) -> list[Any]:
    """What `llamax ablate plan` prints."""
    from rich.text import Text

    from llamax.report.words import plural
    from llamax.sweep.tables import duration, si

    assert plan.spec.ablate is not None
    convention, several = plan.spec.ablate.flops, len(plan.spec.ablate.matches) > 1
    title = f"Ablation {plan.spec.name}, matched: {', '.join(plan.spec.ablate.matches)}; off: from the base, in %"
    columns = ("size", "variant", "params", "off", "before", "FLOPs", "off", "before", "d_ff", "steps")
    table = _table(title, columns, texts=2)
    first = [c for c in plan.cells if c.config.train.seed == plan.cells[0].config.train.seed]
    bases = {c.tags["rung"]: c for c in first if c.tags["variant"] == "base"}
    for c in first:
        base = bases[c.tags["rung"]]
        params, own = _params(c), _params(base)
        cost, goal = c.flops[convention], base.flops[convention]
        shares = (params / own, c.tags["params_unmatched"] / own, cost / goal, c.tags["flops_unmatched"] / goal)
        off = ("",) * 4 if c is base else tuple(_percent(share - 1) for share in shares)
        mlp = c.config.model.mlp
        width = mlp.d_ff if hasattr(mlp, "d_ff") else mlp.expert.d_ff
        name = c.tags["variant"] + (f" ({c.tags['match']})" if several and c is not base else "")
        numbers = (si(params), *off[:2], f"{cost:.3g}", *off[2:], str(width), f"{c.steps:,}")
        table.add_row(c.tags["rung"], name, *numbers)
    seeds = f"{plural(power['seeds'], 'seed')} each"
    lines = [f"{len(plan.cells)} cells, {plan.totals['flops_6n']:.3g} FLOPs (6n), {seeds}, "
             f"about {duration(plan.totals['seconds'])} with one worker"]  # fmt: skip
    if power["df"]:
        lines.append(
            f"detectable at one size with 80 %: {power['detectable']:.2g} x the noise of a paired run "
            f"({power['detectable_holm']:.2g} x beside all {power['comparisons']} comparisons, Holm); df {power['df']}"
        )
    else:
        lines.append("one seed: no interval and no test is possible; give seeds: 3 or more")
    lines += [
        "runs of one seed share weights' seed and data order; the base's learning rate, batch and steps hold for all",
        *(f"{c.name}: {c.rules['match']}" for c in first[1:4]),
    ]
    return [table, *map(Text, lines), *(Text(f"warning: {w}", style="yellow") for w in plan.warnings)]


def _params(cell: Any) -> int:
    from llamax.accounting import count_params

    return count_params(cell.config.model).total


def report_tables(found: Ablation) -> list[Any]:
    """What `llamax ablate report` prints: at most 100 columns, four sizes a table."""
    from rich.text import Text

    unit = "nats/token" if found.unit == "nats" else "log loss"
    shown: list[Any] = []
    for match in found.noise["match"].unique():
        way = f"matched: {match}"
        pick = {name: _of(getattr(found, name), match) for name in ("effects", "factors", "noise", "gains", "trends")}
        if len(pick["factors"]):
            shown += _pivot(f"Main effects and interactions, {unit} ({way})", pick["factors"], "factor", _effect)
        shown += _pivot(
            f"Effects against the base, {unit}, less is better ({way})", pick["effects"], "variant", _effect
        )
        shown.append(_noise_table(f"Noise and power, {unit} ({way})", pick["noise"], pick["effects"]))
        if len(pick["gains"]):
            shown += _pivot(f"Compute-equivalent gain ({way})", pick["gains"], "variant", _gain)
            table = _table("Trend: factor of the gain a decade of compute", ("variant", "factor", "95 % interval"), 1)
            for row in pick["trends"].dropna(subset="factor").to_dict("records"):
                table.add_row(row["variant"], _two(row["factor"]), _pair(row))
            shown.append(table)
    return [
        *shown,
        *(Text(f"  {rule}") for rule in found.rules),
        *(Text(f"warning: {w}", style="yellow") for w in found.words),
    ]


def _of(table: Any, match: str) -> Any:
    return table[table["match"] == match] if len(table) else table


def _pivot(title: str, table: Any, label: str, text: Any) -> list[Table]:
    sizes, names = list(table["size"].unique()), list(table[label].unique())
    rows = {(row[label], row["size"]): row for row in table.to_dict("records")}
    tables = []
    for start in range(0, len(sizes), COLUMNS_A_TABLE):
        part = sizes[start : start + COLUMNS_A_TABLE]
        shown = _table(title, (label, *part), 1)
        for name in names:
            shown.add_row(name, *(text(rows[name, size]) if (name, size) in rows else "" for size in part))
        tables.append(shown)
    return tables


def _effect(row: Mapping[str, Any]) -> str:
    if row["low"] != row["low"]:
        return f"{row['effect']:+.4f}"
    return f"{row['effect']:+.4f} ±{(row['high'] - row['low']) / 2:.4f}{'*' if row['p_holm'] < 0.05 else ' '}"


def _gain(row: Mapping[str, Any]) -> str:
    return "" if row["gain"] != row["gain"] else f"{_two(row['gain'])} {_pair(row)}"


def _pair(row: Mapping[str, Any]) -> str:
    return "" if row["low"] != row["low"] else f"[{_two(row['low'])}, {_two(row['high'])}]"


def _two(value: float) -> str:
    return f"{value:.2f}" if 0.05 <= value < 100 else f"{value:.2g}"


def _noise_table(title: str, noise: Any, effects: Any) -> Table:
    columns = ("size", "seeds", "paired", "df", "between seeds", "shared by a seed", "detectable", "beside all")
    table = _table(title, columns, 1)
    for row in noise.to_dict("records"):
        own = effects[effects["size"] == row["size"]].iloc[0]
        values = (row["between_seeds"], row["shared"], own["detectable"], own["detectable_holm"])
        numbers = ("-" if v != v else f"{v:.4f}" for v in values)
        paired = "-" if row["paired"] != row["paired"] else f"{row['paired']:.4f}"
        table.add_row(row["size"], str(row["seeds"]), paired, str(row["df"]), *numbers)
    return table


def _percent(share: float) -> str:
    return "0" if abs(share) < 5e-5 else f"{100 * share:+.2f}" if abs(share) < 0.1 else f"{100 * share:+.0f}"


def _table(title: str, columns: Sequence[str], texts: int) -> Table:
    from llamax.sweep.tables import plain_table

    return plain_table(*columns, title=title, texts=texts, narrow=True)
