"""An ablation's study directory as a table of runs, and its findings as figures and a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamax.errors import UserError
from llamax.report.blocks import Bullets, Figures, Section, Words
from llamax.report.ledger import COSTS, SIZES, ledger
from llamax.report.read import cells_by_directory
from llamax.report.style import GRID, INK, SURFACE, Picture, finish, hover, key, label_ends, log_axis, panel
from llamax.report.style import sequence as colours
from llamax.report.words import decimals, power
from llamax.storage.copies import at_hand

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from llamax.scaling import Ablation

COLUMNS = (
    *("name", "rung", "size", "variant", "match", "matched", "seed", "status", "fraction"),
    *SIZES,
    *("params_unmatched", "flops_unmatched", "train_loss", "eval_loss", "eval_bits_per_byte"),
    *COSTS,
    *("optimizer.lr", "train.batch_size", "hash", "fingerprint"),
)


def ablation_runs(path: str | Path) -> pd.DataFrame:
    """The runs of an ablation as `ablation` takes them, from a study directory or from a stored .parquet or .csv table.

    One row a planned run, `fraction` the part of its schedule that it has done (0: not started). `size` is the cell's
    size, or its label (`d16-t20`) where one size is trained for several lengths.

    Raises:
        UserError: no such path, no plan in it, or the plan is no ablation's.
    """
    import pandas as pd

    path = at_hand(path)
    if path.suffix in (".parquet", ".csv"):
        if not path.is_file():
            raise UserError(f"{path}: no such table; give a study directory or a .parquet or .csv of its runs")
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    cells = cells_by_directory(path)
    if not cells:
        raise UserError(f"{path}: no plan.json with cells; give the directory of a study (llamax ablate run)")
    if any("variant" not in cell.get("tags", {}) for cell in cells.values() if not cell.get("extra")):
        raise UserError(f"{path}: its plan is a sweep's without `ablate`, so no run is the base of another")
    frame = ledger(path)
    frame["run"] = frame["run"].map(lambda run: Path(run).name)
    frame = frame[frame["run"].isin(cells)].set_index("run")
    waiting = pd.DataFrame(
        [
            {**cells[run]["tags"], "name": cells[run]["name"], "status": "pending", "steps": 0.0}
            for run in _absent(cells, frame)
        ],
        index=_absent(cells, frame),
    )
    frame = pd.concat([frame, waiting]) if len(waiting) else frame
    planned = pd.Series({run: float(cell["steps"]) for run, cell in cells.items()})
    frame["fraction"] = frame["steps"].fillna(0.0).astype(float) / planned.reindex(frame.index)
    frame = frame.reindex([run for run in cells if run in frame.index]).reset_index(names="run")
    if "rung" in frame and (frame["size"].isna().any() or frame.duplicated(["variant", "match", "size", "seed"]).any()):
        frame["size"] = frame["rung"]
    axes = [column for column in frame if str(column).startswith("ablate.")]
    return frame[[c for c in COLUMNS if c in frame] + axes]


def _absent(cells: dict[str, Any], frame: pd.DataFrame) -> list[str]:
    return [run for run in cells if run not in frame.index]


# ---------------------------------------------------------------- figures
def effects_picture(found: Ablation, match: str | None = None, factors: bool = False) -> Picture:
    """Effects with their pooled intervals, a row a variant and a colour a size; or main effects and interactions."""
    match = match or str(found.effects["match"].iloc[0])
    table, label = (found.factors, "factor") if factors else (found.effects, "variant")
    table = table[table["match"] == match]
    names, sizes = list(table[label].unique()), list(table["size"].unique())
    figure, axes = panel(8.6, 1.3 + 0.42 * len(names))
    axes.axvline(0, color=INK, lw=0.8)
    tones = dict(zip(sizes, colours(len(sizes)), strict=True))
    for row in table.to_dict("records"):
        at = names.index(row[label]) + 0.62 * (sizes.index(row["size"]) + 0.5) / len(sizes) - 0.31
        seen = row["p_holm"] < 0.05
        if np.isfinite(row["low"]):
            axes.plot([row["low"], row["high"]], [at, at], color=tones[row["size"]], lw=1.6)
        tested = f"{decimals(row['effect'], 4)}, Holm p {decimals(row['p_holm'], significant=2)}"
        tip = f"{row[label]}, {row['size']}: {tested}"
        fill = tones[row["size"]] if seen else SURFACE
        axes.plot(row["effect"], at, "o", ms=5.5, color=fill, mec=tones[row["size"]], mew=1.3, gid=hover(tip), zorder=3)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(False, axis="y")
    for line in range(1, len(names)):
        axes.axhline(line - 0.5, color=GRID, lw=0.6)
    axes.set_ylim(len(names) - 0.5, -0.5)
    unit = "nats per token" if found.unit == "nats" else "log loss"
    axes.set_xlabel(f"effect on held-out loss, {unit} (left is better)")
    key(axes, "size", list(tones.items()))
    what = "Main effects and interactions" if label == "factor" else "Effects against the base"
    return finish(
        figure,
        f"ablation-{'factors' if factors else 'effects'}-{match}",
        f"{what} of {len(names)} changes at {len(sizes)} sizes, with intervals.",
        f"{what} (matched: {match}), with 95 % t intervals from the noise pooled over the variants of a size. Filled: "
        "different from zero after Holm's correction over all of them.",
    )


def gains_picture(found: Ablation, match: str | None = None) -> Picture | None:
    """Compute-equivalent gain of single changes against the base's compute; None where there is none."""
    if found.gains.empty:
        return None
    match = match or str(found.gains["match"].iloc[0])
    table = found.gains[(found.gains["match"] == match) & np.isfinite(found.gains["gain"])]
    names = [name for name in table["variant"].unique() if "+" not in name] or list(table["variant"].unique())
    spent = found.effects[found.effects["match"] == match].drop_duplicates("size").set_index("size")["flops"]
    figure, axes = panel(7.4, 4.4)
    axes.set(xscale="log", yscale="log")
    axes.axhline(1, color=INK, lw=0.8)
    labels = []
    for i, (name, tone) in enumerate(zip(names, colours(len(names)), strict=True)):
        rows = table[table["variant"] == name]
        x = spent[rows["size"]].to_numpy(float) * 1.03 ** (i - (len(names) - 1) / 2)
        axes.plot(x, rows["gain"], "o-", ms=5, lw=1.3, color=tone, mec=SURFACE, mew=0.6, zorder=3)
        for place, row in zip(x, rows.to_dict("records"), strict=True):
            if np.isfinite(row["low"]) and row["low"] > 0:
                high = row["high"] if np.isfinite(row["high"]) else 1e3 * row["gain"]
                axes.plot([place, place], [row["low"], high], color=tone, lw=1.2, alpha=0.7)
        labels.append((x[-1], float(rows["gain"].iloc[-1]), name))
    _clip_gains(axes, table[table["variant"].isin(names)])
    log_axis(axes, "x", power)
    log_axis(axes, "y", lambda v: f"{v:g}", subs=(1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9))
    axes.set_xlabel("training FLOPs of the base")
    axes.set_ylabel("compute-equivalent gain")
    label_ends(axes, labels)
    return finish(
        figure,
        f"ablation-gains-{match}",
        f"Compute-equivalent gain of {len(names)} changes over the ladder.",
        f"How many times the variant's compute the base would need for the variant's loss (matched: {match}); above 1 "
        "the change saves compute. Lines: 95 % intervals from the redrawn noise of the seeds; cut at the frame.",
    )


def _clip_gains(axes: Axes, table: pd.DataFrame) -> None:
    """An interval without an end must not stretch the axis: the frame is that of the gains, twice as wide in log."""
    low, high = np.log(min(1.0, table["gain"].min())), np.log(max(1.0, table["gain"].max()))
    margin = max(0.15, 0.5 * (high - low))
    axes.set_ylim(float(np.exp(low - margin)), float(np.exp(high + margin)))


def ablation_page(name: str, found: Ablation) -> str:
    """An HTML page of the figures, what was left out and how the numbers were made."""
    from llamax.report.html import to_html

    parts = []
    for match in found.effects["match"].unique():
        pictures = [effects_picture(found, match), gains_picture(found, match)]
        if len(found.factors) and (found.factors["match"] == match).any():
            pictures.insert(0, effects_picture(found, match, factors=True))
        figures = tuple(Figures((picture,)) for picture in pictures if picture is not None)
        parts.append(Section(f"match-{match}", f"Matched: {match}", figures))
    words = (Bullets(found.words, alarm=True),) if found.words else ()
    rules = tuple(Words(rule, small=True) for rule in found.rules)
    return to_html(name, (*parts, Section("rules", "How the numbers were made", (*words, *rules))), "Ablation")
