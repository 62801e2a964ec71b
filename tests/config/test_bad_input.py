"""Every kind of bad config gives one message that names the field, the value and the fix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llamax.config.load import load_corpus, load_model, load_run, run_from_data
from llamax.errors import UserError

# override(s) of `tiny` -> what the message must say: the field as written, the value, the fix
BAD = {
    "optimizer.lrr=1": ["unknown field optimizer.lrr = 1", "did you mean lr?"],
    "trian.steps=3": ["unknown field trian = {'steps': 3}", "did you mean train?"],
    "model.attention.windw=8": ["unknown field model.attention.windw = 8", "did you mean window?"],
    "checkpoint.zzz=1": ["unknown field checkpoint.zzz = 1", "one of every_steps, every_seconds"],
    "model.mlp.experts=4": ["unknown field model.mlp.experts = 4", "kind, d_ff, bias"],
    "optimizer.lr=fast": ["optimizer.lr = 'fast'", "valid number"],
    "optimizer.lr=-1": ["optimizer.lr = -1", "greater than 0"],
    "optimizer.lr=.inf": ["optimizer.lr = inf", "finite numbers"],
    "train.steps=2024-01-01": ["train.steps = datetime.date(2024, 1, 1)", "use finite numbers, text"],
    "train.steps=[{a: .nan}]": ["train.steps.0.a = nan"],
    "optimizer.b1=1.5": ["optimizer.b1 = 1.5", "less than or equal to 1"],
    "train.steps=2.5": ["train.steps = 2.5", "valid integer"],
    "train.steps='3'": ["train.steps = '3'", "valid integer"],
    "train.unroll_layers=1": ["train.unroll_layers = 1", "valid boolean"],
    "train.remat=half": ["train.remat = 'half'", "'none', 'dots', 'full' or 'auto'"],
    "train.batch_size=0": ["train.batch_size = 0", "greater than 0"],
    "train=5": ["train = 5", "mapping of fields"],
    "data.tokenizer=bytes": ["data.tokenizer = 'bytes'", "for example {kind: bytes}"],
    "optimizer.kind=adam": ["optimizer.kind = 'adam' is not one of", "'adamw'"],
    "model.mlp={kind: moe, experts: 2, top_k: 1}": ["model.mlp.expert is missing"],
    "train.steps=5 train.flops=1e12": [
        "exactly one of",
        "got train.steps=5 and train.flops=1e+12",
        "set the others to null",
    ],
    "train.steps=null": ["exactly one of train.steps, train.tokens", "none is given"],
    "train.steps=5 train.tokens=10 train.tokens_per_param=1": [
        "train.steps=5 and train.tokens=10 and train.tokens_per"
    ],
    "train.grad_accumulation=5": ["train: batch_size=32", "grad_accumulation=5", "change one"],
    "train.seq_len=4096": ["train.seq_len=4096 exceeds model.max_seq_len=2048", "lower the first or raise the second"],
    "model.attention.kv_heads=3": ["model.attention: heads=8", "kv_heads=3", "choose a divisor"],
    "model.mlp={kind: moe, experts: 2, top_k: 3, expert: {kind: gelu, d_ff: 8}}": [
        "top_k=3",
        "experts=2",
        "lower top_k",
    ],
    "model.mlp={kind: moe, experts: 2, top_k: 1, expert: {kind: gelu, d_ff: 8, bias: true}}": ["set expert.bias=false"],
    "model.attention.window=4 model.attention.block_sparse={size: 4, local: 1, stride: 2}": [
        "model.attention: window=4 and block_sparse=",
        "give one of them",
    ],
    "model.attention.chunk=4 model.attention.window=4": ["window=4 and chunk=4: give one of them"],
    "model.attention.block_sparse={size: 4, local: 1}": ["model.attention.block_sparse.stride is missing"],
    "model.attention.block_sparse={size: 0, local: 1, stride: 2}": ["block_sparse.size = 0", "greater than 0"],
    "model.attention.block_sparse={size: 4, local: 1, stride: 2, heads: some}": [
        "block_sparse.heads = 'some'",
        "'shifted' or 'alike'",
    ],
    "model.mlp={kind: gelu, d_ff: 8, limit: 2.0}": ["model.mlp: kind=gelu has no gate", "limit=2.0", "set limit=null"],
    "model.mlp={kind: silu, d_ff: 8, linear: one_plus}": ["kind=silu has no gate", "linear=one_plus", "linear=one"],
    "model.mlp.limit=-1": ["model.mlp.limit = -1", "greater than 0"],
    "model.embedding.scale=-2.0": ["model.embedding.scale", "-2.0", "greater than 0"],
    "model.embedding.scale=sqrt": ["model.embedding.scale", "'sqrt'", "sqrt_d_model"],
    "model.residual=parallel model.placement=post": ["residual=parallel needs placement=pre, not post"],
    "model.position.fraction=0.1": ["attention.head_dim=8 x position.fraction=0.1 = 0", "even number"],
    "model.attention.head_dim=7": ["attention.head_dim=7", "even number"],
    "model.segments.0.unit=[{position: {kind: learned}}]": ["position.kind=learned", "set it on model.position"],
    "model.segments.0.unit=[{}, {attention: {windo: 3}}]": ["segments.0.unit.1", "attention.windo = 3", "window?"],
    "model.segments.0.unit=[{attention: {window: -3}}]": ["segments.0.unit.0: attention.window = -3", "greater than 0"],
    "model.segments=[]": ["model.segments = []", "at least 1 item"],
    "model.segments.3.repeat=1": ["model.segments.3", "a list of 1", "index from 0 to 0"],
    "optimizer.lr.x=3": ["optimizer.lr.x", "0.004, which has no fields", "drop .x"],
    "mesh.data=-1 mesh.fsdp=-1": ["only one mesh axis can be -1"],
    "mesh.sequence_parallel=true": ["over the tensor axis, and tensor=1", "raise tensor, or drop it"],
    "mesh.tensor=0": ["tensor=0 is not a device count", "-1 for all remaining"],
    "schedule={kind: wsd, warmup: 0.9}": ["schedule: warmup=0.9 and decay=0.2", "lower one"],
    "model.position.scaling={kind: yarn, factor: 2.0, original_max_len: 64, mscale: 1.0}": [
        "mscale=1.0",
        "both or neither",
    ],
    "model=llama3/9b": ["model 'llama3/9b' is not known", "llama3/8b"],
    "model=ladder/d7": ["ladder width d7", "the nearest is d8"],
    "model=[1]": ["expected a name such as llama3/8b", "[1]"],
    "train.steps": ["override 'train.steps'", "expected a.b.c=value"],
    "=3": ["expected a.b.c=value"],
    "train..steps=3": ["expected a.b.c=value"],
    "model.norm={kind: rmsnorm": ["override", "the value is not YAML"],
    "train.divergence_factor=1.0": ["train.divergence_factor = 1.0", "greater than 1"],
}


@pytest.mark.parametrize("overrides", BAD)
def test_message(overrides: str) -> None:
    with pytest.raises(UserError) as error:
        load_run("tiny", re.split(r" (?=[a-z_.]+=)", overrides))
    for part in BAD[overrides]:
        assert part in str(error.value)
    assert "adamw." not in str(error.value)


def test_all_wrong_fields_are_listed_at_once() -> None:
    with pytest.raises(UserError) as error:
        load_run("tiny", ["optimizer.lr=-1", "train.seed=-1", "log.every_steps=0"])
    assert len(str(error.value).splitlines()) == 3
    assert all(line.startswith("tiny: ") for line in str(error.value).splitlines())


def test_union_tags_stay_out_of_paths() -> None:
    with pytest.raises(UserError, match=r"^tiny: optimizer\.lr = -1:"):
        load_run("tiny", ["optimizer.lr=-1"])
    with pytest.raises(UserError, match=r"model\.mlp\.expert\.d_ff = 0"):
        load_run("tiny", ["model.mlp={kind: moe, experts: 2, top_k: 1, expert: {kind: gelu, d_ff: 0}}"])


def test_a_union_without_its_kind_lists_the_kinds() -> None:
    with pytest.raises(UserError, match=r"model\.position\.kind is missing; choose one of rope, learned"):
        run_from_data({"model": {"position": {"theta": 1.0}}})


FILES = {
    "twice.yaml": ("train: {steps: 1}\ntrain: {steps: 2}\n", "the key 'train' is given twice"),
    "twice-inside.yaml": ("train:\n  steps: 1\n  steps: 2\n", "line 3: the key 'steps' is given twice"),
    "list.yaml": ("- a\n", "expected a mapping of fields, found list"),
    "broken.yaml": ("train: {steps: 1\n", "not YAML at line"),
    "loop.yaml": ("base: {path}\n", "leads back to itself"),
    "empty.yaml": ("", "expected a mapping of fields, found NoneType"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files(name: str, tmp_path: Path) -> None:
    text, said = FILES[name]
    path = tmp_path / name
    path.write_text(text.replace("{path}", str(path)))
    with pytest.raises(UserError) as error:
        load_run(str(path))
    assert said in str(error.value)
    assert name in str(error.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 text; save it as UTF-8"):
        load_run(str(path))


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"config 'tinny' is not known; nearest: tiny.*\.yaml also works"):
        load_run("tinny")
    with pytest.raises(UserError, match="corpus 'python' is not known; nearest: python-"):
        load_corpus("python")
    with pytest.raises(UserError, match="model 'lama3/8b' is not known; nearest: llama3/8b"):
        load_model("lama3/8b")
    with pytest.raises(UserError, match="model is missing"):
        run_from_data({"train": {"steps": 1}})


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"d_model=10 is not a multiple of attention\.heads=4"):
        run_from_data({"model": {"d_model": 10, "attention": {"heads": 4}}})
