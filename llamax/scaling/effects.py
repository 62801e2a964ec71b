"""An ablation's runs to its findings: effects against the base, what could be seen, gain in compute and its trend."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llamax.errors import UserError
from llamax.scaling.gain import DRAWS, fit_base, gains, redraw, trend
from llamax.scaling.laws import plain
from llamax.scaling.paired import ALPHA, POWER, contrasts_of, detectable, holm, noise_of, uneven
from llamax.scaling.runs import BASE, checked_runs

UNITS = ("nats", "log")


@dataclass(frozen=True)
class Ablation:
    """Findings as tables, one row a finding. Effects are variant less base, so that negative is better.

    effects: `match, size, variant, seeds, loss, base_loss, effect, low, high, p, p_holm, own_low, own_high, own_p,
    detectable, detectable_holm` and, for orientation, `params, flops, tokens` and `params_off, flops_off` (relative to
    the base), `params_off_unmatched, flops_off_unmatched` (before matching; nan where unknown).
    factors (a full factorial): main effects and two-way interactions of the axes' levels, averaged over the others.
    noise: `match, size, seeds, paired, df, between_seeds, shared`. gains: `match, variant, size, gain, low, high`.
    trends: `match, variant, factor, low, high`, per decade of the base's compute. laws: the base's law of each match.
    words: what was left out or looks wrong, in sentences; rules: how the numbers were made.
    """

    effects: pd.DataFrame
    factors: pd.DataFrame
    noise: pd.DataFrame
    gains: pd.DataFrame
    trends: pd.DataFrame
    laws: pd.DataFrame
    words: tuple[str, ...]
    rules: tuple[str, ...]
    unit: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data, None for what is not known."""
        tables = ("effects", "factors", "noise", "gains", "trends", "laws")
        rows = {
            name: [{k: plain(v) for k, v in row.items()} for row in getattr(self, name).to_dict("records")]
            for name in tables
        }
        return {**rows, "words": list(self.words), "rules": list(self.rules), "unit": self.unit}


