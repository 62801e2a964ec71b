"""Which runs may be compared: whole schedules, the same data, a base for every seed. Anything else is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llamax.errors import UserError

BASE = "base"
EQUAL = 0.02  # runs at one size agree this well in tokens, or in FLOPs


def checked_runs(runs: pd.DataFrame, loss: str, flops: str) -> tuple[pd.DataFrame, list[str]]:
    """The runs of an ablation in order, with `_flops`, and in words what looks odd; diverged runs have a nan loss.

    Raises:
        UserError: what `ablation` refuses.
    """
    needed = ("variant", "size", "seed", "tokens", loss, flops)
    if missing := [c for c in needed if c not in runs.columns]:
        raise UserError(f"runs: no column {missing[0]!r}; an ablation needs {', '.join(needed)}")
    frame = runs.reset_index(drop=True).copy()
    if frame.empty:
        raise UserError("runs: the table is empty; give the runs of an ablation")
    frame["match"] = frame["match"].fillna("given") if "match" in frame else "given"
    columns = (frame[column] for column in ("variant", "size", "seed"))
    frame["name"] = [f"{v} {s} seed {k}" for v, s, k in zip(*columns, strict=True)]
    words = _whole(frame, loss, flops)
    _once(frame)
    _same_data(frame)
    frame["_flops"] = frame[flops]
    _has_base(frame)
    _same_length(frame, loss)
    _not_all_equal(frame, loss)
    return frame, words


def _whole(frame: pd.DataFrame, loss: str, flops: str) -> list[str]:
    """Refuses runs that are not at the end of their schedule; takes the loss of diverged ones away."""
    status = frame["status"] if "status" in frame else pd.Series("done", index=frame.index)
    fraction = frame["fraction"].astype(float) if "fraction" in frame else pd.Series(1.0, index=frame.index)
    diverged = status == "diverged"
    short = ~diverged & ((status != "done") | ~(fraction > 0.999))
    if short.any():
        shown = [f"{n} ({s}, {_percent(f)})" for n, s, f in zip(frame["name"], status, fraction, strict=True)]
        listed = [text for text, bad in zip(shown, short, strict=True) if bad]
        raise UserError(
            f"{len(listed)} of {len(frame)} runs are not at the end of their schedule: {_few(listed)}; losses at "
            "different fractions of a schedule are not comparable: finish them, or name the sizes that are whole"
        )
    frame.loc[diverged, loss] = np.nan
    ended = frame[~diverged]
    values = ended[[loss, flops, "tokens"]].astype(float)
    wrong = ~(np.isfinite(values) & (values > 0)).all(axis=1)
    if wrong.any():
        column = next(c for c in (loss, flops, "tokens") if not (np.isfinite(values[c]) & (values[c] > 0)).all())
        bad = ended[wrong].iloc[0]
        raise UserError(f"{bad['name']}: {column} = {bad[column]!r}; give finished runs with positive numbers")
    return [f"{name} diverged" for name in frame["name"][diverged]]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} % of its steps" if np.isfinite(fraction) else "steps unknown"


def _once(frame: pd.DataFrame) -> None:
    again = frame[frame.duplicated(["variant", "match", "size", "seed"], keep=False)]
    if len(again):
        name = again.iloc[0]["name"]
        times = int((again["name"] == name).sum())
        raise UserError(f"{name} is there {times} times; a run counts once: drop the copies, or tell the sizes apart")


def _same_data(frame: pd.DataFrame) -> None:
    known = frame["fingerprint"].dropna() if "fingerprint" in frame else pd.Series(dtype=object)
    if known.nunique() > 1:
        odd = frame.loc[known[known != known.mode().iloc[0]].index[0], "name"]
        seen = ", ".join(str(text)[:8] for text in known.unique())
        raise UserError(
            f"{odd} was trained on other data than most (fingerprints {seen}); compare runs of one token store"
        )


def _has_base(frame: pd.DataFrame) -> None:
    base = frame[frame["variant"] == BASE]
    if base.empty:
        names = ", ".join(map(str, frame["variant"].unique()[:6]))
        raise UserError(f"no run is the base: variants are {names}; name the base's variant {BASE!r}")
    if len(base) == len(frame):
        raise UserError("all runs are the base; give the runs of one variant or more")
    there = set(zip(base["size"], base["seed"], strict=True))
    for row in frame[frame["variant"] != BASE].to_dict("records"):
        if (row["size"], row["seed"]) not in there:
            raise UserError(f"{row['name']} has no base run of that size and seed to be paired with")


def _same_length(frame: pd.DataFrame, loss: str) -> None:
    """At one size, the tokens or the FLOPs of a variant are the base's; a diverged run has neither and is not asked."""
    for size, rows in frame.groupby("size", sort=False):
        whole = rows[rows[loss].notna()]
        if not (whole["variant"] == BASE).any():
            raise UserError(f"{size}: every run of the base diverged; leave the size out")
        base = whole[whole["variant"] == BASE].iloc[0]
        seeds = set(rows[rows["variant"] == BASE]["seed"])
        for variant, mine in rows.groupby("variant", sort=False):
            tokens, flops = (mine[c].astype(float) / float(base[c]) for c in ("tokens", "_flops"))
            far = mine[loss].notna() & (np.abs(tokens - 1) > EQUAL) & (np.abs(flops - 1) > EQUAL)
            if far.any():
                times = f"{tokens[far].iloc[0]:.3g} x the tokens and {flops[far].iloc[0]:.3g} x the FLOPs"
                raise UserError(
                    f"{variant} {size} was trained on {times} of the base; an ablation has one of them equal"
                )
            for match, part in mine.groupby("match", sort=False):
                if variant != BASE and set(part["seed"]) != seeds:
                    lacking = ", ".join(str(s) for s in sorted(seeds - set(part["seed"])))
                    raise UserError(f"{variant} {size} ({match}) has no run of seed {lacking}, which the base has")


def _not_all_equal(frame: pd.DataFrame, loss: str) -> None:
    for (variant, size, _), rows in frame.groupby(["variant", "size", "match"], sort=False):
        values = rows[loss].dropna()
        if len(values) > 1 and values.nunique() == 1:
            raise UserError(
                f"{variant} {size}: {len(values)} seeds have exactly the loss {values.iloc[0]:g}; are they one run?"
            )


def _few(items: list[str], most: int = 4) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
