"""One cell to an ablation: the variants of a base run, each matched with it in parameters or in training FLOPs."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamax.accounting import count_params, horizon
from llamax.config.ablate import Ablate, Match
from llamax.config.components import DenseMlp
from llamax.config.run import HORIZONS, RunConfig
from llamax.config.style import resolve_rules
from llamax.errors import UserError
from llamax.sweep.expand import number, safe

BASE = "base"
Build = Callable[[Sequence[str]], RunConfig]
"""A run from the base's own overrides and further ones."""


@dataclass(frozen=True)
class Variant:
    """One variant of a base run: its name, its overrides on the base, tags for the ledger, how it was matched.

    Tags: `variant`, `match` (the ways of matching it stands for, joined by +; of the base `base`), `matched` (within
    the tolerance), `ablate.<axis>` (its level), and before matching `params_unmatched`, `flops_unmatched`.
    """

    name: str
    texts: tuple[str, ...]
    tags: Mapping[str, Any]
    said: str


@dataclass(frozen=True)
class _Level:
    name: str
    texts: tuple[str, ...]


def variants(base: RunConfig, ablate: Ablate, build: Build) -> list[Variant]:
    """The base and its variants at one size, the base first.

    Every variant has the base's learning rate, batch and steps unless its axis or `match: flops` changes them.

    Args:
        build: makes the run of the base's overrides and further ones; `build(())` is `base`.

    Raises:
        UserError: a level that is no valid config, two levels that are one, or a variant that matching turns into the
            base.
    """
    levels = _told_apart(
        {axis: _levels(base, axis, path, values, build) for axis, (path, values) in ablate.axes.items()}
    )
    own = {f"ablate.{axis}": names[0].name for axis, names in levels.items()}
    told = {"matched": True, "params_unmatched": count_params(base.model).total, "flops_unmatched": _cost(base, ablate)}
    found = [Variant(BASE, (), {"variant": BASE, "match": BASE, **own, **told}, "the base of the ablation")]
    for choice in _choices(levels, ablate.mode):
        name = safe("+".join(level.name for level in choice.values()))
        tags = {"variant": name, **own, **{f"ablate.{axis}": level.name for axis, level in choice.items()}}
        texts = tuple(text for level in choice.values() for text in level.texts)
        found += _matched(base, name, texts, tags, ablate, build)
    return found


def _choices(levels: Mapping[str, Sequence[_Level]], mode: str) -> list[dict[str, _Level]]:
    """The axes of each variant that leave the base's level, which is the first."""
    if mode == "one_at_a_time":
        return [{axis: level} for axis, choices in levels.items() for level in choices[1:]]
    rows = itertools.product(*([(axis, level) for level in choices] for axis, choices in levels.items()))
    kept = [{axis: level for axis, level in row if level.texts} for row in rows]
    return [row for row in kept if row]


# ---------------------------------------------------------------- levels
def _told_apart(levels: Mapping[str, list[_Level]]) -> dict[str, list[_Level]]:
    """A level's name, with the axis before it where two axes have a level of that name (`qk_norm_layernorm`)."""
    names = Counter(level.name for choices in levels.values() for level in choices[1:])
    return {
        axis: [
            _Level(safe(f"{axis.rsplit('.', 1)[-1]}_{level.name}"), level.texts) if names[level.name] > 1 else level
            for level in choices
        ]
        for axis, choices in levels.items()
    }


def _levels(base: RunConfig, axis: str, path: str, values: Sequence[Any], build: Build) -> list[_Level]:
    """The base's level first, without overrides, then every listed one that differs from it."""
    where, here = f"ablate.{axis}", _at(base, path)
    own: str | None = None
    others: dict[str, _Level] = {}
    configs: dict[str, str] = {}
    for value in values:
        name, entry = _level_name(axis, value), value
        if name in others or (isinstance(value, Mapping) and isinstance(here, Mapping) and name == here.get("kind")):
            name = _level_name(axis, value, whole=True)
        if isinstance(value, str) and isinstance(here, Mapping) and "kind" in here:
            entry = {"kind": value}
        texts = (f"{path}={json.dumps(resolve_rules(entry, _known(base), where))}", *_horizon_cleared(base, path))
        try:
            config = build(texts)
        except UserError as error:
            raise UserError(f"{where}={value!r}: {error}") from None
        if config == base:
            own = name
        elif config.hash8 in configs or name in others:
            raise UserError(f"{where}: {value!r} repeats {configs.get(config.hash8, name)!r}; name each level once")
        else:
            others[name], configs[config.hash8] = _Level(name, texts), name
    if not others:
        raise UserError(f"{where}: {list(values)!r} has no level but the base's own; add one that differs")
    return [_Level(own or _own_name(axis, here, others), ()), *others.values()]