def ablation(
    runs: pd.DataFrame,
    *,
    loss: str = "eval_loss",
    flops: str = "flops_causal",
    unit: str = "nats",
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Ablation:
    """Compares every variant with the base at every size.

    Args:
        runs: one row a run, as `llamax.ablation_runs` gives it: `variant` ("base" for the base), `size`, `seed`, the
            columns `loss` and `flops`, `tokens`; optionally `match` (ways joined by +), `status`, `fraction` (of the
            schedule), `fingerprint` (of the data), `ablate.<axis>` (levels), `params_total`, `params_unmatched`,
            `flops_unmatched`.
        unit: "nats" per token, or "log" for differences of log loss.
        level: of the intervals.
        draws, seed: of the intervals of gains and trends.

    Raises:
        UserError: runs at different fractions of their schedule or on different data, no base, repeated runs, losses
            that are no losses; names the runs.
    """
    if unit not in UNITS:
        raise UserError(f"unit={unit!r}: give one of {', '.join(UNITS)}")
    frame, words = checked_runs(runs, loss, flops)
    effects, noise, factors = [], [], []
    blocks = list(_blocks(frame, loss, words))
    if not blocks:
        raise UserError("no variant has all its runs: every one diverged, so there is nothing to compare")
    for match, size, table, rows in blocks:
        values = np.log(table.to_numpy()) if unit == "log" else table.to_numpy()
        effects += _effects(match, size, table, values, rows, flops, level)
        noise.append({"match": match, "size": size, **_noise(values)})
        factors += _factors(match, size, list(table.columns), values, rows, level)
        words += [
            f"{size}: the runs of {table.columns[i]} scatter more than the others; trust its own interval, not the "
            "pooled one"
            for i in uneven(values)
        ]
    found, parts = pd.DataFrame(effects), pd.DataFrame(factors)
    _corrected(found)
    _corrected(parts)
    if (found["seeds"] == 1).any():
        words.append("one seed: effects have no interval and no test; repeat with seeds: 3 or more")
    gain, slopes, laws = _gains(blocks, flops, level, draws, seed, words)
    rules = _rules(found, parts, unit, level, flops)
    return Ablation(
        found, parts, pd.DataFrame(noise), gain, slopes, laws, tuple(dict.fromkeys(words)), tuple(rules), unit
    )


# ---------------------------------------------------------------- blocks
class Block(NamedTuple):
    """The runs that are compared at one size: losses [seed, variant] with the base first, and a row of each variant."""

    match: str
    size: str
    losses: pd.DataFrame
    rows: pd.DataFrame


def _blocks(frame: pd.DataFrame, loss: str, words: list[str]) -> Iterator[Block]:
    """By match, then by size in order of the base's compute; variants that are not whole are left out, in words."""
    for match, size, rows in _groups(frame):
        table = rows.pivot(index="seed", columns="variant", values=loss)
        names = [BASE, *(v for v in rows["variant"].unique() if v != BASE)]
        table = table[names].dropna(axis="index", subset=[BASE])
        whole = [v for v in names if table[v].notna().all()]
        for name in (v for v in names if v not in whole):
            ended, there = int(table[name].notna().sum()), len(table)
            words.append(f"{size}: {name} is left out, {there - ended} of its {there} runs diverged")
        if len(whole) > 1:
            first = rows[rows["seed"] == table.index[0]].set_index("variant")
            yield Block(match, size, table[whole], first.loc[whole])


def _groups(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Match, size and their runs, the base's among them; sizes in order of the base's compute."""
    ways = list(dict.fromkeys(w for m in frame["match"] for w in str(m).split("+") if w != BASE))
    sizes = frame[frame["variant"] == BASE].groupby("size", sort=False)["_flops"].mean().sort_values().index
    for way in ways:
        mine = frame["match"].map(lambda m, way=way: way in str(m).split("+"))
        for size in sizes:
            yield way, str(size), frame[(frame["size"] == size) & (mine | (frame["variant"] == BASE))]


def _effects(
    match: str, size: str, table: pd.DataFrame, values: np.ndarray, rows: pd.DataFrame, flops: str, level: float
) -> list[dict[str, Any]]:
    names = list(table.columns)
    weights = np.eye(len(names))[1:] - np.eye(len(names))[0]
    found, noise = contrasts_of(values, weights, level), noise_of(values)
    told: dict[Any, Any] = rows.to_dict("index")
    base, result = told[BASE], []
    for i, name in enumerate(names[1:]):
        row = told[name]
        off = {
            "params_off": _share(row, base, "params_total"),
            "flops_off": _share(row, base, flops),
            "params_off_unmatched": _share(row, base, "params_unmatched"),
            "flops_off_unmatched": _share(row, base, "flops_unmatched"),
        }
        result.append(
            {
                "match": match,
                "size": size,
                "variant": name,
                "seeds": len(table),
                "loss": float(table[name].mean()),
                "base_loss": float(table[BASE].mean()),
                "effect": found.estimate[i],
                "low": found.low[i],
                "high": found.high[i],
                "p": found.p[i],
                "own_low": found.own_low[i],
                "own_high": found.own_high[i],
                "own_p": found.own_p[i],
                "_se": found.se[i],
                "_df": noise.df,
                "params": float(row.get("params_total", np.nan)),
                "flops": float(row[flops]),
                "tokens": float(row["tokens"]),
                **off,
            }
        )
    return result


def _share(row: Mapping[str, Any], base: Mapping[str, Any], column: str) -> float:
    return float(row[column]) / float(base[column]) - 1 if row.get(column) and base[column] else np.nan


def _noise(values: np.ndarray) -> dict[str, Any]:
    noise = noise_of(values)
    return {
        "seeds": len(values),
        "paired": noise.paired,
        "df": noise.df,
        "between_seeds": noise.seeds,
        "shared": noise.shared,
    }


def _corrected(found: pd.DataFrame) -> None:
    """Adds Holm's p values and what could be detected, alone and beside all other comparisons of the table."""
    if found.empty:
        return
    tests = int(np.isfinite(found["p"]).sum())
    found["p_holm"] = holm(found["p"].to_numpy())
    pairs = list(zip(found.pop("_se"), found.pop("_df"), strict=True))
    found["detectable"] = [detectable(se, df) for se, df in pairs]
    found["detectable_holm"] = [detectable(se, df, ALPHA / max(tests, 1)) for se, df in pairs]


# ---------------------------------------------------------------- factorial
def factor_weights(levels: pd.DataFrame) -> list[tuple[str, str, np.ndarray]]:
    """Main effects and two-way interactions of a full factorial as (kind, name, weights over its rows).

    `levels` has a row a variant, the base first, and a column an axis. A main effect is a level less the base's level,
    averaged over the other axes; an interaction by how much two levels together differ from the sum of both alone.
    Empty where combinations are missing.
    """
    axes = [str(column) for column in levels if levels[column].nunique() > 1]
    if len(axes) < 2 or len(levels) != np.prod([levels[a].nunique() for a in axes]) or levels[axes].duplicated().any():
        return []
    own = levels.iloc[0]
    sign = {
        (axis, level): np.where(levels[axis] == level, 1.0, np.where(levels[axis] == own[axis], -1.0, 0.0))
        for axis in axes
        for level in levels[axis].unique()
        if level != own[axis]
    }
    mains = [("main effect", str(level), w / (w > 0).sum()) for (_, level), w in sign.items()]
    pairs = [
        ("interaction", f"{a[1]} x {b[1]}", v * w / ((v > 0) & (w > 0)).sum())
        for (a, v), (b, w) in itertools.combinations(sign.items(), 2)
        if a[0] != b[0]
    ]
    return mains + pairs


def _factors(
    match: str, size: str, names: list[str], values: np.ndarray, rows: pd.DataFrame, level: float
) -> list[dict[str, Any]]:
    levels = rows.loc[names, [c for c in rows.columns if str(c).startswith("ablate.")]]
    weights = factor_weights(levels)
    if not weights:
        return []
    found, noise = contrasts_of(values, np.array([w for _, _, w in weights]), level), noise_of(values)
    columns = ("low", "high", "p", "own_low", "own_high", "own_p")
    return [
        {
            "match": match,
            "size": size,
            "kind": kind,
            "factor": name,
            "effect": found.estimate[i],
            **{c: getattr(found, c)[i] for c in columns},
            "_se": found.se[i],
            "_df": noise.df,
        }
        for i, (kind, name, _) in enumerate(weights)
    ]


# ---------------------------------------------------------------- gain
def _gains(
    blocks: Sequence[Block], flops: str, level: float, draws: int, seed: int, words: list[str]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    rows, slopes, laws = [], [], []
    for match in dict.fromkeys(block.match for block in blocks):
        own = [block for block in blocks if block.match == match]
        if len(own) < 2:
            words.append("compute-equivalent gain needs the base's losses at two sizes or more")
            continue
        names = list(dict.fromkeys(name for block in own for name in block.losses))
        mean = np.array([[block.losses[v].mean() if v in block.losses else np.nan for block in own] for v in names])
        spent = np.array([[block.rows[flops].get(v, np.nan) for block in own] for v in names], float)
        law = fit_base(spent[0], mean[:1])
        misfit = float(np.abs(law.loss(spent[0])[0] - mean[0]).max())
        laws.append({"match": match, "E": law.E[0], "A": law.A[0], "a": law.a[0], "scale": law.scale, "misfit": misfit})
        if not law.fitted[0]:
            words.append("the base's loss does not fall with compute, so no gain can be read off it")
            continue
        point = gains(spent[0], mean[:1], spent[1:], mean[None, 1:])[0]
        slope = trend(spent[0], point[None])[0]
        drawn = _drawn(mean, spent, own, draws, seed)
        ends = _ends(drawn, level, point.shape)
        slope_ends = _ends(None if drawn is None else trend(spent[0], drawn), level, slope.shape)
        for i, name in enumerate(names[1:]):
            head = {"match": match, "variant": name}
            rows += [
                {**head, "size": block.size, "gain": point[i, s], "low": ends[0][i, s], "high": ends[1][i, s]}
                for s, block in enumerate(own)
            ]
            slopes.append({**head, "factor": slope[i], "low": slope_ends[0][i], "high": slope_ends[1][i]})
    return pd.DataFrame(rows), pd.DataFrame(slopes), pd.DataFrame(laws)


def _drawn(mean: np.ndarray, spent: np.ndarray, blocks: Sequence[Block], draws: int, seed: int) -> np.ndarray | None:
    """Gains of redrawn means, [draw, variant, size]; None where a size has no noise to draw from."""
    noise = [noise_of(block.losses.to_numpy()) for block in blocks]
    if any(each.df < 1 for each in noise):
        return None
    paired, df, shared = (np.array([getattr(each, c) for each in noise], float) for c in ("paired", "df", "shared"))
    seeds = np.array([len(block.losses) for block in blocks], float)
    again = redraw(mean, paired, df, shared, seeds, draws=draws, seed=seed)
    return gains(spent[0], again[:, 0], spent[1:], again[:, 1:])


def _ends(drawn: np.ndarray | None, level: float, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the interval over draws; draws without a law count as unlimited on either side."""
    if drawn is None:
        return np.full(shape, np.nan), np.full(shape, np.nan)
    share, hidden = (1 - level) / 2, np.isnan(drawn).all(0)
    low = np.quantile(np.where(np.isnan(drawn), 0.0, drawn), share, axis=0, method="inverted_cdf")
    high = np.quantile(np.where(np.isnan(drawn), np.inf, drawn), 1 - share, axis=0, method="inverted_cdf")
    return np.where(hidden, np.nan, low), np.where(hidden, np.nan, high)


def _rules(found: pd.DataFrame, parts: pd.DataFrame, unit: str, level: float, flops: str) -> list[str]:
    tests = int(np.isfinite(found["p"]).sum())
    what = "nats per token" if unit == "nats" else "log loss"
    rules = [
        f"effect = variant - base in {what}, paired by seed; {level:.0%} t interval with the noise of a size pooled "
        "over its variants (own_*: of the pair alone)",
        f"p_holm: Holm's correction over all {tests} comparisons with the base; * where it is below {ALPHA:g}",
        f"detectable: the smallest true effect found with probability {POWER:.0%} at {ALPHA:g} two-sided "
        f"(_holm: at {ALPHA:g}/{tests})",
        f"gain = C_base(loss) / C in {flops}, C_base from L = E + A C^-a of the base over the ladder; above 1 saves "
        "compute; interval by redrawing the pooled noise; not corrected for the number of comparisons",
        "trend = factor of the gain for each decade of the base's compute",
    ]
    if len(parts):
        number = int(np.isfinite(parts["p"]).sum())
        rules.append(f"main effects and interactions: averaged over the other axes; Holm over their own {number}")
    return rules
