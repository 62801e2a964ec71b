"""`llamax curves`: the loss curves of runs beside each other, their spikes, and what the gradients say of the batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamax.console import AtHand, Json, print_json, show
from llamax.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

FIGURES = (".png", ".svg", ".pdf")
POINTS = 200


def curves(
    runs: Annotated[list[Path], AtHand(metavar="RUN...", help="Run directories, studies, or folders of them.")],
    on: Annotated[str, typer.Option(help="Axis to align on: tokens, flops (6 N D), seconds or step.")] = "tokens",
    smooth: Annotated[float, typer.Option(help="Half-life in logged rows of an exponential average; 0: none.")] = 0.0,
    threshold: Annotated[float, typer.Option(help="Robust standard deviations that make a spike.")] = 6.0,
    floor: Annotated[
        float | None, typer.Option(help="Irreducible loss (E of a fitted law): also report the collapse of the curves.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Draw the aligned curves as .png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Final losses, spikes, gradient noise, and the runs' losses at the furthest point that all have reached."""
    if out is not None and out.suffix not in FIGURES:
        raise UserError(f"--out {out}: unknown kind of figure; give a name ending in {', '.join(FIGURES)}")
    found = examine(runs, on=on, smooth=smooth, threshold=threshold, floor=floor)
    if out is not None:
        draw(found, out)
        found["figure"] = str(out)
    if as_json:
        print_json(found)
    else:
        show(*tables(found))


def examine(
    paths: list[Path], *, on: str, smooth: float = 0.0, threshold: float = 6.0, floor: float | None = None
) -> dict[str, Any]:
    """What the command prints: `runs` (one entry a run, with its spikes), `common`, `collapse`, `grid` and `losses`.

    Raises:
        UserError: no such folder, no logged rows, or an axis that the rows lack.
    """
    from llamax.scaling import align_curves, collapse_curves, ema

    table, rows = read_runs(paths)
    if rows.empty:
        raise UserError(f"{', '.join(map(str, paths))}: no run there has logged a row yet")
    entries = [
        _entry(record, rows[rows["run"] == record["run"]].reset_index(drop=True), threshold)
        for record in table.to_dict("records")
        if (rows["run"] == record["run"]).any()
    ]
    if smooth:
        rows["loss"] = rows.groupby("run", sort=False)["loss"].transform(lambda v: ema(v.to_numpy(float), smooth))
    aligned = align_curves(rows, on, points=POINTS)
    shared = aligned.dropna()
    common = None
    if len(shared) and len(aligned.columns) > 1:
        common = {"at": float(shared.index[-1]), "losses": {k: float(v) for k, v in shared.iloc[-1].items()}}
    collapse = None
    if floor is not None:
        ended = table["status"] == "done"  # of others the last row is no end
        whole = rows[rows["run"].isin(table["run"][ended])]
        if whole["run"].nunique() < 2 and not ended.all():
            rest = ", ".join(map(str, table["run"][~ended]))
            raise UserError(f"--floor: a collapse is of two or more finished runs; not finished: {rest}")
        collapse = collapse_curves(whole, floor=floor, groups=_alike(table), on=on).as_dict()
    losses = {str(run): [_finite(loss) for loss in line] for run, line in aligned.items()}
    return {
        "on": on,
        "smooth": smooth,
        "runs": entries,
        "common": common,
        "collapse": collapse,
        "grid": [float(x) for x in aligned.index],
        "losses": losses,
    }


