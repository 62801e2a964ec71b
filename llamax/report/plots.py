"""The figures of a study's runs: isoFLOP valleys, the allocation power laws, loss curves. None if data is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

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
from llamax.report.words import SHORT_LAWS, count, decimals, power

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from llamax.report.study import Study

CURVE_POINTS = 240  # points drawn a run: more cannot be seen
KEY_ENTRIES = 12  # sizes named in the key
SMOOTHING = 0.04  # share of a run's rows in the running mean


def same_budget(a: Any, b: Any) -> bool:
    """Whether two budget labels, FLOPs, are one budget."""
    return abs(number(a) / number(b) - 1) < 1e-6 if number(b) else False


def valleys(study: Study) -> Picture | None:
    """Held-out loss against N, one valley a budget, with the fitted parabolas and their vertices."""
    if not study.budgets:
        return None
    figure, axes = panel(8.6, 4.9)
    axes.set_xscale("log")
    labels = []
    for budget, colour in zip(study.budgets, sequence(len(study.budgets)), strict=True):
        rows = study.cells[study.cells["budget"].map(number) == budget].sort_values("n")
        fit = next((v for v in study.valleys if same_budget(v["budget"], budget)), None)
        x, y = rows["n"].to_numpy(float), rows["eval_loss"].to_numpy(float)
        for row in rows.to_dict("records"):
            tip = f"{row['run']}: N {count(row['n'])}, D {count(row['tokens'])}, loss {decimals(row['eval_loss'], 4)}"
            axes.plot(
                row["n"], row["eval_loss"], "o", ms=6, color=colour, mec=SURFACE, mew=0.8, gid=hover(tip), zorder=3
            )
        end = (x[-1], y[-1])
        if fit is not None and _parabola(fit, np.array([1.0])) is not None:
            grid = np.geomspace(x.min(), x.max(), 120)
            axes.plot(grid, _parabola(fit, grid), color=colour, lw=1.6)
            end = (x[-1], float(_parabola(fit, x[-1:])[0]))
            _mark_vertex(axes, fit, colour)
        else:
            axes.plot(x, y, color=colour, lw=0.8, alpha=0.6)
        labels.append((*end, f"C = {power(budget)}"))
    log_axis(axes, "x", count)
    axes.set_xlabel("model size N, parameters")
    axes.set_ylabel("held-out loss, nats per token")
    label_ends(axes, labels)
    return finish(
        figure,
        "valleys",
        f"Held-out loss against model size at {len(labels)} compute budgets, with a fitted parabola for each.",
        "Each point is a finished run; each curve the parabola in log N fitted to one budget C (training FLOPs, 6ND). "
        "A large ring marks a fitted minimum inside the grid, a cross one that is not inside.",
    )


def _parabola(fit: Mapping[str, Any], n: np.ndarray) -> Any:
    vertex, height, curvature = (number(fit.get(k)) for k in ("vertex", "loss", "curvature"))
    if not np.isfinite([vertex, height, curvature]).all() or vertex <= 0:
        return None
    return height + curvature / 2 * (np.log(n) - np.log(vertex)) ** 2


def _mark_vertex(axes: Axes, fit: Mapping[str, Any], colour: str) -> None:
    low, high = axes.get_xlim()
    vertex, height = number(fit["vertex"]), number(fit["loss"])
    if fit.get("interior"):
        tip = f"minimum at C = {power(fit['budget'])}: N = {count(vertex)}, loss {decimals(height, 4)}"
        axes.plot(vertex, height, "o", ms=11, mfc="none", mec=INK, mew=1.4, gid=hover(tip), zorder=4)
    elif low < vertex < high:
        axes.plot(vertex, height, "x", ms=9, color=colour, mew=1.6)


def optimum(study: Study, axis: str) -> Picture | None:
    """N_opt or D_opt (`axis` "n" or "d") of every budget against compute, the power law through them and its band."""
    vertex = "vertex" if axis == "n" else "vertex_d"
    inside = "interior" if axis == "n" else "interior_d"
    used = [v for v in study.valleys if number(v.get(vertex)) > 0 and v.get(inside)]
    if not used:
        return None
    what, unit = ("N", "parameters") if axis == "n" else ("D", "tokens")
    figure, axes = panel(5.6, 4.2)
    axes.set(xscale="log", yscale="log")
    flops = np.array([number(v.get("flops", v["budget"])) for v in used])
    target = number(study.prediction.get("flops"))
    reach = np.array([flops.min() / 1.6, 1.6 * max(flops.max(), target if target > 0 else 0)])
    coefficient, exponent = (number(study.approach2.get(f"{axis}_{k}")) for k in ("coefficient", "exponent"))
    labels = []
    shaded = shade_band(axes, study.approach2, axis, reach)
    if np.isfinite([coefficient, exponent]).all():
        axes.plot(reach, coefficient * reach**exponent, color=INK, lw=1.4)
        labels.append((reach[1], coefficient * reach[1] ** exponent, f"approach 2: C^{exponent:.3f}"))
    if study.law is not None:
        values = study.law_optimum(reach)[0 if axis == "n" else 1]
        axes.plot(reach, values, color=MUTED, lw=1.2, ls=(0, (4, 3)))
        slope = float(np.log(values[1] / values[0]) / np.log(reach[1] / reach[0]))
        labels.append((reach[1], values[1], f"{SHORT_LAWS[study.law_name]}: C^{slope:.3f}"))
    for v, colour in zip(study.valleys, sequence(len(study.valleys)), strict=True):
        if v in used:
            tip = f"C = {power(v['budget'])}: {what} = {count(v[vertex])}"
            axes.plot(
                number(v.get("flops", v["budget"])),
                v[vertex],
                "o",
                ms=7,
                color=colour,
                mec=SURFACE,
                mew=0.8,
                gid=hover(tip),
                zorder=3,
            )
    advice = study.prediction.get("recommendation") or {}
    if target > 0 and number(advice.get(axis)) > 0:
        bounds = advice.get(f"{axis}_interval")
        if isinstance(bounds, (list, tuple)):
            axes.plot([target, target], bounds, color=ACCENT, lw=2)
        tip = f"recommended at C = {power(target)}: {what} = {count(advice[axis])}"
        axes.plot(target, advice[axis], "D", ms=7, color=ACCENT, mec=SURFACE, mew=0.8, gid=hover(tip), zorder=4)
    for side in "xy":
        log_axis(axes, side, power if side == "x" else count)
    axes.set_xlabel("compute C, training FLOPs (6ND)")
    axes.set_ylabel(f"optimal {what}, {unit}")
    axes.set_xlim(reach[0], reach[1])
    label_ends(axes, labels)
    shade = " with its bootstrap band (shaded)" if shaded else ""
    return finish(
        figure,
        f"optimal-{axis}",
        f"Optimal {unit} against compute, with the fitted power law.",
        f"Optimal {what} at each budget (points), approach 2's power law (solid){shade}, approach 3's optimum "
        "(dashed), and the recommendation at the target compute with its interval (diamond).",
    )


def shade_band(axes: Axes, fit: Mapping[str, Any], name: str, reach: np.ndarray) -> bool:
    """Shade the stored bootstrap band `name` of a fit between the ends of `reach`, FLOPs; False when there is none."""
    bands = fit.get("bands")
    if not isinstance(bands, Mapping) or not isinstance(bands.get(name), Mapping):
        return False
    logs = np.log(np.asarray(bands["flops"], float))
    grid = np.geomspace(max(reach[0], np.exp(logs[0])), min(reach[-1], np.exp(logs[-1])), 60)
    low, high = (np.exp(np.interp(np.log(grid), logs, np.log(bands[name][end]))) for end in ("low", "high"))
    axes.fill_between(grid, low, high, color=INK, alpha=0.15, lw=0)
    return True


def loss_curves(study: Study, against: str) -> Picture | None:
    """Training loss of every run against FLOPs or tokens (`against` "flops_6n" or "tokens"), coloured by model size."""
    if study.curves.empty or against not in study.curves:
        return None
    sizes = study.runs.set_index("run")["n"]
    groups = {run: rows for run, rows in study.curves.groupby("run") if number(sizes.get(run)) > 0}
    drawn = {run: smooth(rows, against) for run, rows in groups.items()}
    drawn = {run: xy for run, xy in drawn.items() if len(xy[0])}
    if not drawn:
        return None
    held = None if study.held_out is None else study.held_out["run"]
    order = distinct_sizes(sizes[run] for run in drawn if run != held or len(drawn) == 1)
    figure, axes = panel(5.6, 4.6)
    axes.set(xscale="log", yscale="log")
    palette = dict(zip(order, _stretched(order), strict=True))
    for run in sorted(drawn, key=lambda r: sizes[r]):
        style: dict[str, Any] = (
            {"color": ACCENT, "lw": 1.8, "zorder": 4}
            if run == held
            else {"color": palette[_nearest(order, sizes[run])], "lw": 1.1}
        )
        axes.plot(*drawn[run], gid=hover(f"{run!s}: N {count(sizes[run])}"), **style)
    _crop_start(axes, list(drawn.values()))
    frontier = _frontier(axes, study) if against == "flops_6n" else None
    log_axis(axes, "x", power if against == "flops_6n" else count)
    log_axis(axes, "y", lambda v: f"{v:g}", subs=(1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8))
    axes.set_xlabel("training FLOPs so far (6ND)" if against == "flops_6n" else "tokens so far")
    axes.set_ylabel("training loss, nats per token")
    chosen = (
        order
        if len(order) <= KEY_ENTRIES
        else [order[round(i * (len(order) - 1) / (KEY_ENTRIES - 1))] for i in range(KEY_ENTRIES)]
    )
    entries = [(count(size), palette[size]) for size in chosen]
    key(axes, "size N", [*entries, *([("predicted", ACCENT)] if held in drawn else [])])
    words = "The dashed line is the fitted frontier of held-out loss. " if frontier else ""
    mark = "The heavy curve is the run predicted beforehand. " if held in drawn else ""
    return finish(
        figure,
        f"curves-{'flops' if against == 'flops_6n' else against}",
        f"Training loss of {len(drawn)} runs against {'FLOPs' if against == 'flops_6n' else 'tokens'}, coloured by "
        "size.",
        f"Training loss, a running mean over {100 * SMOOTHING:.0f} % of each run, coloured by N; "
        f"the fast first fall is cut off. {mark}{words}",
    )


def smooth(rows: pd.DataFrame, against: str) -> tuple[np.ndarray, np.ndarray]:
    """Centred running mean of the loss in SMOOTHING of the rows, thinned to CURVE_POINTS evenly in log x."""
    rows = rows[(rows[against] > 0) & (rows["loss"] > 0) & np.isfinite(rows["loss"])].sort_values(against)
    x, y = rows[against].to_numpy(float), rows["loss"].to_numpy(float)
    if len(x) < 2:
        return np.empty(0), np.empty(0)
    half = max(0, int(len(y) * SMOOTHING) // 2)
    total = np.concatenate([[0.0], np.cumsum(y)])
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    mean = (total[high] - total[low]) / (high - low)
    at = np.unique(np.searchsorted(x, np.geomspace(x[0], x[-1] * (1 - 1e-12), CURVE_POINTS)))
    at = np.unique(np.append(at, len(x) - 1))
    return x[at], mean[at]


def _frontier(axes: Axes, study: Study) -> bool:
    part = study.approach2.get("frontier")
    fit = [number(part.get(k)) for k in ("E", "K", "gamma")] if isinstance(part, Mapping) else [np.nan]
    if not np.isfinite(fit).all() or not study.budgets:
        return False
    low, high = axes.get_xlim()
    grid = np.geomspace(max(low, study.budgets[0] / 2), high, 60)
    axes.plot(grid, fit[0] + fit[1] * grid ** -fit[2], color=INK, lw=1.3, ls=(0, (4, 3)), zorder=5)
    return True


def distinct_sizes(sizes: Iterable[float]) -> list[float]:
    """Sizes in order, those within 3 % of the one before left out: one model, counted a rounding apart."""
    kept: list[float] = []
    for size in sorted(sizes):
        if not kept or size > 1.03 * kept[-1]:
            kept.append(float(size))
    return kept


def _nearest(order: list[float], size: float) -> float:
    return min(order, key=lambda known: abs(np.log(known / size)))


def _stretched(order: list[float]) -> list[str]:
    """Colours by the logarithm of the size, not by its rank."""
    steps = sequence(12)
    logs = np.log(order)
    share = (logs - logs[0]) / max(np.ptp(logs), 1e-9) if len(order) > 1 else np.array([0.6])
    return [steps[round(float(s) * (len(steps) - 1))] for s in share]


def _crop_start(axes: Axes, drawn: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Leave out the first tenth of each run where it alone would stretch the axes: the fall from ln(vocabulary)."""
    after = [(x[x >= x[-1] / 10], y[x >= x[-1] / 10]) for x, y in drawn]
    low, high = min(float(y.min()) for _, y in after), max(float(y.max()) for _, y in after)
    axes.set_ylim(low / 1.03, high * 1.03)
    axes.set_xlim(min(float(x[0]) for x, _ in after) / 1.2, 1.25 * max(float(x[-1]) for x, _ in after))
