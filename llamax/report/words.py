"""Numbers as a reader wants them: 1.2×10¹², 45.1 k, 2 min 31 s. A missing number is an en dash."""

from __future__ import annotations

import math
from typing import Any

from llamax.report.read import number

MISSING = "–"
# The parametric laws by their names in the fits.
FORMULAS = {"approach3": "L(N, D) = E + A / N^α + B / D^β", "coupled": "L(N, D) = E + (A / N^α + B / D^β)^γ"}
SHORT_LAWS = {"approach3": "approach 3", "coupled": "coupled law"}
LAWS = {key: f"{SHORT_LAWS[key][:1].upper()}{SHORT_LAWS[key][1:]}, {FORMULAS[key]}" for key in FORMULAS}
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def power(value: Any, digits: int = 2) -> str:
    """Scientific notation with `digits` significant digits: 3.2×10¹²; a bare 10¹² for a power of ten."""
    x = number(value)
    if not math.isfinite(x):
        return MISSING
    mantissa, _, exponent = f"{x:.{digits - 1}e}".partition("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    raised = f"10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return raised if mantissa == "1" else f"{mantissa}×{raised}" if x else "0"


def count(value: Any, digits: int = 3) -> str:
    """A count with a unit prefix, `digits` significant digits: 980, 45.1 k, 3.2 M, 1.5 B (billion), 2 T."""
    x = number(value)
    if not math.isfinite(x):
        return MISSING
    scale, prefix = next(
        ((s, p) for s, p in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if abs(x) >= 0.9995 * s), (1, "")
    )
    text = f"{x / scale:.{digits}g}"
    return f"{float(text):g}\u00a0{prefix}" if prefix else f"{float(text):g}"


def decimals(value: Any, places: int | None = None, *, significant: int | None = None) -> str:
    """`value` with fixed `places`, or with so many `significant` digits."""
    x = number(value)
    if not math.isfinite(x):
        return MISSING
    return f"{x:.{significant}g}" if significant else f"{x:.{places or 0}f}"


def duration(value: Any) -> str:
    """Seconds as 0.8 s, 45 s, 2 min 31 s, 3 h 5 min."""
    x = number(value)
    if not math.isfinite(x):
        return MISSING
    if x < 10:
        return f"{x:.1f} s"
    seconds = round(x)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def interval(pair: Any, places: int = 4, *, significant: int | None = None) -> str:
    """[low, high], each as `decimals` writes it, or an en dash."""
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return MISSING
    low, high = (decimals(end, places, significant=significant) for end in pair)
    return f"[{low},\u00a0{high}]"


def plural(n: int, noun: str) -> str:
    """`1 run`, `3 runs`, `1,024 hosts`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
