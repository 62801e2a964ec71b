"""An ablation as data: what changes against a base run, how the runs are matched, how often each is repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from llamax.config.base import Frozen
from llamax.config.run import RunConfig

Levels = Annotated[tuple[Any, ...], Field(min_length=1)]
Match = Literal["params", "active", "flops", "none"]


class Ablate(Frozen):
    """Levels of each axis against the base run, whose own level belongs to every axis whether listed or not.

    A level is a kind (`gelu`), a component in full or in part (`{kind: rope, theta: 5e5}`, `{theta: 5e5}`), or a value
    (`sandwich`). A number in it may be a rule in the size's own numbers, as in a style: `d_ff: {of: d_ff, times: 0.5}`.
    `fields` holds axes of any other dotted field of a run (`{model.attention.qk_norm: [null]}`).

    `mode`: one_at_a_time is the base and each single change, full every combination. `seeds`: repeats, counted up from
    the base's `train.seed`, the same for every variant, so that runs of one seed see the same batches.

    `match` makes variants comparable with the base at each size: `params` (stored) and `active` (N, what a token is
    multiplied with) change the width of the feed-forward block, in steps of `multiple`, at the base's tokens; `flops`
    changes the number of steps, so that training FLOPs (by `flops`) are equal; `none` changes nothing. A list trains
    each way. What is within `tolerance` (relative) already is left as it is.
    """

    norm: Levels | None = None
    mlp: Levels | None = None
    position: Levels | None = None
    attention: Levels | None = None
    placement: Levels | None = None
    residual: Levels | None = None
    optimizer: Levels | None = None
    schedule: Levels | None = None
    fields: dict[str, Levels] = Field(default_factory=dict)
    mode: Literal["one_at_a_time", "full"] = "one_at_a_time"
    match: Match | Annotated[tuple[Match, ...], Field(min_length=1)] = "params"
    seeds: PositiveInt = 3
    tolerance: Annotated[float, Field(gt=0.0, le=0.2)] = 0.01
    multiple: PositiveInt = 1
    flops: Literal["6n", "chinchilla", "palm", "causal"] = "causal"

    @property
    def axes(self) -> Mapping[str, tuple[str, tuple[Any, ...]]]:
        """Of each axis by name: the dotted field of a run it sets, and its levels."""
        own = {name: (_path(name), values) for name in AXES if (values := getattr(self, name)) is not None}
        return own | {name: (name, values) for name, values in self.fields.items()}

    @property
    def matches(self) -> tuple[Match, ...]:
        """The ways of matching, in order."""
        return (self.match,) if isinstance(self.match, str) else self.match

    @model_validator(mode="after")
    def _checked(self) -> Ablate:
        if not self.axes:
            raise ValueError(f"ablate has no axis; give levels of one of {', '.join(AXES)}, or fields: {{a.b: [...]}}")
        for path in self.fields:
            section = path.split(".")[0]
            if section not in RunConfig.model_fields or "." not in path:
                sections = ", ".join(RunConfig.model_fields)
                raise ValueError(f"fields: {path!r} is no field of a run; sections: {sections}")
            own = {_path(name): name for name in AXES} | {"train.seed": "seeds"}
            if path in own:
                raise ValueError(f"fields: {path} has a place of its own; use ablate.{own[path]}")
        if len(set(self.matches)) < len(self.matches):
            raise ValueError(f"match={list(self.matches)} repeats itself; name each way once")
        return self


AXES = ("norm", "mlp", "position", "attention", "placement", "residual", "optimizer", "schedule")


def _path(axis: str) -> str:
    return axis if axis in RunConfig.model_fields else f"model.{axis}"