def read_runs(paths: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(ledger, logged rows) of every run under every path, named apart: by the path's last name, else by all of it."""
    import pandas as pd

    from llamax.report.ledger import curves as read_curves
    from llamax.report.ledger import ledger
    from llamax.report.read import RUN_FILES

    last = [path.resolve().name for path in paths]
    tables, parts = [], []
    for path, name in zip(paths, last, strict=True):
        own = name if last.count(name) == 1 else str(path)
        single = any((path / file).is_file() for file in RUN_FILES)

        def named(run: str, own: str = own, single: bool = single) -> str:
            return own if single else run if len(paths) == 1 else f"{own}/{run}"

        runs, rows = ledger(path), read_curves(path)
        tables.append(runs.assign(run=runs["run"].map(named)))
        parts.append(rows.assign(run=rows["run"].map(named)))
    return pd.concat(tables, ignore_index=True), pd.concat(parts, ignore_index=True)


def _alike(table: pd.DataFrame) -> dict[str, str]:
    """Of each run what it shares with those that differ from it by the seed alone: its config, N and tokens."""
    config = [c for c in table if "." in str(c) and not str(c).startswith("tag.") and c != "train.seed"]
    return dict(zip(table["run"], map(str, table[["n", "tokens", *config]].to_numpy().tolist()), strict=True))


def _entry(record: dict[Any, Any], rows: pd.DataFrame, threshold: float) -> dict[str, Any]:
    """One run: how far it is, where its loss stands, its spikes by step, and the noise scale where norms allow."""
    from llamax.scaling import find_spikes

    spikes = [
        {
            "step": int(rows["step"][spike.peak]),
            "from_step": int(rows["step"][spike.start]),
            "to_step": int(rows["step"][spike.end]),
            "height": _finite(spike.height),
            "z": _finite(spike.z),
            "recovered": spike.recovered,
        }
        for spike in find_spikes(rows["loss"].to_numpy(float), threshold=threshold)
    ]
    last = rows.iloc[-1]
    return {
        "run": record["run"],
        "status": record["status"],
        "step": int(last["step"]),
        "tokens": _finite(last.get("tokens")),
        "seconds": _finite(last.get("seconds")),
        "loss": _finite(last["loss"]),
        "eval_loss": _finite(record["eval_loss"]),
        "eval_bits_per_byte": _finite(record["eval_bits_per_byte"]),
        "spikes": spikes,
        "gradient_noise": gradient_noise(record, rows),
    }


def gradient_noise(record: dict[Any, Any], rows: pd.DataFrame) -> dict[str, Any] | None:
    """The noise scale in tokens over the second half of a run that logged `micro_grad_norm`; None where it did not.

    Where noise hides the gradient, `scale` is None and `words` says so.
    """
    from llamax.report.read import number
    from llamax.scaling import noise_scale

    if "micro_grad_norm" not in rows or rows["micro_grad_norm"].isna().all():
        return None
    fields = ("batch_size", "seq_len", "grad_accumulation")
    batch, length, parts = (number(record.get(f"train.{name}")) for name in fields)
    tokens = batch * length
    if not (parts > 1 and tokens > 0):
        return None
    later = rows.iloc[len(rows) // 2 :]
    small, big = (later[name].to_numpy(float) for name in ("micro_grad_norm", "grad_norm"))
    try:
        found = noise_scale(small, big, tokens / parts, tokens)
    except UserError as error:
        return {"scale": None, "batch": tokens, "words": str(error)}
    return {"scale": found.scale, "batch": tokens, "rows": found.rows}


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


# ---------------------------------------------------------------- telling
def tables(found: dict[str, Any]) -> list[Any]:
    """The result as tables of at most 100 columns, and the rules behind the numbers."""
    from rich.table import Table
    from rich.text import Text

    from llamax.report.words import count, decimals

    main = Table(box=None, header_style="bold", pad_edge=False)
    main.add_column("run", max_width=34, overflow="ellipsis", no_wrap=True)
    for name in ("status", "step", "tokens", "loss", "eval", "bits/B", "spikes", "noise scale"):
        main.add_column(name, justify="left" if name == "status" else "right", no_wrap=True)
    spikes = Table(title="spikes", box=None, header_style="bold", pad_edge=False, title_justify="left")
    spikes.add_column("run", max_width=34, overflow="ellipsis", no_wrap=True)
    for name in ("peak at step", "from", "to", "nats above", "z", "recovered"):
        spikes.add_column(name, justify="right", no_wrap=True)
    for run in found["runs"]:
        noise = run["gradient_noise"]
        main.add_row(
            Text(run["run"]), run["status"], f"{run['step']:,}", count(run["tokens"]),
            *(decimals(run[key], 4) for key in ("loss", "eval_loss", "eval_bits_per_byte")),
            str(len(run["spikes"])), count(noise["scale"]) if noise else count(None),
        )  # fmt: skip
        for spike in run["spikes"]:
            spikes.add_row(
                Text(run["run"]), f"{spike['step']:,}", f"{spike['from_step']:,}", f"{spike['to_step']:,}",
                "not finite" if spike["height"] is None else decimals(spike["height"], 3),
                decimals(spike["z"], 1), "yes" if spike["recovered"] else "NO",
            )  # fmt: skip
    shown: list[Any] = [main]
    if spikes.row_count:
        shown += ["", spikes, Text("z: above the median of the 40 rows before, in robust standard deviations.")]
    if any(run["gradient_noise"] for run in found["runs"]):
        shown.append(
            Text("noise scale: tokens a batch at which noise equals signal, tr(Σ)/|G|², second half of the run.")
        )
    if found["common"]:
        shown += ["", Text(f"at {_amount(found['common']['at'], found['on'])}, the furthest that all have reached:")]
        ordered = sorted(found["common"]["losses"].items(), key=lambda item: item[1])
        shown += [Text(f"  {loss:.4f}  {loss - ordered[0][1]:+.4f}  {run}") for run, loss in ordered]
    if collapse := found["collapse"]:
        words = f"collapse of {collapse['runs']} curves: {100 * collapse['score']:.2f} % apart on average"
        if collapse["ratio"] is not None:
            words += f", {collapse['ratio']:.2f} x the seeds' noise; below it over {100 * collapse['share']:.0f} %"
        shown += ["", Text(words + " (arXiv:2507.02119)")]
    return shown + ([Text(f"figure: {found['figure']}")] if "figure" in found else [])


def _amount(value: float, on: str) -> str:
    return f"{value:.4g} {'training FLOPs (6 N D)' if on == 'flops' else on}"


def draw(found: dict[str, Any], out: Path) -> None:
    """The aligned curves as a figure file, the lowest last loss first in the key."""
    from matplotlib.figure import Figure

    from llamax.report.style import LIGHT_SEQUENCE

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    ordered = sorted(found["losses"], key=lambda run: [v for v in found["losses"][run] if v is not None][-1])
    for i, run in enumerate(ordered):
        colour = LIGHT_SEQUENCE[round(i * (len(LIGHT_SEQUENCE) - 1) / max(1, len(ordered) - 1))]
        axes.plot(found["grid"], [math.nan if v is None else v for v in found["losses"][run]], color=colour, label=run)
    axes.set(xscale="log", yscale="log", xlabel=_amount(1, found["on"])[2:], ylabel="training loss, nats per token")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(True, which="both", color="#e4e7eb", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(ordered) <= 16:
        axes.legend(frameon=False, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
