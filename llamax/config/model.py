"""What a model is: one transformer over component unions, as a list of segments of blocks."""

from __future__ import annotations

import functools
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from llamax.config.base import Frozen
from llamax.config.components import Attention, Init, Mlp, MoeMlp, Norm, Position, RMSNorm, Rope
from llamax.config.merge import merge
from llamax.config.messages import explain
from llamax.config.parametrization import CompleteP, MuP, Parametrization, Standard
from llamax.config.rotary import RopeLongrope


class Block(Frozen):
    """One resolved decoder block: what a layer is made of.

    `placement`: `pre` x + f(norm(x)); `post` norm(x + f(x)); `sandwich` x + norm(f(norm(x))) (Gemma 2).
    `residual`: `sequential` attention then mlp; `parallel` both read one shared norm (GPT-J, Cohere).
    `branch`: a mixture of experts that reads a norm of its own of the block's input and joins the block's output, so
    that it runs beside attention and mlp (the dense-MoE hybrid of Snowflake Arctic).
    `residual_factor` multiplies what joins the stream; `model.parametrization` sets it, no config does.
    """

    attention: Attention
    position: Position
    mlp: Mlp
    branch: MoeMlp | None = None
    norm: Norm
    placement: Literal["pre", "post", "sandwich"]
    residual: Literal["sequential", "parallel"]
    residual_factor: PositiveFloat = Field(default=1.0, exclude=True)