def _own_name(axis: str, here: Any, others: Mapping[str, Any]) -> str:
    name = _level_name(axis, here.get("kind", "base") if isinstance(here, Mapping) else here)
    return name if name not in others else f"{name}.base"


def _level_name(axis: str, value: Any, whole: bool = False) -> str:
    """`gelu`, `theta500000`, `qk_norm_none`: a kind, or fields, or the last part of the axis and a value.

    `whole`: kind and fields (`rope.theta500000`), where the kind alone does not tell levels apart.
    """
    if isinstance(value, Mapping):
        if "kind" in value and not whole:
            return safe(str(value["kind"]))
        fields = {k: v for k, v in value.items() if k != "kind" and not isinstance(v, Mapping | list)}
        named = [f"{k}{number(v)}" if _is_number(v) else f"{k}_{v}" for k, v in fields.items()]
        return safe(".".join([*([str(value["kind"])] if "kind" in value else []), *named]) or axis)
    short = axis.rsplit(".", 1)[-1]
    if isinstance(value, str) and "." not in axis:
        return safe(value)
    return safe(f"{short}{number(value)}" if _is_number(value) else f"{short}_{'none' if value is None else value}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at(config: RunConfig, path: str) -> Any:
    node: Any = config.as_dict()
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            raise UserError(f"ablate: the base run has no field {path} ({key} is missing); check the name")
        node = node[key]
    return node


def _known(base: RunConfig) -> dict[str, int]:
    """What a rule in a level may be `of`, as in a style."""
    model, attention = base.model, base.model.attention
    width = model.mlp.d_ff if isinstance(model.mlp, DenseMlp) else model.mlp.expert.d_ff
    sizes = {"heads": attention.heads, "head_dim": attention.head_dim, "d_ff": width}
    return {"width": model.d_model, "max_seq_len": model.max_seq_len, **sizes}


def _horizon_cleared(base: RunConfig, path: str) -> tuple[str, ...]:
    """Where an axis sets a horizon, the base's own is taken away."""
    name = path.removeprefix("train.")
    own = next(h for h in HORIZONS if getattr(base.train, h) is not None)
    return (f"train.{own}=null",) if name in HORIZONS and name != own else ()


# ---------------------------------------------------------------- matching
def _matched(
    base: RunConfig, name: str, texts: tuple[str, ...], tags: Mapping[str, Any], ablate: Ablate, build: Build
) -> list[Variant]:
    """A variant once for each way of matching; ways that lead to the same run share it."""
    plain_texts = (*texts, *_steps(base, texts, horizon(base).steps))
    plain = build(plain_texts)
    told = {"params_unmatched": count_params(plain.model).total, "flops_unmatched": _cost(plain, ablate)}
    found: dict[str, Variant] = {}
    for mode in ablate.matches:
        more = _adjustment(base, plain, texts, mode, ablate, build)
        config = build((*plain_texts, *more))
        if _same_run(config, base):
            raise UserError(f"ablate: {name} matched by {mode} is the base itself; use match: none for this axis")
        if config.hash8 in found:
            before = found[config.hash8]
            both = f"{before.tags['match']}+{mode}"
            matched = before.tags["matched"] and _off(config, base, mode, ablate) <= ablate.tolerance
            found[config.hash8] = Variant(
                before.name, before.texts, {**before.tags, "match": both, "matched": matched}, before.said
            )
            continue
        off = _off(config, base, mode, ablate)
        label = name if not found else f"{name}.{mode}"
        own = {"match": mode, "matched": off <= ablate.tolerance}
        said = _sentence(base, plain, config, mode, ablate)
        found[config.hash8] = Variant(label, (*plain_texts, *more), {**tags, **own, **told}, said)
    return list(found.values())


def _adjustment(
    base: RunConfig, plain: RunConfig, texts: tuple[str, ...], mode: Match, ablate: Ablate, build: Build
) -> tuple[str, ...]:
    """Overrides that match `plain` with the base; none where it is within the tolerance already."""
    if mode == "none" or _off(plain, base, mode, ablate) <= ablate.tolerance:
        return ()
    if mode == "flops":
        steps = horizon(plain).steps * _cost(base, ablate) / _cost(plain, ablate)
        return (f"train.steps={max(1, round(steps))}",)
    path, width = _width(plain)

    def size(d_ff: int) -> int:
        return _count(build((*texts, f"{path}={d_ff}")), mode)

    here, there = size(width), size(2 * width)
    if there == here:
        return ()  # a stack whose blocks set their own widths
    wanted = width + (_count(base, mode) - here) * width / (there - here)  # the count is linear in the width
    return (f"{path}={max(1, round(wanted / ablate.multiple)) * ablate.multiple}",)


def _steps(base: RunConfig, texts: Sequence[str], steps: int) -> tuple[str, ...]:
    """The base's number of steps as an override, unless the variant has a horizon of its own."""
    names = [text.partition("=")[0] for text in texts]
    if any(name == f"train.{h}" for name in names for h in HORIZONS):
        return ()
    own = next(h for h in HORIZONS if getattr(base.train, h) is not None)
    return () if own == "steps" else (f"train.{own}=null", f"train.steps={steps}")


def _width(config: RunConfig) -> tuple[str, int]:
    mlp = config.model.mlp
    return ("model.mlp.d_ff", mlp.d_ff) if isinstance(mlp, DenseMlp) else ("model.mlp.expert.d_ff", mlp.expert.d_ff)


def _count(config: RunConfig, mode: Match) -> int:
    params = count_params(config.model)
    return params.total if mode == "params" else params.active_matmul


def _cost(config: RunConfig, ablate: Ablate) -> float:
    return horizon(config).flops[ablate.flops]


def _off(config: RunConfig, base: RunConfig, mode: Match, ablate: Ablate) -> float:
    """The relative difference in what `mode` matches."""
    if mode == "none":
        return 0.0
    if mode == "flops":
        return abs(_cost(config, ablate) / _cost(base, ablate) - 1)
    return abs(_count(config, mode) / _count(base, mode) - 1)


def _same_run(config: RunConfig, base: RunConfig) -> bool:
    """Whether two runs are one but for the way their steps are asked for."""

    def told(run: RunConfig) -> str:
        data = run.as_dict()
        train = {k: v for k, v in data["train"].items() if k not in HORIZONS}
        sections = {name: data[name] for name in ("model", "data", "optimizer", "schedule")}
        return json.dumps([sections, train, horizon(run).steps], sort_keys=True)

    return told(config) == told(base)


def _sentence(base: RunConfig, plain: RunConfig, config: RunConfig, mode: Match, ablate: Ablate) -> str:
    """How a variant was matched, with both numbers before and after."""
    what = {"params": "stored parameters", "active": "N", "flops": f"training FLOPs ({ablate.flops})", "none": ""}[mode]
    if mode == "none":
        return "match = none: the base's steps, nothing else changed"
    value = (lambda c: _cost(c, ablate)) if mode == "flops" else (lambda c: float(_count(c, mode)))
    before, after, goal = value(plain), value(config), value(base)
    (_, w0), (_, w1) = _width(plain), _width(config)
    s0, s1 = horizon(plain).steps, horizon(config).steps
    how = f"d_ff {w0} -> {w1}" if w1 != w0 else f"steps {s0:,} -> {s1:,}" if s1 != s0 else "left as it is"
    within = abs(after / goal - 1) <= ablate.tolerance
    verdict = "" if within else f"; NOT within the tolerance of {ablate.tolerance:.3g}"
    moved = f"{before:.5g} -> {after:.5g}, base {goal:.5g} ({_percent(after / goal - 1)}{verdict})"
    return f"match = {mode}: {how}; {what} {moved}"


def _percent(share: float) -> str:
    return "0 %" if math.isclose(share, 0.0, abs_tol=5e-6) else f"{100 * share:+.2f} %"
