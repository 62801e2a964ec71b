"""Ladder sizes in the style of a family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamax.accounting.params import count_params
from llamax.config.files import read_yaml, shipped
from llamax.config.load import load_model, load_run
from llamax.config.style import styled
from llamax.config.sweep import load_sweep
from llamax.errors import UserError
from llamax.sweep.expand import expand

STYLES = list(shipped("styles"))
WIDTHS = read_yaml(shipped("ladders")["ladder"])["widths"]
SIZE: dict[str, Any] = {
    "vocab_size": 7,
    "d_model": 48,
    "max_seq_len": 2048,
    "segments": [{"repeat": 7}],
    "attention": {"heads": 12, "kv_heads": 12, "head_dim": 4},
    "mlp": {"kind": "swiglu", "d_ff": 128},
}


@pytest.mark.parametrize("style", STYLES)
def test_every_width_of_the_ladder_has_every_style(style: str) -> None:
    sizes = [count_params(load_model(f"ladder/d{width}@{style}")).active_matmul for width in WIDTHS]
    assert sizes == sorted(set(sizes))
    for width, n in zip(WIDTHS, sizes, strict=True):  # what a token meets stays comparable: that is what styles are for
        assert 0.7 < n / count_params(load_model(f"ladder/d{width}")).active_matmul < 2.5


def test_styles_differ() -> None:
    texts = {load_model(f"ladder/d64@{style}").canonical() for style in STYLES}
    assert len(texts) == len(STYLES)


def written(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return styled(SIZE, str(path), SIZE)


def test_rules(tmp_path: Path) -> None:
    found = written(
        tmp_path,
        """
model:
  a: {of: heads, times: 0.25, divides: heads}
  b: {of: heads, times: 0.4, divides: heads}
  c: {of: width, times: 0.33, multiple: 8}
  d: [{of: d_ff}, {e: {of: max_seq_len, times: 0.001, min: 16}}]
  f: {of: head_dim, times: 0.6}
""",
    )
    del found["segments"]
    rest = {"a": 3, "b": 4, "c": 16, "d": [128, {"e": 16}], "f": 2}
    assert found == {"vocab_size": 7, "d_model": 48, "max_seq_len": 2048, **rest}


def test_the_pattern_is_laid_from_the_last_layer_back(tmp_path: Path) -> None:
    found = written(tmp_path, "model: {}\nfirst: [{x: 0}]\npattern: [{x: 1}, {x: 2}, {x: 3}, {x: 4}]\n")
    units = [block["x"] for segment in found["segments"] for _ in range(segment["repeat"]) for block in segment["unit"]]
    assert units == [0, 3, 4, 1, 2, 3, 4]
    assert [block.attention.window for block in load_model("ladder/d64@gemma3").layers] == [64, None]
    plain = styled(SIZE, "llama3", SIZE)
    assert plain["segments"] == [{"repeat": 7, "unit": [{}]}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {a: {of: hats}}", "'hats' in the rule"),
        ("model: {a: {of: heads, time: 2}}", "'time' in the rule"),
        ("model: {}\nlayers: 3", "layers is not a field"),
    ],
)
def test_a_bad_style_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        written(tmp_path, text)


def test_style_on_the_command_line_rebuilds_the_model_of_any_config() -> None:
    """Whatever tiny says of its heads, and whatever the order; only what KEPT names stays."""
    plain = load_model("ladder/d32@deepseek_v3")
    for overrides in (["style=deepseek_v3", "model.base=ladder/d32"], ["model=ladder/d32", "model.style=deepseek_v3"]):
        assert load_run("tiny", overrides).model == plain
    assert load_run("tiny-moe", ["style=llama3"]).model == load_model("ladder/d64@llama3")
    assert load_run("tiny", ["style=llama3", "model.vocab_size=512"]).model.vocab_size == 512
    assert load_run("quickstart", ["style=gemma3"]).model.max_seq_len == 128
    assert load_run("tiny", ["model=ladder/d32@gemma", "model.style=gemma2"]).model == load_model("ladder/d32@gemma2")


def test_a_name_with_a_style_is_a_base_to_change() -> None:
    model = load_run("tiny", ["model=ladder/d32@gemma3", "model.placement=pre"]).model
    assert (model.placement, model.embedding.scale) == ("pre", "sqrt_d_model")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["style=gemma9"], "style 'gemma9' is not known; nearest: gemma"),
        (["style=gemma3", "model=llama3/8b"], "model.base is 'llama3/8b'; set it to ladder"),
        (["model=ladder/d64@gemma9"], "style 'gemma9' is not known"),
    ],
)
def test_a_style_that_cannot_be(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_run("tiny", overrides)


def test_a_sweep_over_styles(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "name: s\nbase: tiny\naxes:\n  - {kind: product, fields: {style: [llama3, gemma3]}}\n"
        "  - {kind: isoflop, budgets: [1e10], sizes: [ladder/d16, ladder/d32]}\n"
    )
    points = expand(load_sweep(path))
    assert [point.label for point in points][:2] == ["style_llama3-C1e10-d16", "style_llama3-C1e10-d32"]
    assert points[3].tags == {"style": "gemma3", "budget": 1e10, "size": "d32"}
