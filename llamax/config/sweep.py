"""What a sweep is: a base run, axes that multiply into cells, and rules that derive each cell's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from llamax.config.ablate import Ablate
from llamax.config.base import Frozen
from llamax.config.files import find, read_yaml
from llamax.config.horizons import HORIZONS
from llamax.config.load import validate
from llamax.config.lr_rules import Marin, Nanochat, SqrtBatch, StepLaw, StepLawBatch
from llamax.config.merge import apply_override, parse_override
from llamax.config.run import RunConfig

Values = Annotated[tuple[Any, ...], Field(min_length=1)]
Sizes = Annotated[tuple[str, ...], Field(min_length=1)]
Amounts = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
BudgetCounts = Annotated[tuple[Annotated[int, Field(ge=2, le=12)], ...], Field(min_length=1)]
SizeCounts = Annotated[tuple[Annotated[int, Field(ge=3, le=20)], ...], Field(min_length=1)]
Reaches = Annotated[tuple[Annotated[PositiveFloat, Field(gt=1)], ...], Field(min_length=1)]


# ---------------------------------------------------------------- axes
class Product(Frozen):
    """Every combination of the values of each dotted field: `{optimizer.lr: [1e-3, 3e-3], model.norm.kind: [...]}`."""

    kind: Literal["product"] = "product"
    fields: Annotated[dict[str, Values], Field(min_length=1)]


class Zip(Frozen):
    """The i-th values of every dotted field together; the lists are equally long."""

    kind: Literal["zip"]
    fields: Annotated[dict[str, Values], Field(min_length=1)]

    @model_validator(mode="after")
    def _equal(self) -> Zip:
        lengths = {path: len(values) for path, values in self.fields.items()}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{path}: {n}" for path, n in lengths.items())
            raise ValueError(f"zip needs lists of one length, found {shown}; pad the short ones or use kind: product")
        return self


class Isoflop(Frozen):
    """Models of several sizes at each compute budget (training FLOPs as 6 N D; arXiv:2203.15556, approach 2).

    `sizes` are model names, one list for all budgets or one list a budget.
    """

    kind: Literal["isoflop"]
    budgets: Amounts
    sizes: Sizes | Annotated[tuple[Sizes, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_list_a_budget(self) -> Isoflop:
        if not isinstance(self.sizes[0], str) and len(self.sizes) != len(self.budgets):
            counts = f"sizes has {len(self.sizes)} lists for {len(self.budgets)} budgets"
            raise ValueError(f"{counts}; give one list, or one a budget")
        return self

    @property
    def pairs(self) -> tuple[tuple[float, str], ...]:
        """(budget, size) of every cell, in order."""
        lists = [self.sizes] * len(self.budgets) if isinstance(self.sizes[0], str) else self.sizes
        return tuple((budget, str(size)) for budget, sizes in zip(self.budgets, lists, strict=True) for size in sizes)


class Ladder(Frozen):
    """Every model size at every ratio of training tokens to N."""

    kind: Literal["ladder"]
    sizes: Sizes
    tokens_per_param: Amounts = (20.0,)


class Seeds(Frozen):
    """Repeats that differ in `train.seed`: 0 to count - 1, or the listed `values`."""

    kind: Literal["seeds"]
    count: PositiveInt | None = None
    values: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Seeds:
        if (self.count is None) == (self.values is None):
            raise ValueError(f"seeds takes exactly one of count={self.count} and values={self.values}; keep one")
        return self


class Horizons(Frozen):
    """One trunk, many horizons: every choice of the other axes trains once at the peak learning rate, and a branch
    decays from it to each horizon (arXiv:2404.06395, arXiv:2405.18392).

    Horizons are exactly one of `steps`, `tokens`, `tokens_per_param` and `flops` (as 6 N D), increasing; `decay` is the
    fraction of its horizon over which a branch decays. Sizes are a product axis over `model`. All share one warmup: the
    base's `schedule.warmup_steps`, or its `schedule.warmup` of the shortest horizon.
    """

    kind: Literal["horizons"]
    steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    tokens: Amounts | None = None
    tokens_per_param: Amounts | None = None
    flops: Amounts | None = None
    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2

    @model_validator(mode="after")
    def _one_increasing(self) -> Horizons:
        given = [name for name in HORIZONS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"horizons takes exactly one of {', '.join(HORIZONS)}; found {found}; keep one")
        if list(self.values) != sorted(set(self.values)):
            shown = ", ".join(f"{value:g}" for value in self.values)
            raise ValueError(f"{self.field} of horizons = [{shown}] do not increase; list each once, shortest first")
        return self

    @property
    def field(self) -> str:
        """The field of the train section that the horizons set."""
        return next(name for name in HORIZONS if getattr(self, name) is not None)

    @property
    def values(self) -> tuple[float, ...]:
        """The horizons, shortest first."""
        return getattr(self, self.field)


class Prior(Frozen):
    """L = E + (A / N^alpha + B / D^beta)^gamma, nats per token: the law believed before a study.

    gamma = 1 is the Chinchilla law (arXiv:2203.15556). With another (arXiv:2502.08606) approach 3, which fits that law,
    is wrong about the study, and the design shows by how much.
    """

    E: PositiveFloat
    A: PositiveFloat
    B: PositiveFloat
    alpha: PositiveFloat
    beta: PositiveFloat
    gamma: PositiveFloat = 1.0


class Design(Frozen):
    """An isoFLOP study that llamax chooses: the budgets, sizes and seeds with the least expected error at a target.

    `prior` is the law believed before the study: its parameters, or the JSON of `llamax fit --json` or fits.json.
    `seed_noise` is the standard deviation of one run's log loss over seeds (0.003: 0.3 %). All runs of the sweep
    together cost at most `total_flops` (6 N D). What is made least is the error of the predicted `loss` at
    `target_flops`, or of the best size `n` there, by the named `approaches` (all are shown), and also where the best
    sizes are `centre_factor` times smaller or larger than the prior's, because a prior is never right.

    The other fields are what is tried: numbers of budgets, decades they span, sizes a budget, factors by which its
    sizes reach to either side of the best, seeds a size. `sizes` is a ladder (its widths of four significant bits) or
    a list of models; no run is longer than `max_tokens` or shorter than `min_steps` steps. `draws` simulated studies
    check each of the best few.
    """

    kind: Literal["design"]
    prior: Prior | str
    seed_noise: Annotated[PositiveFloat, Field(le=0.5)]
    total_flops: PositiveFloat
    target_flops: PositiveFloat
    minimize: Literal["loss", "n"] = "loss"
    approaches: Annotated[tuple[Literal[2, 3], ...], Field(min_length=1)] = (2, 3)
    centre_factor: Annotated[PositiveFloat, Field(ge=1, le=16)] = 1.5
    sizes: str | Sizes = "ladder"
    max_tokens: PositiveFloat | None = None
    min_steps: PositiveInt = 100
    budgets: BudgetCounts = (3, 4, 5, 6)
    decades: Amounts = (1.0, 1.5, 2.0, 3.0)
    sizes_per_budget: SizeCounts = (5, 6, 7, 8, 9)
    width: Reaches = (2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
    replicates: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 3)
    draws: Annotated[int, Field(ge=20)] = 100


Axis = Annotated[Product | Zip | Isoflop | Ladder | Seeds | Horizons | Design, Field(discriminator="kind")]


# ---------------------------------------------------------------- rules
class _Bounds(Frozen):
    @model_validator(mode="after")
    def _order(self) -> _Bounds:
        low, high = getattr(self, "min", None), getattr(self, "max", None)
        if low is not None and high is not None and low > high:
            raise ValueError(f"min={low:g} is above max={high:g}; swap them")
        return self


class FixedLr(Frozen):
    """One peak learning rate for every cell."""

    kind: Literal["fixed"]
    value: PositiveFloat


class PowerLr(_Bounds):
    """Peak learning rate = coefficient * N^n_exponent * D^d_exponent, kept within [min, max]."""

    kind: Literal["power_law"]
    coefficient: PositiveFloat
    n_exponent: float = 0.0
    d_exponent: float = 0.0
    min: PositiveFloat | None = None
    max: PositiveFloat | None = None


class FixedBatch(Frozen):
    """One batch size, in sequences, for every cell."""

    kind: Literal["fixed"]
    value: PositiveInt


class PowerBatch(_Bounds):
    """Batch = coefficient * D^d_exponent in `unit`, rounded to a power of two or to a `multiple` of sequences.

    `min` and `max` are in sequences.
    """

    kind: Literal["power_law"]
    coefficient: PositiveFloat
    d_exponent: float
    unit: Literal["sequences", "tokens"] = "sequences"
    multiple: PositiveInt | Literal["power_of_two"] = "power_of_two"
    min: PositiveInt = 1
    max: PositiveInt | None = None


class Rules(Frozen):
    """Numbers derived for each cell from its N (parameters in matrix products) and D (training tokens).

    A rule takes the place of the base config's number. `min_steps` lowers a cell's batch until it has that many steps.
    """

    lr: Annotated[FixedLr | PowerLr | StepLaw | SqrtBatch | Marin | Nanochat, Field(discriminator="kind")] | None = None
    batch: Annotated[FixedBatch | PowerBatch | StepLawBatch, Field(discriminator="kind")] | None = None
    min_steps: PositiveInt | None = None


# ---------------------------------------------------------------- the sweep
class SweepConfig(Frozen, defer_build=False):
    """A sweep as data. Its cells are the product of the `axes`, first axis slowest; no axes is one cell.

    `base` is a shipped train config, a YAML path or an inline mapping; `overrides` (a.b.c=value) apply to every cell.
    `optimum_tokens_per_param` is where the best size of a budget is expected; the plan warns when no size brackets it.
    With `ablate`, each cell is the base of an ablation: its variants and its seeds take its place (see `Ablate`).
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
    base: str | dict[str, Any]
    overrides: tuple[str, ...] = ()
    axes: tuple[Axis, ...] = ()
    ablate: Ablate | None = None
    rules: Rules = Rules()
    optimum_tokens_per_param: PositiveFloat = 20.0

    @model_validator(mode="after")
    def _one_source_of_horizons(self) -> SweepConfig:
        kinds = [axis.kind for axis in self.axes if axis.kind in ("isoflop", "ladder", "horizons")]
        if "horizons" in kinds and len(kinds) > 1:
            raise ValueError(
                f"axes of kind {' and '.join(kinds)} all set the horizon; keep the horizons axis alone and "
                "give sizes as {kind: product, fields: {model: [...]}}"
            )
        if "horizons" in kinds and self.ablate is not None:
            raise ValueError("ablate and a horizons axis do not go together; ablate one horizon at a time")
        return self

    @property
    def horizons(self) -> Horizons | None:
        """The axis that makes trunks and branches, if there is one."""
        return next((axis for axis in self.axes if isinstance(axis, Horizons)), None)


def load_sweep(name: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """A sweep from a shipped name (`quickstart`) or a YAML path.

    Overrides of the sweep's own fields (`axes.0.budgets=[1e11]`, `rules.min_steps=50`) change the sweep; those of a
    run's fields (`train.seq_len=64`) go to every cell.

    Raises:
        UserError: unknown name, bad YAML, bad override, or an invalid sweep.
    """
    data = read_yaml(find("sweeps", str(name), "sweep"))
    for text in overrides:
        keys, value = parse_override(text)
        if keys[0] in (*RunConfig.model_fields, "style"):
            data["overrides"] = [*data.get("overrides", ()), text]
        else:
            data = apply_override(data, keys, value)
    return validate(SweepConfig, data, str(name))
