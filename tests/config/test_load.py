"""Names, bases and overrides resolve to the config one expects."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamax.config.components import DenseMlp
from llamax.config.load import diff, dump_yaml, load_model, load_run, model_names, run_from_data
from llamax.config.run import RunConfig
from llamax.errors import UserError


def test_defaults_and_overrides() -> None:
    config = load_run("tiny", ["train.steps=5", "optimizer.lr=1e-3", "mesh.data=8", "model.norm.kind=layernorm"])
    assert (config.train.steps, config.optimizer.lr, config.mesh.data) == (5, 1e-3, 8)
    assert config.model.norm.kind == "layernorm"
    assert config.optimizer.kind == "adamw"


def test_numbers_in_exponent_form() -> None:
    assert load_run("tiny", ["train.steps=1e3"]).train.steps == 1000
    assert load_run("tiny", ["train.flops=1e12"]).train.flops == 1e12
    assert load_run("tiny", ["optimizer.eps=1e-9"]).optimizer.as_dict()["eps"] == 1e-9
    assert load_run("tiny", ["data.corpus=1e5.yaml"]).data.corpus == "1e5.yaml"


def test_one_horizon_on_the_command_line_replaces_the_files() -> None:
    train = load_run("tiny", ["train.tokens_per_param=20"]).train
    assert (train.steps, train.tokens_per_param) == (None, 20.0)


def test_the_same_horizon_twice_takes_the_last() -> None:
    assert load_run("tiny", ["train.steps=5", "train.steps=6"]).train.steps == 6


def test_null_takes_back_a_horizon() -> None:
    train = load_run("tiny", ["train.steps=null", "train.flops=1e12"]).train
    assert (train.steps, train.flops) == (None, 1e12)


def test_changing_a_kind_drops_the_old_kinds_fields() -> None:
    config = load_run("tiny", ["optimizer.kind=lion", "model.position.kind=alibi", "model.mlp.kind=gelu"])
    assert config.optimizer.as_dict()["b2"] == 0.99
    assert config.model.position.as_dict() == {"kind": "alibi"}
    assert config.model.mlp.as_dict() == DenseMlp(kind="gelu", d_ff=176).as_dict()


def test_a_model_by_name_and_its_fields() -> None:
    config = load_run("tiny", ["model=llama3.2/1b", "model.vocab_size=256", "model.segments.0.repeat=2"])
    assert (config.model.d_model, config.model.vocab_size, len(config.model.layers)) == (2048, 256, 2)


def test_a_hub_id_is_a_name() -> None:
    assert load_model("meta-llama/Meta-Llama-3-8B") == load_model("llama3/8b")
    assert load_model("mistralai/mixtral-8x7b-v0.1") == load_model("mixtral/8x7b")


def test_every_name_loads() -> None:
    names = model_names()
    assert {"llama3.1/8b", "llama3/8b", "ladder/d16", "mistral/7b-v0.1"} <= set(names)
    assert len(set(names)) == len(names)
    for name in names:
        assert load_model(name).layers


def test_a_base_by_name_and_by_path(tmp_path: Path) -> None:
    middle, top = tmp_path / "middle.yaml", tmp_path / "top.yaml"
    middle.write_text("base: tiny\ntrain: {tokens: 1e6}\nmodel: {norm: {kind: layernorm}}\n")
    top.write_text(f"base: {middle}\noptimizer: {{lr: 1e-4}}\n")
    config = load_run(str(top))
    assert (config.train.steps, config.train.tokens, config.optimizer.lr) == (None, 1e6, 1e-4)
    assert (config.model.norm.kind, config.model.attention.heads) == ("layernorm", 8)
    assert config.train.seq_len == 128


def test_naming_a_model_replaces_the_bases_model() -> None:
    config = run_from_data({"base": "tiny", "model": {"base": "ladder/d128"}})
    assert (config.model.d_model, config.model.attention.heads) == (128, 4)
    assert run_from_data({"base": "tiny", "model": "ladder/d128"}) == config
    assert load_run("tiny", ["model=ladder/d128"]) == config


def test_derived_heads() -> None:
    model = load_run("tiny", ["model={base: ladder/d64, attention: {heads: 4, kv_heads: null, head_dim: null}}"]).model
    assert (model.attention.kv_heads, model.attention.head_dim) == (4, 16)


# ---------------------------------------------------------------- identity
def test_equal_configs_have_equal_hashes() -> None:
    a, b = load_run("tiny"), load_run("tiny", ["optimizer.lr=4e-3", "train.steps=300"])
    assert a == b
    assert hash(a) == hash(b)
    assert a.digest() == b.digest()
    assert len(a.hash8) == 8
    assert a.hash8 == b.hash8


@pytest.mark.parametrize("override", ["train.steps=301", "optimizer.lr=5e-3", "train.seed=1", "model.norm.eps=1e-6"])
def test_what_sets_the_numbers_sets_the_hash(override: str) -> None:
    assert load_run("tiny", [override]).hash8 != load_run("tiny").hash8


@pytest.mark.parametrize("override", ["mesh.fsdp=2", "checkpoint.every_steps=5", "log.every_steps=1"])
def test_mesh_checkpoint_and_log_are_not_the_identity(override: str) -> None:
    a, b = load_run("tiny", [override]), load_run("tiny")
    assert a.hash8 == b.hash8
    assert a != b


def test_the_hash_does_not_depend_on_the_process() -> None:
    """hash8 names run directories, so another process (and another hash seed) must find the same."""
    import os
    import subprocess
    import sys

    code = "from llamax.config.load import load_run; print(load_run('tiny').hash8)"
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        root = Path(__file__).resolve().parents[2]
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root, check=True
        )
        assert out.stdout.strip() == load_run("tiny").hash8


def test_the_resolved_text_resolves_to_itself(tmp_path: Path) -> None:
    for name in ("tiny", "tiny-moe", "llama3-8b"):
        config = load_run(name)
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_yaml(config))
        assert load_run(str(path)) == config
        assert load_run(str(path)).hash8 == config.hash8


def test_configs_are_frozen() -> None:
    config = load_run("tiny")
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.model = None  # type: ignore[misc, assignment]


def test_diff_names_the_fields() -> None:
    a, b = load_run("tiny"), load_run("tiny", ["optimizer.lr=1e-3", "model.position.kind=nope"])
    assert diff(a.as_dict(), b.as_dict()) == [
        ("model.position.kind", "rope", "nope"),
        ("model.position.theta", 10000.0, None),
        ("model.position.fraction", 1.0, None),
        ("model.position.layout", "half", None),
        ("optimizer.lr", 0.004, 0.001),
    ]
    assert diff(a.as_dict(), a.as_dict()) == []


# ---------------------------------------------------------------- segments and ladder
def test_segments_resolve_to_blocks() -> None:
    local = "{attention: {window: 4}}"
    config = load_run("tiny", [f"model.segments=[{{repeat: 2, unit: [{local}, {{}}]}}, {{repeat: 1}}]"])
    assert [block.attention.window for block in config.model.layers] == [4, None, 4, None, None]
    assert [repeat for repeat, _ in config.model.blocks] == [2, 1]


def test_a_unit_is_the_same_config_however_its_numbers_are_written() -> None:
    a, b = (
        load_run("tiny", [f"model.segments=[{{repeat: 2, unit: [{{position: {{theta: {theta}}}}}]}}]"])
        for theta in ("1000000", "1000000.0")
    )
    assert (a, hash(a), a.hash8) == (b, hash(b), b.hash8)
    assert a.model.layers[0].position.as_dict()["theta"] == 1e6


def test_a_unit_can_change_a_component() -> None:
    moe = "{mlp: {kind: moe, experts: 4, top_k: 2, expert: {kind: swiglu, d_ff: 8}}}"
    config = load_run("tiny", [f"model.segments=[{{repeat: 1}}, {{repeat: 1, unit: [{moe}]}}]"])
    assert [block.mlp.kind for block in config.model.layers] == ["swiglu", "moe"]


@pytest.mark.parametrize(
    ("width", "layers", "heads", "head_dim", "d_ff"),
    [(16, 2, 1, 16, 48), (64, 2, 4, 16, 176), (128, 3, 4, 32, 352), (512, 8, 8, 64, 1376), (2048, 21, 16, 128, 5472)],
)
def test_the_ladder_rule(width: int, layers: int, heads: int, head_dim: int, d_ff: int) -> None:
    """Worked by hand from the rule in configs/ladders/ladder.yaml."""
    model = load_model(f"ladder/d{width}")
    assert (len(model.layers), model.attention.heads, model.attention.head_dim) == (layers, heads, head_dim)
    assert (model.attention.kv_heads, model.mlp.d_ff) == (heads, d_ff)  # type: ignore[union-attr]
    assert model.head.tied


def test_every_listed_width_grows() -> None:
    from llamax.accounting import count_params

    sizes = [count_params(load_model(name)).total for name in model_names() if name.startswith("ladder/")]
    assert sizes == sorted(sizes)
    assert sizes[0] < 11_000
    assert sizes[-1] > 1e9


def test_equal_by_value_not_by_object() -> None:
    data = load_run("tiny").as_dict()
    assert RunConfig.model_validate_json(__import__("json").dumps(data)) == load_run("tiny")
    with pytest.raises(UserError):
        run_from_data({**data, "extra": 1})