class Segment(Frozen):
    """`repeat` copies of a `unit` of blocks; the unit is unrolled, the repeats are scanned.

    Each entry of `unit` is a partial block merged over the model's own (`{}` is the model's block unchanged).
    """

    repeat: PositiveInt
    unit: tuple[dict[str, Any], ...] = ({},)

    @field_validator("unit", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(_whole(part) for part in value) if isinstance(value, list | tuple) else value


class Embedding(Frozen):
    """The input table. `scale` multiplies its output: `none`, `sqrt_d_model` as in Gemma, or a number (the muP factor
    of Phi-3-small, arXiv:2203.03466)."""

    scale: Literal["none", "sqrt_d_model"] | PositiveFloat = "none"


class Head(Frozen):
    """The output projection: tied to the embedding or its own. Logits are multiplied by `scale` (Cohere), then capped
    at softcap * tanh(logit / softcap) (Gemma 2)."""

    tied: bool = False
    bias: bool = False
    scale: PositiveFloat | None = None
    softcap: PositiveFloat | None = None


class ModelConfig(Frozen, defer_build=False):
    """A decoder-only transformer.

    `attention` ... `residual` describe the model's block; `segments` says how many and where one differs.
    `attention.kind` defaults to `gqa`, its `kv_heads` to `heads` and its `head_dim` to d_model / heads. `mtp` counts
    multi-token prediction modules (DeepSeek-V3, arXiv:2412.19437): module k predicts token t + 1 + k from the stream
    at t and the embedding of token t + k, through one more block like the last layer's; embedding and head are shared.
    `dialect` is the transformers model_type its weights are written as (null: the first that can express it); it says
    nothing about the architecture. `parametrization` says what changes with width and depth besides shapes.
    """

    vocab_size: PositiveInt
    d_model: PositiveInt
    max_seq_len: PositiveInt = 2048
    segments: tuple[Segment, ...] = Field(min_length=1)
    attention: Attention
    position: Position
    mlp: Mlp
    branch: MoeMlp | None = None
    norm: Norm = RMSNorm()
    placement: Literal["pre", "post", "sandwich"] = "pre"
    residual: Literal["sequential", "parallel"] = "sequential"
    embedding: Embedding = Embedding()
    head: Head = Head()
    mtp: NonNegativeInt = 0
    dialect: str | None = None
    init: Init = Init()
    parametrization: Parametrization = Standard()

    @field_validator("segments", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="before")
    @classmethod
    def _derive_heads(cls, data: Any) -> Any:
        attention = data.get("attention") if isinstance(data, dict) else None
        if not isinstance(attention, dict) or attention.get("kind", "gqa") != "gqa":
            return data
        derived: dict[str, Any] = {"kind": "gqa"}
        if not isinstance(attention.get("heads"), int) or attention["heads"] < 1:
            return {**data, "attention": {**derived, **attention}}
        derived["kv_heads"] = attention["heads"]
        if attention.get("head_dim") is None:
            d_model, heads = data.get("d_model"), attention["heads"]
            if isinstance(d_model, int) and d_model % heads:
                raise ValueError(
                    f"d_model={d_model} is not a multiple of attention.heads={heads}; "
                    "change one or give attention.head_dim"
                )
            if isinstance(d_model, int):
                derived["head_dim"] = d_model // heads
        given = {k: v for k, v in attention.items() if v is not None or k not in derived}
        return {**data, "attention": {**derived, **given}}

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        for block in (b for _, unit in self.blocks for b in unit):
            if block.residual == "parallel" and block.placement != "pre":
                raise ValueError(f"residual=parallel needs placement=pre, not {block.placement}; set one back")
            if block.position.kind in ("learned", "sinusoidal") and block.position != self.position:
                raise ValueError(
                    f"position.kind={block.position.kind} is added to the embedding, so it is the whole model's: "
                    "set it on model.position, not inside a segment"
                )
            if block.branch is not None and (block.residual, block.placement) != ("sequential", "pre"):
                raise ValueError("branch needs residual=sequential and placement=pre; set them back")
            if block.position.kind == "rope":
                _check_rope(block.attention, block.position)
        return self

    @functools.cached_property
    def blocks(self) -> tuple[tuple[int, tuple[Block, ...]], ...]:
        """The resolved stack: (repeat, unit of blocks) a segment."""
        own = {name: getattr(self, name).as_dict() for name in ("attention", "position", "mlp", "norm")}
        own |= {"branch": self.branch.as_dict() if self.branch else None}
        own |= {"placement": self.placement, "residual": self.residual}
        stack = tuple(
            (segment.repeat, tuple(_block(own, part, f"segments.{s}.unit.{u}") for u, part in enumerate(segment.unit)))
            for s, segment in enumerate(self.segments)
        )
        if isinstance(self.parametrization, Standard):
            return stack
        _check_parametrized(self, [block for _, unit in stack for block in unit])
        layers = sum(repeat * len(unit) for repeat, unit in stack)
        return tuple((repeat, tuple(_scaled(b, self.parametrization, layers) for b in unit)) for repeat, unit in stack)

    @property
    def layers(self) -> tuple[Block, ...]:
        """Every block from input to output, in order."""
        return tuple(block for repeat, unit in self.blocks for _ in range(repeat) for block in unit)


def _check_rope(attention: Attention, rope: Rope) -> None:
    head_dim, fraction = attention.rotary_width, rope.fraction
    width = int(head_dim * fraction)
    if width < 2 or width % 2:
        raise ValueError(
            f"rope rotates attention.head_dim={head_dim} x position.fraction={fraction:g} = {width} "
            "dimensions; choose an even number, at least 2"
        )
    if isinstance(rope.scaling, RopeLongrope) and len(rope.scaling.short) != width // 2:
        raise ValueError(
            f"position.scaling has {len(rope.scaling.short)} factors for {width // 2} frequencies; give one each"
        )


def _check_parametrized(model: ModelConfig, blocks: list[Block]) -> None:
    kind = model.parametrization.kind
    for block in blocks:
        if block.attention.kind != "gqa":
            raise ValueError(
                f"parametrization.kind={kind} is not defined for attention.kind={block.attention.kind}, whose latent "
                "ranks have no base; choose gqa, or parametrization.kind=standard"
            )
        scaling = block.position.scaling if isinstance(block.position, Rope) else None
        if block.attention.scale is not None or getattr(scaling, "mscale_all_dim", None):
            what = f"attention.scale={block.attention.scale}" if block.attention.scale else "position.scaling (yarn)"
            raise ValueError(f"{what} and parametrization.kind={kind} both set the scale of attention; drop one")
        if kind == "completep" and block.placement != "pre":
            raise ValueError(
                f"parametrization.kind=completep is defined for placement=pre, not {block.placement}; set it back"
            )
    if model.embedding.scale == "sqrt_d_model":
        raise ValueError(
            f"embedding.scale=sqrt_d_model grows with the width and parametrization.kind={kind} keeps embeddings as "
            "they are; give a number or none"
        )
    if kind == "completep" and model.init.depth_scaling == "layer":
        raise ValueError("init.depth_scaling=layer follows depth and so does completep; choose total or none")


def _scaled(block: Block, rule: MuP | CompleteP, layers: int) -> Block:
    dim = block.attention.head_dim
    attention = block.attention.model_copy(update={"scale": dim**-0.5 * rule.logit_factor(dim)})
    return block.model_copy(update={"attention": attention, "residual_factor": rule.residual_factor(layers)})


def _block(own: dict[str, Any], part: dict[str, Any], where: str) -> Block:
    if "residual_factor" in part:
        raise ValueError(f"{where}: residual_factor is set by model.parametrization; remove it here")
    data = merge(own, part)
    try:
        return Block.model_validate(data)
    except ValidationError as error:
        raise ValueError("; ".join(f"{where}: {line}" for line in explain(Block, data, error))) from None


def _whole(value: Any) -> Any:
    """Whole floats as integers: a unit is untyped data, and `theta: 1e6` and `theta: 1000000` are one config."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
