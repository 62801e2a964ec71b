"""Loss against learning rate, one line a size, one panel a parametrization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llamax.report.style import INK, MUTED, SURFACE, Picture, finish, hover, key, panels, sequence
from llamax.report.words import decimals

if TYPE_CHECKING:
    import pandas as pd

NAMES = {"standard": "standard", "mup": "muP", "completep": "CompleteP"}
ABOVE = 0.5  # nats above the best loss of all: what is worse lies outside the figure


def transfer_picture(runs: pd.DataFrame, summary: dict[str, Any]) -> Picture:
    """Held-out loss against log2 of the learning rate, lines through the means of seeds, optima ringed.

    `runs` as of `llamax.sweep.transfer.transfer_runs`, `summary` as of `llamax.scaling.transfer_summary`.
    """
    size = summary["size"]
    kinds = list(dict.fromkeys(runs["parametrization"]))
    sizes = sorted(runs[size].unique())
    figure, axes = panels(len(kinds), 3.1 * len(kinds) + 0.9, 4.0)
    colours = dict(zip(sizes, sequence(len(sizes)), strict=True))
    for kind, axis in zip(kinds, axes, strict=True):
        for value in sizes:
            _line(
                axis, runs[(runs["parametrization"] == kind) & (runs[size] == value)], colours[value], f"{size} {value}"
            )
        _rings(axis, [row for row in summary["optima"] if row["parametrization"] == kind], size, colours)
        shift = next(row for row in summary["shifts"] if row["parametrization"] == kind)
        axis.set_title(f"{NAMES.get(kind, kind)}: {_said(shift)}", fontsize=9.5, color=INK, loc="left")
        axis.set_xlabel("peak learning rate")
        _powers_of_two(axis, runs["lr"])
    low, high = runs["loss"].min(), runs["loss"].max()
    axes[0].set_ylim(low - 0.05 * min(high - low, ABOVE), min(high, low + ABOVE) + 0.02)
    axes[0].set_ylabel("held-out loss, nats per token")
    key(axes[-1], size, [(str(value), colours[value]) for value in sizes])
    return finish(
        figure,
        f"lr-transfer-{size}",
        f"Held-out loss against learning rate for {len(sizes)} values of {size} under {len(kinds)} parametrizations.",
        f"Small points are runs, lines join the means over seeds; a ring is the optimum of a {size}, the vertex of a "
        "parabola through the best rate and its neighbours, averaged over seeds (dashed: at the grid's edge). In the "
        f"titles, how far the optimum moves in log2 lr a doubling of {size}, with its 95 % interval from seeds.",
    )


def _line(axis: Any, rows: pd.DataFrame, colour: str, label: str) -> None:
    for row in rows.to_dict("records"):
        tip = f"{label}, lr {row['lr']:g}, seed {row['seed']}: {decimals(row['loss'], 4)}"
        axis.plot(row["lr"], row["loss"], "o", ms=3, color=colour, alpha=0.55, mew=0, gid=hover(tip))
    means = rows.groupby("lr")["loss"].mean()
    axis.plot(means.index, means.to_numpy(), color=colour, lw=1.5)


def _rings(axis: Any, optima: list[dict[str, Any]], size: str, colours: dict[Any, str]) -> None:
    places = []
    for value, colour in colours.items():
        rows = [row for row in optima if row[size] == value]
        lr = float(2.0 ** np.mean([np.log2(row["lr"]) for row in rows]))
        loss, inside = float(np.mean([row["loss"] for row in rows])), all(row["interior"] for row in rows)
        places.append((lr, loss))
        edge = {"mec": INK, "mew": 1.2} if inside else {"mec": MUTED, "mew": 0.9}
        axis.plot(lr, loss, "o" if inside else "s", ms=8, mfc=SURFACE, alpha=0.9, zorder=4, **edge)
        axis.plot(lr, loss, "o", ms=4, color=colour, mew=0, zorder=5)
    axis.plot(*zip(*places, strict=True), color=MUTED, lw=0.8, ls=(0, (3, 2)), zorder=3)


def _said(shift: dict[str, Any]) -> str:
    if not np.isfinite(shift["per_doubling"]):
        return "no two optima inside"
    text = f"{shift['per_doubling']:+.2f} a doubling"
    return text if shift["interval"] is None else f"{text} [{shift['interval'][0]:+.2f}, {shift['interval'][1]:+.2f}]"


def _powers_of_two(axis: Any, rates: pd.Series) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log", base=2)
    low, high = (int(np.round(np.log2(rate))) for rate in (rates.min(), rates.max()))
    step = 1 if high - low <= 4 else 2
    axis.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(low, high + 1, step)]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"2^{round(np.log2(value))}"))
