"""A sweep before a FLOP is spent: every cell as a complete run config, its cost, the rule behind each number."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamax.accounting import horizon, memory_bytes
from llamax.config.ablate import Ablate
from llamax.config.load import load_run, run_from_data, validate
from llamax.config.merge import apply_override
from llamax.config.run import RunConfig
from llamax.config.sweep import Design, Horizons, Rules, SweepConfig
from llamax.errors import UserError
from llamax.storage.files import write_atomic
from llamax.sweep.ablate import variants
from llamax.sweep.expand import Point, expand, safe
from llamax.sweep.rules import resolve
from llamax.sweep.throughput import Throughput, guess
from llamax.sweep.trunk import RULES, Draft, drafts
from llamax.sweep.warn import warnings_of


@dataclass(frozen=True)
class Cell:
    """One run of a sweep and what it will cost.

    `overrides` on the sweep's base give `config`; `n`, `tokens`, `steps` are accounting's; `flops` training FLOPs by
    convention; `memory_bytes` of a step over the whole mesh; `epochs` passes over the corpus (None: size unknown);
    `rules` the sentence behind each derived number. A branch names the cell of its `trunk`; its `seconds` and
    `trained_tokens` are of its own steps, its other numbers of the whole horizon.
    """

    name: str
    config: RunConfig
    tags: Mapping[str, Any]
    overrides: tuple[str, ...]
    n: int
    tokens: int
    tokens_per_param: float
    batch: int
    steps: int
    lr: float
    flops: Mapping[str, float]
    memory_bytes: int
    seconds: float
    epochs: float | None
    rules: Mapping[str, str]
    extra: bool = False
    trunk: str | None = None

    @property
    def hash(self) -> str:
        """The eight hex digits of the run's identity."""
        return self.config.hash8

    @property
    def run_name(self) -> str:
        """The run directory's name inside the study."""
        return f"{self.name}-{self.hash}"

    @property
    def trained_tokens(self) -> int:
        """Tokens of the steps that this run takes itself."""
        branch = self.config.branch
        return self.tokens - (0 if branch is None else branch.step * self.batch * self.config.train.seq_len)

    def trained_flops(self, convention: str) -> float:
        """Training FLOPs of those tokens."""
        return self.flops[convention] * self.trained_tokens / self.tokens

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as plan.json holds it."""
        own = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "config"}
        own |= {key: dict(own[key]) for key in ("tags", "flops", "rules")} | {"overrides": list(self.overrides)}
        own["trained_tokens"] = self.trained_tokens
        return {"name": self.name, "hash": self.hash, "run": self.run_name, **own, "config": self.config.as_dict()}


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep in order, the rules all of them share, and warnings in words.

    `design` says how the axes were chosen, where llamax chose them (see sweep/design.py); `spec` then has those axes.
    """

    spec: SweepConfig
    cells: tuple[Cell, ...]
    rules: Mapping[str, str]
    warnings: tuple[str, ...]
    corpus_tokens: int | None = None
    design: Mapping[str, Any] | None = None

    @property
    def totals(self) -> dict[str, float]:
        """Number of cells; FLOPs (6 N D) as trained, and as if each run but the trunks were trained from scratch;
        worker-seconds."""
        cells = self.cells
        return {
            "cells": len(cells),
            "flops_6n": sum(c.trained_flops("6n") for c in cells),
            "separate_flops_6n": sum(c.flops["6n"] for c in cells if c.name not in self.trunks),
            "seconds": sum(c.seconds for c in cells),
        }

    @property
    def trunks(self) -> frozenset[str]:
        """The cells that branches start from."""
        return frozenset(c.trunk for c in self.cells if c.trunk is not None)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as plan.json and --json hold it."""
        return {
            "name": self.spec.name,
            "cells": [cell.as_dict() for cell in self.cells],
            "rules": dict(self.rules),
            "warnings": list(self.warnings),
            "corpus_tokens": self.corpus_tokens,
            "totals": self.totals,
            "design": self.design,
            "spec": self.spec.as_dict(),
        }


def make_plan(
    spec: SweepConfig,
    *,
    corpus_tokens: int | None = None,
    throughput: Throughput | None = None,
    devices: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Plan:
    """Expands a sweep into costed cells. Trains nothing, imports no JAX. A `design` axis is chosen first.

    Args:
        corpus_tokens: tokens of the training split, for epochs (None: unknown).
        throughput: how fast one worker is (None: `throughput.guess()`).
        devices: devices of one worker's mesh, to check that the batch divides (None: fixed mesh sizes alone count).
        progress: told (what, done, of how many) while a design is chosen.

    Raises:
        UserError: an invalid cell (named), axes and rules that set one field twice, or a corpus of no tokens.
    """
    if corpus_tokens is not None and corpus_tokens < 1:
        raise UserError(f"corpus tokens: {corpus_tokens}; give the number of training tokens")
    speed, design = throughput or guess(), None
    if any(isinstance(axis, Design) for axis in spec.axes):
        from llamax.sweep.design import resolve_design

        spec, design = resolve_design(spec, progress)
    cells = tuple(cell for point in expand(spec) for cell in _cells(spec, point, corpus_tokens, speed))
    rules = _shared_rules(speed, corpus_tokens) | (RULES if spec.horizons else {})
    warnings = warnings_of(spec, cells, devices)
    return Plan(spec, cells, rules, warnings, corpus_tokens, design)


def make_cell(
    name: str,
    config: RunConfig,
    *,
    tags: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    corpus_tokens: int | None = None,
    throughput: Throughput | None = None,
    rules: Mapping[str, str] | None = None,
    extra: bool = False,
    trunk: str | None = None,
) -> Cell:
    """One costed cell from a complete config; `study.add_cells` takes such cells beyond the sweep's own."""
    if name != safe(name):
        raise UserError(f"cell name {name!r}: a name is letters, digits and ._+-, not starting with . or -")
    speed, train, h = throughput or guess(), config.train, horizon(config)
    rate = speed.flops_per_second(h.n, train.batch_size * train.seq_len)
    first, every = 0 if config.branch is None else config.branch.step, train.eval_every_steps
    evaluations = 1 + (h.steps // every - first // every if every else 0)
    spent = 6 * h.n * h.trained_tokens + 2 * h.n * (config.data.eval_tokens or 0) * evaluations
    return Cell(
        name=name,
        config=config,
        tags={**(tags or {}), "seed": train.seed},
        overrides=tuple(overrides),
        n=h.n,
        tokens=h.tokens,
        tokens_per_param=h.tokens_per_param,
        batch=train.batch_size,
        steps=h.steps,
        lr=config.optimizer.lr,
        flops=h.flops,
        memory_bytes=memory_bytes(config)["total"],
        seconds=speed.startup_seconds + spent / rate,
        epochs=None if corpus_tokens is None else h.tokens / corpus_tokens,
        rules={"steps": h.rule, **(rules or {})},
        extra=extra,
        trunk=trunk,
    )


def _cells(spec: SweepConfig, point: Point, corpus_tokens: int | None, speed: Throughput) -> list[Cell]:
    """The cells of a point: one, or a trunk and its branches, or the variants and seeds of an ablation."""
    try:
        if spec.ablate is not None:
            found = _ablated(spec, spec.ablate, point)
        elif spec.horizons is None:
            texts, said = _resolved(spec, point, point.sets)
            found = [Draft(point.label, tuple(texts), {}, said, None)]
        else:
            found = _branched(spec, spec.horizons, point)
        return [
            make_cell(
                draft.label,
                _build(spec, draft.texts),
                tags={**point.tags, **draft.tags},
                overrides=(*spec.overrides, *draft.texts),
                corpus_tokens=corpus_tokens,
                throughput=speed,
                rules=draft.rules,
                trunk=draft.trunk,
            )
            for draft in found
        ]
    except UserError as error:
        raise UserError(f"sweep {spec.name}, cell {point.label}: {error}") from None


def _resolved(spec: SweepConfig, point: Point, fields: Sequence[tuple[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """`fields`, and what the rules make of them, as overrides on the base; and the rules in words."""
    rules = spec.rules.as_dict()
    for path, value in point.sets:
        if path.startswith("rules."):
            rules = apply_override(rules, path.split(".")[1:], value)
    texts = [_override(path, value) for path, value in fields if not path.startswith("rules.")]
    sets, said = resolve(_build(spec, texts), validate(Rules, rules, "rules"))
    for path in sets:
        if any(text.partition("=")[0] == path for text in spec.overrides):
            rule = "rules.lr" if path == "optimizer.lr" else "rules.batch"
            raise UserError(f"{path} is set by an override and by {rule}; drop one (rules: {rule}=null)")
    return texts + [_override(path, value) for path, value in sets.items()], said


def _branched(spec: SweepConfig, axis: Horizons, point: Point) -> list[Draft]:
    """Rules see the last horizon, since a trunk has one batch and one peak learning rate for all of them."""
    last = (f"train.{axis.field}", axis.values[-1])
    texts, said = _resolved(spec, point, (last, *point.sets))
    found = drafts(axis, point.label, texts[1:], lambda more: _build(spec, more), spec.rules.min_steps)
    said = {name: f"{rule} (N and D of the longest horizon, as for its trunk)" for name, rule in said.items()}
    return [draft._replace(rules={**said, **draft.rules}) for draft in found]


def _ablated(spec: SweepConfig, ablate: Ablate, point: Point) -> list[Draft]:
    """Every variant and seed of a point, seeds fastest; rules see the base alone."""
    texts, said = _resolved(spec, point, point.sets)
    base = _build(spec, texts)
    return [
        Draft(
            f"{point.label}-{variant.name}-s{seed}",
            (*texts, *variant.texts, f"train.seed={seed}"),
            {"rung": point.label, **variant.tags},
            {**said, "match": variant.said},
            None,
        )
        for variant in variants(base, ablate, lambda more: _build(spec, [*texts, *more]))
        for seed in range(base.train.seed, base.train.seed + ablate.seeds)
    ]


def _build(spec: SweepConfig, texts: Sequence[str]) -> RunConfig:
    overrides = (*spec.overrides, *texts)
    if isinstance(spec.base, str):
        return load_run(spec.base, overrides)
    return run_from_data(spec.base, overrides, where="base")


def _override(path: str, value: Any) -> str:
    return f"{path}={json.dumps(value)}" if not isinstance(value, str) else f"{path}={value}"


def _shared_rules(speed: Throughput, corpus_tokens: int | None) -> dict[str, str]:
    rules = {
        "N": "N = parameters one token is multiplied with (the lookup-only input table excluded)",
        "D": "D = steps x batch x seq_len; a budget C gives D = C / (6 N), rounded to whole steps",
        "FLOPs": "FLOPs = D x training FLOPs a token, by convention: 6n, chinchilla, palm, causal",
        "memory": "memory = parameters + gradients + optimizer + activations + logits of one step, over the mesh",
        "time": f"time = {speed.startup_seconds:g} s start + (6 N D + 2 N x eval tokens) / rate; rate: {speed.rule}",
    }
    if corpus_tokens is not None:
        rules["epochs"] = f"epochs = D / {corpus_tokens:,} training tokens of the corpus"
    return rules


# ---------------------------------------------------------------- plan.json
def save_plan(plan: Plan, path: Path) -> None:
    """Writes plan.json atomically."""
    write_atomic(path, json.dumps(plan.as_dict(), indent=1))


def load_plan(path: Path) -> Plan:
    """Reads a study's plan.json back, every config validated.

    Raises:
        UserError: missing, not JSON, or not a plan.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        cells = tuple(_cell_from(row, path) for row in data["cells"])
        spec = validate(SweepConfig, data["spec"], str(path))
        return Plan(spec, cells, data["rules"], tuple(data["warnings"]), data["corpus_tokens"], data.get("design"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such plan; start the study with `llamax sweep run`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a plan ({type(error).__name__}: {error}); remove it and start again") from None


def _cell_from(row: Mapping[str, Any], path: Path) -> Cell:
    own = {key: row[key] for key in Cell.__dataclass_fields__ if key != "config" and key in row}
    config = validate(RunConfig, row["config"], f"{path}: cell {row['name']}")
    return Cell(**own | {"overrides": tuple(row["overrides"]), "config": config})
