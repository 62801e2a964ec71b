"""Everything that identifies a training run: eight frozen sections, and a ninth of a branch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from llamax.config.base import Frozen
from llamax.config.components import Fraction
from llamax.config.horizons import HORIZONS
from llamax.config.mesh import MeshConfig
from llamax.config.model import ModelConfig


# ---------------------------------------------------------------- data
class Bytes(Frozen):
    """UTF-8 bytes, 256 ids; bytes UTF-8 never uses serve as special tokens (255 ends a document)."""

    kind: Literal["bytes"] = "bytes"


class SentencePiece(Frozen):
    """A SentencePiece model: loaded from `path`, or trained on the corpus with `vocab_size` pieces when path is
    null."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    vocab_size: PositiveInt = 4096
    model_type: Literal["bpe", "unigram"] = "bpe"
    path: str | None = None


class HuggingFace(Frozen):
    """A `tokenizer.json` file (needs llamax[tokenizers])."""

    kind: Literal["huggingface"] = "huggingface"
    path: str


Tokenizer = Annotated[Bytes | SentencePiece | HuggingFace, Field(discriminator="kind")]


class PythonSource(Frozen):
    """The Python source of the running interpreter's standard library; `packages` adds the installed packages."""

    kind: Literal["python"] = "python"
    packages: bool = False


class TextFiles(Frozen):
    """Text files and folders (searched for `suffixes`), one document a file."""

    kind: Literal["text"] = "text"
    paths: tuple[str, ...] = Field(min_length=1)
    suffixes: tuple[str, ...] = (".txt", ".md", ".py", ".rst")


class Jsonl(Frozen):
    """JSON lines files (optionally .gz), one document a line, its text under `field`."""

    kind: Literal["jsonl"] = "jsonl"
    paths: tuple[str, ...] = Field(min_length=1)
    field: str = "text"


class Parquet(Frozen):
    """Parquet files, one document a row, its text in column `field` (needs llamax[parquet])."""

    kind: Literal["parquet"] = "parquet"
    paths: tuple[str, ...] = Field(min_length=1)
    field: str = "text"


class HuggingFaceDataset(Frozen):
    """A dataset of the `datasets` library (needs llamax[datasets])."""

    kind: Literal["datasets"] = "datasets"
    path: str
    name: str | None = None
    split: str = "train"
    field: str = "text"


Source = Annotated[PythonSource | TextFiles | Jsonl | Parquet | HuggingFaceDataset, Field(discriminator="kind")]


class WeightedSource(Frozen):
    """One part of a mixture: `weight` is its share of the training windows, relative to the other parts."""

    source: Source
    weight: PositiveFloat = 1.0


class Corpus(Frozen):
    """A weighted mixture of sources, deduplicated by document, split by document into train and held-out."""

    sources: tuple[WeightedSource, ...] = Field(min_length=1, strict=False)  # a list in Python too
    held_out_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05


class DataConfig(Frozen):
    """Where windows come from: a ready token `store`, or one built from `corpus` (a name in configs/corpora) and
    `tokenizer`.

    `mask_documents` stops attention at document boundaries. `eval_tokens` bounds an evaluation (null: all held-out
    text).
    """

    store: str | None = None
    corpus: str = "python-stdlib"
    tokenizer: Tokenizer = Bytes()
    mask_documents: bool = False
    eval_tokens: PositiveInt | None = None


# ---------------------------------------------------------------- optimizer and schedule
class Group(Frozen):
    """Multipliers for one group of parameters, on the learning rate and on the weight decay."""

    lr: NonNegativeFloat = 1.0
    weight_decay: NonNegativeFloat = 1.0


class Groups(Frozen):
    """Parameter groups by role; embeddings, norms and biases are not decayed."""

    embedding: Group = Group(weight_decay=0.0)
    head: Group = Group()
    matrix: Group = Group()
    router: Group = Group()
    norm: Group = Group(weight_decay=0.0)
    bias: Group = Group(weight_decay=0.0)


class _Optimizer(Frozen):
    lr: PositiveFloat = 3e-3
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: PositiveFloat | None = 1.0
    groups: Groups = Groups()


