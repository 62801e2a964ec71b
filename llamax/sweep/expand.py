"""Axes to points: each point of the product is a set of dotted fields, tags for the ledger and a readable name."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamax.config.merge import parse_override
from llamax.config.sweep import Axis, Design, Horizons, Isoflop, Ladder, Product, Seeds, SweepConfig, Zip
from llamax.errors import UserError


@dataclass(frozen=True)
class Point:
    """One choice of one axis, or of all of them: a name, fields to set (dotted path, value), tags."""

    label: str
    sets: tuple[tuple[str, Any], ...]
    tags: Mapping[str, Any]


def expand(spec: SweepConfig) -> list[Point]:
    """The points of a sweep, first axis slowest, with unique names; a horizons axis, whose runs hang together, is left
    to trunk.py.

    Raises:
        UserError: two axes, or an axis and `overrides` or a rule, set the same field.
    """
    _refuse_conflicts(spec)
    axes = [axis for axis in spec.axes if not isinstance(axis, Horizons)]
    rows = itertools.product(*(axis_points(axis) for axis in axes))
    return unique([_joined(row) for row in rows]) if axes else [Point(spec.name, (), {})]


def axis_points(axis: Axis) -> list[Point]:
    """The points of one axis, with names unique within it."""
    match axis:
        case Product():
            rows = list(itertools.product(*axis.fields.values()))
            return unique([_fields_point(axis.fields, row) for row in rows])
        case Zip():
            return unique([_fields_point(axis.fields, row) for row in zip(*axis.fields.values(), strict=True)])
        case Isoflop():
            short = size_labels([size for _, size in axis.pairs])
            return unique(
                [_sized(f"C{exponent(c)}-{short[m]}", m, short[m], "train.flops", "budget", c) for c, m in axis.pairs]
            )
        case Ladder():
            short = size_labels(axis.sizes)
            pairs = itertools.product(axis.sizes, axis.tokens_per_param)
            horizon, tag = "train.tokens_per_param", "tokens_per_param"
            return unique([_sized(f"{short[m]}-t{number(r)}", m, short[m], horizon, tag, r) for m, r in pairs])
        case Seeds():
            seeds = axis.values if axis.values is not None else range(axis.count or 0)
            return unique([Point(f"s{seed}", (("train.seed", seed),), {"seed": seed}) for seed in seeds])
        case Horizons():
            own = (("schedule.kind", "wsd"), ("schedule.decay", axis.decay), ("checkpoint.branch_steps", ()))
            return [Point(number(value), ((f"train.{axis.field}", value), *own), {}) for value in axis.values]
        case Design():
            raise UserError("axes: a design has no cells until its axes are chosen; `llamax sweep plan` does")


def unique(points: Sequence[Point]) -> list[Point]:
    """The same points, a number added to every name that is taken: `a, b, a` becomes `a, b, a-2`."""
    taken: set[str] = {point.label for point in points}
    seen: Counter[str] = Counter()
    result = []
    for point in points:
        label = point.label
        seen[label] += 1
        if seen[label] > 1:
            number = seen[label]
            while f"{label}-{number}" in taken:
                number += 1
            label = f"{label}-{number}"
            taken.add(label)
        result.append(Point(label, point.sets, point.tags))
    return result


# ---------------------------------------------------------------- names
def size_labels(sizes: Sequence[str]) -> dict[str, str]:
    """`ladder/d64` -> `d64`, or `ladder-d64` where two families have a size of that name."""
    short = {size: size.rsplit("/", 1)[-1] for size in sizes}
    counts = Counter(short.values())
    return {size: safe(label if counts[label] == 1 else size.replace("/", "-")) for size, label in short.items()}


def number(value: float) -> str:
    """The shortest exact text of a number, fit for a file name: 20, 0.003, 1e9."""
    text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return re.sub(r"e([+-]?)0*(?=\d)", lambda m: "e" + m[1].replace("+", ""), text)


def exponent(value: float) -> str:
    """A budget in exponent form: 1.5e11."""
    text = next(t for digits in range(18) if float(t := f"{value:.{digits}e}") == value or digits == 17)
    return re.sub(r"e\+?(-?)0*(?=\d)", r"e\1", text)


def safe(text: str) -> str:
    """Text as one path component: anything but letters, digits and ._+- becomes `_`."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text).lstrip(".-") or "_"


def _joined(row: Sequence[Point]) -> Point:
    tags = {key: value for point in row for key, value in point.tags.items()}
    return Point("-".join(point.label for point in row), tuple(s for point in row for s in point.sets), tags)


def _sized(label: str, model: str, size: str, horizon: str, tag: str, value: float) -> Point:
    return Point(label, (("model.base", model), (horizon, value)), {tag: value, "size": size})


def _fields_point(paths: Iterable[str], values: Sequence[Any]) -> Point:
    fields = dict(zip(paths, values, strict=True))
    sets = tuple(("model.base" if path == "model" and isinstance(v, str) else path, v) for path, v in fields.items())
    label = "-".join(_label(path, value) for path, value in fields.items())
    tags = {("size" if path in ("model", "model.base") else path): _tag(path, value) for path, value in fields.items()}
    return Point(label, sets, tags)


def _label(path: str, value: Any) -> str:
    """`optimizer.lr` 0.003 -> `lr0.003`; `model.norm.kind` none -> `norm_none`; `model` ladder/d64 -> `d64`."""
    keys = path.split(".")
    if path in ("model", "model.base"):
        return safe(_tag(path, value))
    if keys[-1] == "kind" and len(keys) > 1:
        return safe(f"{keys[-2]}_{value}")
    if isinstance(value, Mapping):
        return safe(f"{keys[-1]}_{value.get('kind', '')}".rstrip("_"))
    if isinstance(value, float | int) and not isinstance(value, bool):
        return safe(f"{keys[-1]}{number(value)}")
    return safe(f"{keys[-1]}_{value}")[:40]


def _tag(path: str, value: Any) -> Any:
    if path in ("model", "model.base"):
        return str(value).rsplit("/", 1)[-1] if isinstance(value, str) else "model"
    return value


# ---------------------------------------------------------------- conflicts
def _refuse_conflicts(spec: SweepConfig) -> None:
    owners = [(".".join(parse_override(text)[0]), f"overrides ({text})") for text in spec.overrides]
    owners += [("optimizer.lr", "rules.lr")] * (spec.rules.lr is not None)
    owners += [("train.batch_size", "rules.batch")] * (spec.rules.batch is not None)
    if spec.ablate is not None:
        owners = [item for item in owners if item[0] != "train.seed"]  # the first of the ablation's seeds
        owners += [("train.seed", "ablate.seeds")]
        owners += [(path, f"ablate.{axis}") for axis, (path, _) in spec.ablate.axes.items() if path != "model"]
    for i, axis in enumerate(spec.axes):
        who = f"axes.{i} ({axis.kind})"
        for path, _ in axis_points(axis)[0].sets:
            for other, owner in owners:
                if f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}."):
                    both = path if path == other else f"{other} and {path}"
                    raise UserError(f"sweep {spec.name}: {both} is set by {owner} and by {who}; keep one of them")
            owners.append((path, who))
