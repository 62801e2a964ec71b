"""The figures of the fit and of its claim: measured against fitted, residuals, extrapolation, the interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llamax.report.plots import same_budget, shade_band
from llamax.report.read import number
from llamax.report.style import (
    ACCENT,
    INK,
    MUTED,
    SURFACE,
    Picture,
    finish,
    hover,
    key,
    label_ends,
    log_axis,
    panel,
    sequence,
)
from llamax.report.words import LAWS, count, decimals, power

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from llamax.report.study import Study


def measured_against_fitted(study: Study) -> Picture | None:
    """Every cell's measured loss against the parametric law's, with the line of equality."""
    if study.law is None or study.cells.empty:
        return None
    figure, axes = panel(5.6, 4.6)
    fitted, measured = _both(study)
    _points(axes, study, fitted, measured, "measured {1:.4f}, fitted {0:.4f}")
    held = study.held_out
    if held is not None and held["eval_loss"] > 0:
        axes.plot(
            study.law_loss(held["n"], held["tokens"]), held["eval_loss"], "D", ms=7, color=ACCENT, mec=SURFACE, mew=0.8
        )
    ends = (min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1]))
    axes.plot(ends, ends, color=MUTED, lw=1, zorder=1)
    axes.set(xlim=ends, ylim=ends)
    axes.set_xlabel("loss of the fitted law, nats per token")
    axes.set_ylabel("measured held-out loss, nats per token")
    return finish(
        figure,
        "fit",
        f"Measured against fitted loss of {len(fitted)} runs.",
        f"{LAWS[study.law_name]}: measured against fitted loss. On the line they are equal. The diamond is "
        "the run that was predicted and not fitted.",
    )


def residuals(study: Study) -> Picture | None:
    """Relative residual of every cell against N: structure left over means the law has the wrong shape."""
    if study.law is None or study.cells.empty:
        return None
    figure, axes = panel(5.6, 4.6)
    axes.set_xscale("log")
    fitted, measured = _both(study)
    off = 100 * (measured / fitted - 1)
    scatter = number(study.law_fit.get("residual_percent"))
    if scatter > 0:
        axes.axhspan(-scatter, scatter, color=INK, alpha=0.08, lw=0)
    axes.axhline(0, color=MUTED, lw=1)
    _points(axes, study, study.cells["n"].to_numpy(float), off, "N = {0:.4g}, residual {1:+.2f} %")
    log_axis(axes, "x", count)
    axes.set_xlabel("model size N, parameters")
    axes.set_ylabel("measured / fitted - 1, percent")
    key(
        axes,
        "budget C",
        [(power(b), colour) for b, colour in zip(study.budgets, sequence(len(study.budgets)), strict=True)],
    )
    band = f" The band is their root mean square, {decimals(scatter, significant=2)} %." if scatter > 0 else ""
    return finish(
        figure,
        "residuals",
        "Residuals of the parametric fit against model size, in percent of the loss.",
        f"Residuals in percent of the loss, coloured by budget C.{band} A pattern, such as all large sizes on one "
        "side, would mean that the law has the wrong shape.",
    )


def extrapolation(study: Study) -> Picture | None:
    """Best loss against compute: the floors of the valleys, the law beyond them, the claim and the measurement."""
    claim = study.prediction
    if study.law is None or not number(claim.get("flops")) > 0 or not number(claim.get("loss")) > 0:
        return None
    figure, axes = panel(5.6, 4.4)
    axes.set_xscale("log")
    target = number(claim["flops"])
    floors = [v for v in study.valleys if v.get("interior") and number(v.get("loss")) > 0]
    first = number(floors[0].get("flops", floors[0]["budget"])) if floors else target / 100
    grid = np.geomspace(first / 1.5, target * 1.6, 80)
    axes.plot(grid, study.law_loss(*study.law_optimum(grid)), color=INK, lw=1.4)
    shaded = " with its bootstrap band" if shade_band(axes, study.law_fit, "loss", grid) else ""
    for v, colour in zip(study.valleys, sequence(len(study.valleys)), strict=True):
        if v in floors:
            tip = f"C = {power(v['budget'])}: loss {decimals(v['loss'], 4)} at N = {count(v['vertex'])}"
            axes.plot(
                number(v.get("flops", v["budget"])),
                v["loss"],
                "o",
                ms=7,
                color=colour,
                mec=SURFACE,
                mew=0.8,
                gid=hover(tip),
                zorder=3,
            )
    bounds = claim.get("interval")
    if isinstance(bounds, (list, tuple)):
        axes.plot([target, target], bounds, color=ACCENT, lw=3, solid_capstyle="butt")
    axes.plot(target, claim["loss"], "D", ms=7, mfc=SURFACE, mec=ACCENT, mew=1.6, zorder=4)
    labels = [(target, number(claim["loss"]), f"predicted {decimals(claim['loss'], 3)}")]
    if number(claim.get("measured")) > 0:
        axes.plot(target, claim["measured"], "o", ms=6, color=INK, mec=SURFACE, mew=0.8, zorder=5)
        labels.append((target, number(claim["measured"]), f"measured {decimals(claim['measured'], 3)}"))
    log_axis(axes, "x", power)
    axes.set_xlabel("compute C, training FLOPs (6ND)")
    axes.set_ylabel("held-out loss at the optimum, nats per token")
    axes.set_xlim(grid[0], grid[-1])
    label_ends(axes, labels)
    return finish(
        figure,
        "extrapolation",
        "Loss at the best allocation against compute, extrapolated to the predicted run.",
        f"Floors of the valleys (points), the fitted law at its own optimum (line{shaded}), and at the target "
        "compute the prediction written down before the run (open diamond, bar: its interval) with what was then "
        "measured (dot in ink).",
    )


def claim_interval(study: Study) -> Picture | None:
    """The prediction at full zoom: its interval for one run, the law's own, and the measurement."""
    claim = study.prediction
    bounds, inner, loss, measured = (
        claim.get("interval"),
        claim.get("interval_mean"),
        number(claim.get("loss")),
        number(claim.get("measured")),
    )
    if not loss > 0 or not isinstance(bounds, (list, tuple)):
        return None
    figure, axes = panel(5.6, 2.4)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    level = f"{100 * number(claim.get('level', 0.95)):.0f} %"
    axes.plot(
        bounds,
        [0, 0],
        color=ACCENT,
        lw=10,
        alpha=0.3,
        solid_capstyle="butt",
        gid=hover(f"{level} interval for one run"),
    )
    if isinstance(inner, (list, tuple)):
        axes.plot(
            inner,
            [0, 0],
            color=ACCENT,
            lw=10,
            alpha=0.55,
            solid_capstyle="butt",
            gid=hover(f"{level} interval of the law"),
        )
    axes.plot(loss, 0, "D", ms=9, mfc=SURFACE, mec=ACCENT, mew=1.8, zorder=4)
    axes.annotate(
        f"predicted {loss:.4f}",
        (loss, 0),
        xytext=(0, -18),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=9,
        color=INK,
    )
    points = [*bounds, loss]
    if measured > 0:
        axes.plot(measured, 0, "o", ms=9, color=INK, mec=SURFACE, mew=1, zorder=5)
        axes.annotate(
            f"measured {measured:.4f}",
            (measured, 0),
            xytext=(0, 16),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=INK,
        )
        points.append(measured)
    margin = 0.25 * (max(points) - min(points))
    axes.set(xlim=(min(points) - margin, max(points) + margin), ylim=(-1, 1), yticks=[])
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("held-out loss, nats per token")
    wide = " (dark: uncertainty of the law alone)" if isinstance(inner, (list, tuple)) else ""
    return finish(
        figure,
        "claim",
        "The predicted interval and the measured loss on one axis.",
        f"The claim at full zoom: the {level} interval for one new run{wide}, the "
        "predicted loss (diamond) and the measured one (dot).",
    )


def _both(study: Study) -> tuple[np.ndarray, np.ndarray]:
    cells = study.cells
    return study.law_loss(cells["n"].to_numpy(float), cells["tokens"].to_numpy(float)), cells["eval_loss"].to_numpy(
        float
    )


def _points(axes: Axes, study: Study, x: np.ndarray, y: np.ndarray, tip: str) -> None:
    palette = sequence(max(len(study.budgets), 1))
    for run, budget, a, b in zip(study.cells["run"], study.cells["budget"], x, y, strict=True):
        place = next((i for i, known in enumerate(study.budgets) if same_budget(budget, known)), 0)
        axes.plot(
            a,
            b,
            "o",
            ms=6,
            color=palette[place],
            mec=SURFACE,
            mew=0.8,
            gid=hover(f"{run}: {tip.format(a, b)}"),
            zorder=3,
        )