class AdamW(_Optimizer):
    """Decoupled weight decay Adam (arXiv:1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: PositiveFloat = 1e-8


class Muon(_Optimizer):
    """Orthogonalized momentum for matrices, AdamW (at `adam_lr` x lr) for embeddings, heads, norms and biases (Jordan
    2024)."""

    kind: Literal["muon"] = "muon"
    momentum: Fraction = 0.95
    adam_lr: PositiveFloat = 0.3
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: PositiveFloat = 1e-8


class Lion(_Optimizer):
    """Sign of an interpolated momentum (arXiv:2302.06675)."""

    kind: Literal["lion"] = "lion"
    b1: Fraction = 0.9
    b2: Fraction = 0.99


class Adafactor(_Optimizer):
    """Factored second moments (arXiv:1804.04235), without parameter-scaled steps."""

    kind: Literal["adafactor"] = "adafactor"
    decay_rate: Fraction = 0.8
    eps: PositiveFloat = 1e-30


class Sgd(_Optimizer):
    """Gradient descent with heavy-ball momentum."""

    kind: Literal["sgd"] = "sgd"
    momentum: Fraction = 0.9


Optimizer = Annotated[AdamW | Muon | Lion | Adafactor | Sgd, Field(discriminator="kind")]


class Schedule(Frozen):
    """Learning rate over the horizon: linear warmup for `warmup` of the steps, then `kind` down to `final` of the peak.

    `wsd` holds the peak and decays linearly over the last `decay` of the steps (arXiv:2404.06395). `warmup_steps`,
    where given, is the warmup in steps, the same at every horizon, and `warmup` is not read.
    """

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: Fraction = 0.05
    warmup_steps: NonNegativeInt | None = None
    final: Fraction = 0.1
    decay: Fraction = 0.2

    @model_validator(mode="after")
    def _phases(self) -> Schedule:
        if self.kind == "wsd" and self.warmup_steps is None and self.warmup + self.decay > 1.0:
            raise ValueError(
                f"warmup={self.warmup:g} and decay={self.decay:g} of a wsd schedule add up to more than 1; lower one"
            )
        return self

    def phases(self, total_steps: int) -> tuple[int, int]:
        """(warmup, decay) of a run of `total_steps` in whole steps; the decay is what `wsd` would take."""
        warmup = round(self.warmup * total_steps) if self.warmup_steps is None else self.warmup_steps
        return warmup, min(round(self.decay * total_steps), total_steps - max(warmup, 1))


# ---------------------------------------------------------------- train, checkpoint, log
class TrainConfig(Frozen):
    """The step and its horizon, which is exactly one of `steps`, `tokens`, `tokens_per_param`, `flops`.

    `batch_size` counts sequences of `seq_len` tokens over the whole mesh. Weights are float32; `compute_dtype` is the
    operand type of matrix products (accumulated in float32; auto: bfloat16 where the devices multiply it faster, else
    float32, and a run keeps what it began with), `activation_dtype` that of the residual stream.
    float8 (e4m3 forward, e5m2 for gradients of outputs, scaled by the largest entry of each array) is for the weight
    matrices of dense layers alone; head, router, experts and attention then multiply in bfloat16. `remat` is what the
    backward pass computes again (none, all but weight products, all); auto: the least that fits the devices' memory.
    `loss_chunk` is the number of tokens whose logits exist at once (null: all). `unroll_layers` replaces the scan over
    layers by straight code (null: up to 8 layers on CPUs, up to 64 on a single GPU; the same sums in another order, and
    faster there). `on_divergence` acts on a loss that is not finite or above
    `divergence_factor` x the running average.

    Weights of losses besides cross-entropy, each 0 or without effect where the model has no such part: `z_loss`
    (PaLM), over layers `moe_balance_loss` (Switch), `moe_sequence_balance_loss` (DeepSeek-V3 takes 1e-4), `moe_z_loss`
    (ST-MoE) and `indexer_loss` (of sparse attention), over modules `mtp_loss` (DeepSeek-V3: 0.3, later 0.1).
    `router_bias_rate` is how far a router's selection bias moves a step towards even load (DeepSeek-V3: 1e-3, 0 at the
    end).
    """

    batch_size: PositiveInt = 32
    seq_len: PositiveInt = 256
    steps: PositiveInt | None = None
    tokens: PositiveFloat | None = None
    tokens_per_param: PositiveFloat | None = None
    flops: PositiveFloat | None = None
    seed: NonNegativeInt = 0
    compute_dtype: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    activation_dtype: Literal["float32", "bfloat16"] = "float32"
    grad_accumulation: PositiveInt = 1
    steps_per_dispatch: PositiveInt = 10
    remat: Literal["none", "dots", "full", "auto"] = "none"
    unroll_layers: bool | None = None
    loss_chunk: PositiveInt | None = None
    z_loss: NonNegativeFloat = 0.0
    moe_balance_loss: NonNegativeFloat = 0.01
    moe_sequence_balance_loss: NonNegativeFloat = 0.0
    moe_z_loss: NonNegativeFloat = 0.001
    mtp_loss: NonNegativeFloat = 0.3
    indexer_loss: NonNegativeFloat = 1.0
    router_bias_rate: NonNegativeFloat = 0.001
    on_divergence: Literal["stop", "skip"] = "stop"
    divergence_factor: Annotated[float, Field(gt=1.0)] = 4.0
    eval_every_steps: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_horizon(self) -> TrainConfig:
        given = [f"train.{name}={value:g}" for name in HORIZONS if (value := getattr(self, name)) is not None]
        if len(given) != 1:
            what = " and ".join(given) if given else "none is given"
            choices = ", ".join(f"train.{name}" for name in HORIZONS)
            raise ValueError(
                f"the horizon is exactly one of {choices}; got {what}; keep one and set the others to null"
            )
        if self.batch_size % self.grad_accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of "
                f"grad_accumulation={self.grad_accumulation}; change one"
            )
        return self


class CheckpointConfig(Frozen):
    """Permanent checkpoints every `every_steps` (null: only at the end), temporary ones every `every_seconds`.

    `branch_steps` are steps after which other runs branch off: permanent checkpoints that make this run a trunk.
    """

    every_steps: PositiveInt | None = None
    every_seconds: PositiveFloat | None = 300.0
    branch_steps: tuple[PositiveInt, ...] = ()

    def following(self, step: int) -> int | None:
        """The first step after `step` that asks for a permanent checkpoint; None if there is none."""
        steps = [branch for branch in self.branch_steps if branch > step]
        if self.every_steps is not None:
            steps.append((step // self.every_steps + 1) * self.every_steps)
        return min(steps, default=None)


class LogConfig(Frozen):
    """A row of metrics.jsonl every `every_steps` steps, and for the first and the last.

    `gradient_noise` adds `micro_grad_norm`, the root mean square gradient norm of the microbatches, from which
    `llamax curves` estimates the noise scale (arXiv:1812.06162); it needs train.grad_accumulation of 2 or more.
    """

    every_steps: PositiveInt = 10
    gradient_noise: bool = False


class Branch(Frozen):
    """Where a run starts in place of step 0: at the state that another run, its trunk, had after `step` steps.

    `trunk` is the name of the run directory beside this run's own, `NAME-HASH8`: the hash makes the trunk's numbers
    part of this run's identity. Steps, tokens and the schedule count from the trunk's step 0.
    """

    trunk: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+-]*-[0-9a-f]{8}$")]
    step: PositiveInt


class RunConfig(Frozen, defer_build=False):
    """One training run. Its identity is the sections that set its numbers (`branch` where it is one); mesh, checkpoint
    and log may change on resume."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Schedule()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    branch: Branch | None = None

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        if self.train.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"train.seq_len={self.train.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}; "
                "lower the first or raise the second"
            )
        if self.log.gradient_noise and self.train.grad_accumulation < 2:
            raise ValueError(
                "log.gradient_noise=true compares microbatches with the batch, and train.grad_accumulation=1 makes "
                "none; set train.grad_accumulation to 2 or more"
            )
        kind = self.model.parametrization.kind
        if kind != "standard" and self.optimizer.kind != "adamw":
            raise ValueError(
                f"model.parametrization.kind={kind} is defined for optimizer.kind=adamw, not {self.optimizer.kind}; "
                "choose adamw, or parametrization.kind=standard"
            )
        return self

    @property
    def hash8(self) -> str:
        """Eight hex digits that identify the run: the same identity is the same run."""
        import hashlib
        import json

        identity = {name: section for name, section in self.as_dict().items() if name in IDENTITY and section}
        if identity["model"]["parametrization"] == {"kind": "standard"}:  # as before there was the field, and so below
            del identity["model"]["parametrization"]
        if identity["schedule"]["warmup_steps"] is None:
            del identity["schedule"]["warmup_steps"]
        return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:8]


IDENTITY = ("model", "data", "optimizer", "schedule", "train", "branch")
