"""Published learning-rate rules against arithmetic done here, their derivations, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llamax.config.load import validate
from llamax.config.lr_rules import Marin, Nanochat, SqrtBatch, StepLaw
from llamax.config.run import RunConfig
from llamax.config.sweep import Rules, SweepConfig
from llamax.errors import UserError
from llamax.sweep.lr_rules import derive, inner_parameters
from llamax.sweep.plan import make_plan
from llamax.sweep.throughput import Throughput

SLOW = Throughput(lambda n, tokens: 1e9, 3.0, "one GFLOP/s")


def cells(rules: dict[str, Any], *overrides: str, size: str = "ladder/d64") -> Any:
    train = {"tokens": 2e6, "seq_len": 128, "batch_size": 8}
    base = {"model": {"base": size, "max_seq_len": 4096}, "optimizer": {"kind": "adamw"}, "train": train}
    spec = validate(SweepConfig, {"name": "s", "base": base, "rules": rules, "overrides": list(overrides)}, "test")
    return make_plan(spec, throughput=SLOW).cells


def run(*overrides: str) -> RunConfig:
    return cells({}, *overrides)[0].config


def test_step_law_by_logarithms() -> None:
    """log lr = log 1.79 - 0.713 log N + 0.307 log D; N of d64 by hand: two layers of four d x d and three d x d_ff."""
    n = 2 * (4 * 64 * 64 + 3 * 64 * 176 + 2 * 64) + 64
    assert inner_parameters(run()) == n
    (cell,) = cells({"lr": {"kind": "step_law"}})
    expected = math.exp(math.log(1.79) - 0.713 * math.log(n) + 0.307 * math.log(2e6))
    assert cell.lr == pytest.approx(expected, rel=5e-3)
    assert f"1.79 x {n:,}^-0.713 x 2,000,000^0.307" in cell.rules["lr"]
    assert "arXiv:2503.04715" in cell.rules["lr"]
    (kept,) = cells({"lr": {"kind": "step_law", "max": 0.01}})
    assert kept.lr == 0.01
    assert "kept at most 0.01" in kept.rules["lr"]


def test_step_law_at_the_papers_scale() -> None:
    """A billion parameters, 100 billion tokens: 1.79 x 10^(-0.713 x 9 + 0.307 x 11) = 1.632e-3; 0.58 x 10^(0.571 x 11)
    tokens a batch."""
    n = inner_parameters(run("model.base=ladder/d1024"))
    found = derive(StepLaw(kind="step_law"), run("model.base=ladder/d1024"), 1e11)
    assert found.value == pytest.approx(1.632e-3 * (n / 1e9) ** -0.713, rel=5e-3)
    (cell,) = cells({"batch": {"kind": "step_law"}}, "train.tokens=1e11", "train.seq_len=2048")
    assert cell.batch == 512  # 1.108e6 / 2048 = 541, the nearest power of two
    assert "0.58 x D^0.571" in cell.rules["batch"]


def test_square_root_of_the_batch() -> None:
    for batch, factor in ((8, 1.0), (32, 2.0), (2, 0.5)):
        found = derive(SqrtBatch(kind="sqrt_batch", lr=3e-3, batch_tokens=1024), run(f"train.batch_size={batch}"), 1e6)
        assert found.value == pytest.approx(3e-3 * factor)
        assert found.source.startswith("square root, arXiv:2205.10287")


def test_marin_is_its_recipe() -> None:
    """0.33 sqrt(64) / 512 = 0.00516 in c_adamc.py: 64 sequences of 4096 at hidden size 512; capped at 0.01."""
    own = run("model.base=ladder/d512", "train.batch_size=64", "train.seq_len=4096", "train.tokens=1e9")
    assert derive(Marin(kind="marin"), own, 1e9).value == pytest.approx(0.00516)
    shorter = run("model.base=ladder/d512", "train.batch_size=2048", "train.tokens=1e9")  # as many tokens a batch
    assert derive(Marin(kind="marin"), shorter, 1e9).value == pytest.approx(0.00516)
    found = derive(Marin(kind="marin"), run("train.batch_size=2048"), 1e9)
    assert (found.value, found.note) == (0.01, "kept at most 0.01")
    assert str(found).startswith(
        "lr = c B^0.5 / d_model = 0.33 x 64^0.5 / 64 = 0.04125, kept at most 0.01; three digits"
    )


def test_nanochat_scales_by_width_and_batch() -> None:
    """Its d20 (1280 wide) prints 0.774597 for (1280 / 768)^-0.5; 262,144 tokens are sqrt(1/2) of its 524,288."""
    rule = Nanochat(kind="nanochat", lr=1.0)
    wide = run("model.base=ladder/d1280", "train.batch_size=128", "train.seq_len=4096", "train.tokens=1e9")
    assert derive(rule, wide, 1e9).raw == pytest.approx(0.774597, abs=5e-7)
    half = run("model.base=ladder/d768", "train.batch_size=64", "train.seq_len=4096", "train.tokens=1e9")
    assert derive(rule, half, 1e9).raw == pytest.approx(math.sqrt(0.5))
    muon = run("model.base=ladder/d1280", "train.batch_size=128", "train.seq_len=4096", "optimizer.kind=muon")
    assert derive(rule, muon, 1e9).raw == 1.0


def test_rules_see_the_batch_that_rules_set() -> None:
    (cell,) = cells({"lr": {"kind": "sqrt_batch", "lr": 0.01, "batch_tokens": 1024}, "batch": {"kind": "step_law"}})
    wanted = 0.58 * 2e6**0.571 / 128
    assert cell.batch == 2 ** round(math.log2(wanted))
    assert cell.lr == pytest.approx(0.01 * math.sqrt(cell.batch * 128 / 1024), rel=5e-3)


def test_min_steps_keeps_step_laws_floor() -> None:
    (cell,) = cells({"batch": {"kind": "step_law", "min": 8}, "min_steps": 100_000})
    assert cell.batch == 8


def test_what_a_rule_lacks_is_named() -> None:
    with pytest.raises(UserError, match="batch_tokens is missing"):
        validate(Rules, {"lr": {"kind": "sqrt_batch", "lr": 0.1}}, "rules")
    with pytest.raises(UserError, match=r"kind step_law needs D, and train\.steps=10"):
        cells({"batch": {"kind": "step_law"}}, "train.steps=10")
    with pytest.raises(UserError, match="lr"):
        validate(Rules, {"lr": {"kind": "nanochat"}}, "rules")
    assert StepLaw(kind="step_law").max is None
