"""The four horizons resolve to whole steps, with the rule in words."""

from __future__ import annotations

import pytest

from llamax.accounting import count_params, horizon, training_flops_per_token
from llamax.config.load import load_run
from llamax.errors import UserError

N = 117_056  # tiny: ladder/d64


def test_steps_are_taken_as_given() -> None:
    config = load_run("tiny", ["train.steps=7"])
    h = horizon(config)
    assert (h.steps, h.tokens, h.n) == (7, 7 * 32 * 128, N)
    assert h.tokens_per_param == 7 * 32 * 128 / N
    assert count_params(config.model).active_matmul == N
    assert h.flops == {c: f * h.tokens for c, f in training_flops_per_token(config.model, 128).items()}
    assert h.flops["6n"] == 6 * N * h.tokens


@pytest.mark.parametrize(
    ("override", "steps", "rule"),
    [
        (
            "train.flops=1e12",
            348,
            "D = C / (6 N) = 1e+12 / (6 x 117,056) = 1,423,820 tokens; steps = round(D / (32 x 128)) = 348",
        ),
        (
            "train.tokens_per_param=20",
            572,
            "D = 20 N = 20 x 117,056 = 2,341,120 tokens; steps = round(D / (32 x 128)) = 572",
        ),
        ("train.tokens=1e6", 244, "D = 1,000,000 tokens, as given; steps = round(D / (32 x 128)) = 244"),
        ("train.steps=3", 3, "steps = 3, as given; D = steps x batch x seq = 12,288 tokens"),
    ],
)
def test_the_rule_names_its_numbers(override: str, steps: int, rule: str) -> None:
    h = horizon(load_run("tiny", [override]))
    assert (h.steps, h.rule) == (steps, rule)
    assert h.tokens == steps * 32 * 128


def test_rounding_is_to_the_nearest_step() -> None:
    assert horizon(load_run("tiny", ["train.tokens=6143"])).steps == 1
    assert horizon(load_run("tiny", ["train.tokens=6145"])).steps == 2


@pytest.mark.parametrize("field", ["tokens=100", "flops=1e6", "tokens_per_param=0.001"])
def test_less_than_a_step_is_an_error(field: str) -> None:
    name, _, value = field.partition("=")
    with pytest.raises(UserError, match=rf"train\.{name}=.* less than one step of 4,096 tokens .*raise it") as error:
        horizon(load_run("tiny", [f"train.{field}"]))
    assert f"={float(value):g}" in str(error.value)
