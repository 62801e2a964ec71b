"""What the study found and what to doubt, in sentences made from its numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llamax.report.read import number
from llamax.report.words import count, decimals, interval, plural, power

if TYPE_CHECKING:
    from llamax.report.study import Study

_EXPONENT = re.compile(r"\b\d+(?:\.\d+)?e[+-]?\d+\b")  # 1.5e+12, which a reader sees as 1.5×10¹²
MOST_NAMES = 4  # names written out in a sentence before "and so many more"


def question(study: Study) -> str:
    """What was asked, in one sentence."""
    target = number(study.prediction.get("flops"))
    if target > 0:
        given = f"Given {power(target)} training FLOPs"
        return f"{given}, how large a model, trained on how many tokens, and what will its loss be?"
    return "How should training compute be split between model size and tokens, and what loss does it buy?"


def answer(study: Study) -> list[str]:
    """What was found: one sentence a finding, least surprising first; says what is missing instead of guessing."""
    claim, words = study.prediction, []
    done, planned = int(study.runs["status"].eq("done").sum()), len(study.plan.get("cells") or ())
    runs = f"{plural(done, 'run')} finished" + (
        f" of {max(planned, len(study.runs))}" if max(planned, len(study.runs)) > done else ""
    )
    if study.valleys:
        inside = sum(bool(v.get("interior")) for v in study.valleys)
        words.append(
            f"{runs}; {inside} of {plural(len(study.valleys), 'compute budget')} have their loss minimum inside the "
            "grid of sizes."
        )
    else:
        words.append(f"{runs}; no fit of approach 2 has been stored yet.")
    words += _exponents(study)
    advice = claim.get("recommendation")
    if isinstance(advice, Mapping) and number(advice.get("n")) > 0:
        ratio = advice.get("tokens_per_param", number(advice.get("d")) / advice["n"])
        words.append(
            f"At {power(claim.get('flops'))} FLOPs the fit recommends {count(advice['n'])} parameters on "
            f"{count(advice.get('d'))} tokens ({decimals(ratio, significant=3)} tokens per parameter)."
        )
    if not number(claim.get("loss")) > 0:
        return [*words, "No prediction has been written down yet."]
    words.append(
        f"For the run to be trained ({count(claim.get('n'))} parameters, {count(claim.get('d'))} tokens) it predicted "
        f"{decimals(claim['loss'], 4)} nats per token, {_level(claim)} interval {interval(claim.get('interval'))}."
    )
    return [*words, verdict(study)]


def verdict(study: Study) -> str:
    """How the prediction did against the run, in one sentence."""
    claim = study.prediction
    loss, measured, bounds = number(claim.get("loss")), number(claim.get("measured")), claim.get("interval")
    if not measured > 0:
        held = study.held_out
        state = f" (its status: {held['status']})" if held is not None else ""
        return f"The predicted run has not been measured yet{state}."
    signed = 100 * (measured / loss - 1)
    words = f"Measured: {measured:.4f}, {abs(signed):.2f} % {'above' if signed > 0 else 'below'} the prediction, "
    inside = within(claim)
    if inside is None:
        return words + "which came without an interval."
    return words + (
        f"inside the {_level(claim)} interval."
        if inside
        else f"outside the {_level(claim)} interval {interval(bounds)}."
    )


def within(claim: Mapping[str, Any]) -> bool | None:
    """Whether the measured loss lies inside the predicted interval; None when either is missing."""
    bounds, measured = claim.get("interval"), number(claim.get("measured"))
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2 or not measured > 0:
        return None
    return number(bounds[0]) <= measured <= number(bounds[1])


def warnings(study: Study) -> list[str]:
    """What a reader must know before believing the numbers, each once, the gravest first."""
    words = [*_about_claim(study), *_about_valleys(study), *_about_runs(study), *(f"{p}." for p in study.problems)]
    return list(dict.fromkeys(words))


def remarks(study: Study) -> list[str]:
    """The warnings that the plan, the fits and the prediction carry themselves, each once, as sentences."""
    words = []
    for part in (study.plan, study.fits, study.approach2, study.approach3, study.coupled, study.prediction):
        draws = part.get("bootstrap")
        given = [*_texts(part.get("warnings")), *_texts(draws.get("warnings") if isinstance(draws, Mapping) else None)]
        words += [w[:1].upper() + w[1:].rstrip(".") + "." for w in given if w]
    return [_EXPONENT.sub(lambda m: power(float(m[0]), 3), word) for word in dict.fromkeys(words)]


# ---------------------------------------------------------------- parts
def _about_claim(study: Study) -> list[str]:
    if within(study.prediction) is False:
        return [f"The prediction's interval was missed. {verdict(study)}"]
    held = study.held_out
    if held is not None and held["status"] in ("diverged", "failed"):
        return [f"The run that was to check the prediction {held['status']}: the prediction stands unchecked."]
    return []


def _about_valleys(study: Study) -> list[str]:
    if not study.valleys:
        return []
    words, off = [], [power(v["budget"]) for v in study.valleys if not v.get("interior")]
    if off:
        words.append(
            f"The minimum is off the grid at {plural(len(off), 'budget')} (C = {', '.join(off)}): "
            "widen the sizes there."
        )
    inside = len(study.valleys) - len(off)
    if inside < 3:
        words.append(
            f"Only {plural(inside, 'budget')} with an interior minimum: fewer than three cannot check a power law."
        )
    return words


def _about_runs(study: Study) -> list[str]:
    runs, words = study.runs, []
    for status, tail in (
        ("diverged", "left out of the fits"),
        ("failed", "left out of the fits"),
        ("unfinished", "stopped before the end and left out of the fits"),
        ("running", "still training and not in the fits"),
    ):
        which = runs[runs["status"].eq(status)]
        if len(which):
            causes = [
                f"{row['run']} ({row['cause']})" if row["cause"] else row["run"] for row in which.to_dict("records")
            ]
            words.append(f"{plural(len(which), 'run')} {status}, {tail}: {_names(causes)}.")
    planned, found = study.plan.get("cells"), len(runs)
    if isinstance(planned, list) and len(planned) > found:
        words.append(f"{plural(len(planned) - found, 'planned run')} not started yet.")
    repeated = runs[runs["epochs"] > 1]
    if len(repeated):
        most = repeated["epochs"].max()
        words.append(
            f"{plural(len(repeated), 'run')} repeated data (up to {most:.2g} epochs): "
            "repeated tokens are worth less than new ones."
        )
    prints = runs["fingerprint"].dropna().unique()
    if len(prints) > 1:
        words.append(
            f"The runs were trained on {len(prints)} different data sets (fingerprints differ): "
            "their losses are not comparable."
        )
    for row in runs[runs["warnings"].notna()].to_dict("records"):
        words.append(f"{row['run']}: {row['warnings']}.")
    return words


def _exponents(study: Study) -> list[str]:
    fit, bounds = study.approach2, study.approach2.get("intervals") or {}
    parts = []
    for name, key in (("N", "n_exponent"), ("D", "d_exponent")):
        if not math.isfinite(number(fit.get(key))):
            return []
        span = f" {interval(bounds[key], 3)}" if bounds.get(key) else ""
        parts.append(f"the best {name} grows as C^{number(fit[key]):.3f}{span}")
    return [f"By approach 2 {' and '.join(parts)}."]


def _level(claim: Mapping[str, Any]) -> str:
    return f"{100 * number(claim.get('level', 0.95)):.0f} %"


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else []


def _names(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
