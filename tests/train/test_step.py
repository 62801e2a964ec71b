"""The step: what recompiles, what is exact to the bit, what a bad batch does, and the options that must not change
the numbers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.mesh import load_rules
from llamax.config.run import RunConfig
from llamax.errors import UserError
from llamax.mesh.rules import make_mesh
from llamax.model.execution import Execution
from llamax.train.state import TrainState, hyper_of
from llamax.train.step import (
    AVERAGE_DECAY,
    CPU_OPTIONS,
    Dispatch,
    compiler_options,
    execution_of,
    loss_and_gradients,
    straight_layers,
    train_step,
)
from tests.train.runs import MIXTURE, STEPS, assert_same_bits, go, prepare, run_config, tokens_of

MOE = f"model.mlp={MIXTURE}"
# Every number that is not a shape, at once: if their effect on the program is nothing together, it is nothing alone.
NUMBERS = (
    "optimizer.lr=0.003", "optimizer.weight_decay=0.3", "optimizer.b1=0.8", "optimizer.b2=0.9", "optimizer.eps=1e-6",
    "optimizer.clip_norm=null", "optimizer.groups.head.lr=0.5", "schedule.warmup=0.5", "schedule.final=0.3",
    "train.steps=200", "train.z_loss=0.001", "train.divergence_factor=9.0", "train.seed=5",
)  # fmt: skip


@functools.cache
def base() -> tuple[Dispatch, TrainState, RunConfig]:
    config = run_config()
    return *prepare(config), config


def with_hyper(state: TrainState, **changes: Any) -> TrainState:
    """`state` with other numbers, placed as the ones they replace (another placement is another program)."""
    new = {name: jax.device_put(jnp.float32(value), state.hyper[name].sharding) for name, value in changes.items()}
    return dataclasses.replace(state, hyper={**state.hyper, **new})


# ---------------------------------------------------------------- what recompiles
def test_no_number_recompiles_and_each_is_used():
    dispatch, state, config = base()
    batches = tokens_of(10, config)
    plain, metrics, _ = go(dispatch, state, batches, 3)
    for number in NUMBERS[:-1]:
        other = run_config(number)
        _, found, _ = go(dispatch, with_hyper(state, **hyper_of(other, other.train.steps)), batches, 3)
        moved = any(not np.array_equal(found[name], metrics[name]) for name in metrics)
        # Nothing to clip or to refuse in these three steps, so those two numbers must change nothing.
        assert moved == (number.split("=")[0] not in ("optimizer.clip_norm", "train.divergence_factor")), number
    assert dispatch._cache_size() == 1
    assert int(plain.step) == 3


def test_another_run_of_the_same_shape_is_the_same_program():
    dispatch, state, config = base()
    batches = {name: jnp.asarray(value) for name, value in tokens_of(10, config).items()}
    other, other_state = prepare(run_config(*NUMBERS))
    texts = [d.lower(s, batches, jnp.int32(0)).as_text() for d, s in ((dispatch, state), (other, other_state))]
    assert texts[0] == texts[1]


# ---------------------------------------------------------------- exact to the bit
@pytest.mark.parametrize("cuts", [(3, 7), (1,) * 10])
def test_a_dispatch_cut_anywhere_gives_the_same_bits(cuts: tuple[int, ...]):
    dispatch, state, config = base()
    batches = tokens_of(10, config)
    whole, metrics, ran = go(dispatch, state, batches, 10)
    assert ran == 10
    assert metrics["loss"][-1] < metrics["loss"][0] - 0.3
    done, parts = 0, []
    for count in cuts:
        rest = {name: np.roll(value, -done, axis=0) for name, value in batches.items()}
        state, found, ran = go(dispatch, state, rest, count)
        assert ran == count
        parts.append(found)
        done += count
    assert_same_bits(state, whole)
    assert_same_bits({name: np.concatenate([p[name] for p in parts]) for name in metrics}, metrics)


# ---------------------------------------------------------------- options that change no number
@functools.cache
def one_gradient(*overrides: str, masked: bool = False, execution: Execution = Execution()) -> tuple[Any, Any, Any]:
    """`loss_and_gradients` of the first batch at the base weights, with a z-loss."""
    config = run_config("train.z_loss=0.001", *overrides)
    run = jax.jit(lambda m, b: loss_and_gradients(m, b, hyper_of(config, STEPS), config, execution))
    return run(base()[1].model, one_batch(masked))


def one_batch(masked: bool = False) -> dict[str, np.ndarray]:
    batch = {name: value[0] for name, value in tokens_of(1, run_config()).items()}
    if masked:  # from 16 targets in the first row to 2 in the last, so that a mean of means would be another number
        left = np.arange(17)[None] - 16 + 2 * np.arange(8)[:, None]
        batch["segments"] = 1 + np.maximum(left, 0).astype(np.int32)
    return batch


def assert_close(a: Any, b: Any, rtol: float) -> None:
    """Gradients as vectors: the difference of each array relative to its norm."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.linalg.norm(x - y) <= rtol * np.linalg.norm(y)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_accumulation_equals_the_whole_batch(masked: bool):
    loss, _, gradients = one_gradient(masked=masked)
    loss4, _, gradients4 = one_gradient("train.grad_accumulation=4", masked=masked)
    np.testing.assert_allclose(loss4, loss, rtol=1e-6)
    assert_close(gradients4, gradients, 1e-5)


def test_noise_metric_is_the_norm_of_each_microbatch_on_its_own():
    parts = 4
    _, metrics, gradients = one_gradient(f"train.grad_accumulation={parts}", "log.gradient_noise=true")
    whole = one_gradient(f"train.grad_accumulation={parts}")
    assert "micro_grad_norm" not in whole[1]
    assert_close(gradients, whole[2], 1e-6)
    config, model = run_config("train.z_loss=0.001"), base()[1].model
    alone = jax.jit(lambda m, b: loss_and_gradients(m, b, hyper_of(config, STEPS), config, Execution())[2])
    tokens = one_batch()["tokens"].reshape(parts, -1, 17)
    squares = [sum(float((g**2).sum()) for g in jax.tree.leaves(alone(model, {"tokens": t}))) for t in tokens]
    np.testing.assert_allclose(metrics["micro_grad_norm"], np.sqrt(np.mean(squares)), rtol=1e-5)


def test_noise_metric_needs_microbatches():
    with pytest.raises(UserError, match=r"grad_accumulation"):
        run_config("log.gradient_noise=true")


def test_loss_of_masked_documents_is_the_mean_over_what_is_predicted():
    batch = one_batch(masked=True)
    tokens, segments = batch["tokens"], batch["segments"]
    logits = jax.jit(lambda m, t, g: m(t, g))(base()[1].model, tokens[:, :-1], segments[:, :-1])
    logits = np.asarray(logits, np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    same = segments[:, 1:] == segments[:, :-1]
    assert same.sum(1).tolist() == [16, 14, 12, 10, 8, 6, 4, 2]
    np.testing.assert_allclose(one_gradient(masked=True)[0], nats[same].mean(), rtol=1e-5)


def test_loss_in_chunks_is_the_same():
    whole, chunked = one_gradient(), one_gradient("train.loss_chunk=32")
    np.testing.assert_allclose(chunked[0], whole[0], rtol=1e-6)
    assert_close(chunked[2], whole[2], 1e-5)


def test_bfloat16_compute_is_close_and_keeps_float32_gradients():
    loss, _, gradients = one_gradient(execution=Execution(compute="bfloat16", activation="bfloat16"))
    np.testing.assert_allclose(loss, one_gradient()[0], rtol=2e-3)
    assert float(loss) != float(one_gradient()[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    assert_close(gradients, one_gradient()[2], 0.1)


def test_remat_keeps_the_numbers_and_trades_memory_for_work():
    config = run_config("model.segments=[{repeat: 8}]", "model.mlp.d_ff=64", "train.seq_len=32")
    state, hyper = prepare(config)[1], hyper_of(config, STEPS)
    batch = {name: value[0] for name, value in tokens_of(1, config).items()}
    found = {}
    for remat in ("none", "dots", "full"):
        run = jax.jit(functools.partial(loss_and_gradients, config=config, execution=Execution(remat=remat)))
        compiled = run.lower(state.model, batch, hyper).compile()
        flops, scratch = compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes
        found[remat] = compiled(state.model, batch, hyper), flops, scratch
    none, dots, full = (found[name] for name in ("none", "dots", "full"))
    for other in (dots, full):
        np.testing.assert_allclose(other[0][0], none[0][0], rtol=1e-6)
        assert_close(other[0][2], none[0][2], 1e-5)
    # `full` multiplies every product of a layer again, `dots` only the two inside attention.
    assert none[1] < dots[1] < none[1] + 0.5 * (full[1] - none[1])
    assert full[2] < dots[2] < none[2]


# ---------------------------------------------------------------- bad steps
def spiked(config: RunConfig, at: int) -> dict[str, np.ndarray]:
    """Ten batches, all of one alphabet but that of step `at` (from 0) of tokens no other one has."""
    batches = tokens_of(10, config, vocab=8)
    batches["tokens"][at] = 200 + batches["tokens"][at][:, ::-1]
    return batches


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_divergence_stops_at_the_bad_step_with_the_weights_before_it(kind: str):
    dispatch, state, config = base()
    batches = spiked(config, 6)
    if kind == "loss":
        bad_at, state = 6, with_hyper(state, lr=0.1, divergence_factor=1.5)
    else:
        bad_at, state = 0, with_hyper(state, z_loss=np.inf)  # a finite loss, gradients that are not
    before, _, _ = go(dispatch, state, batches, bad_at)
    after, metrics, ran = go(dispatch, state, batches, 10)
    assert ran == bad_at + 1
    assert metrics["bad"].tolist() == [0.0] * bad_at + [1.0]
    if kind == "loss":
        assert metrics["loss"][-1] > 1.5 * float(before.average)
    else:
        assert np.isfinite(metrics["loss"][-1])
        assert not np.isfinite(metrics["grad_norm"][-1])
    assert (int(after.step), int(after.skipped)) == (bad_at + 1, 1)
    assert_same_bits((after.model, after.opt_state, after.average), (before.model, before.opt_state, before.average))
    later, metrics, ran = go(dispatch, after, tokens_of(10, config), 10)
    assert ran == 0
    assert_same_bits(later, after)


def test_skip_goes_on_and_counts():
    config = run_config("train.on_divergence=skip", "train.divergence_factor=1.5", "optimizer.lr=0.1")
    dispatch, state = prepare(config)
    batches = spiked(config, 6)
    before, _, _ = go(dispatch, state, batches, 6)
    at, _, _ = go(dispatch, state, batches, 7)
    assert_same_bits((at.model, at.opt_state), (before.model, before.opt_state))
    after, metrics, ran = go(dispatch, state, batches, 10)
    assert ran == 10
    assert metrics["bad"].tolist() == [0.0] * 6 + [1.0] + [0.0] * 3
    assert (metrics["update_norm"] == 0).tolist() == (metrics["bad"] == 1).tolist()
    assert (int(after.step), int(after.skipped)) == (10, 1)
    assert metrics["loss"][-1] < metrics["loss"][0]
    assert not np.array_equal(after.model.embedding[...], before.model.embedding[...])


def test_the_running_average_is_of_good_losses():
    dispatch, state, config = base()
    assert np.isnan(state.average)
    after, metrics, _ = go(dispatch, state, tokens_of(10, config), 10)
    average = metrics["loss"][0]
    for loss in metrics["loss"]:
        average = AVERAGE_DECAY * average + (1 - AVERAGE_DECAY) * loss
    np.testing.assert_allclose(after.average, average, rtol=1e-5)


# ---------------------------------------------------------------- mixture of experts
@functools.cache
def mixture() -> tuple[Dispatch, TrainState, RunConfig]:
    config = run_config(MOE)
    return *prepare(config), config


def test_mixture_metrics_of_a_router_that_knows_nothing():
    """Zero router weights: probabilities are uniform, ties go to the first experts, so each metric has a formula."""
    config, state = mixture()[2], mixture()[1]
    routers = [leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state.model)[0] if "router" in str(path)]
    assert routers
    model = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "router" in str(path) else leaf, state.model
    )
    hyper = hyper_of(config, STEPS)
    batch = one_batch()
    split = run_config(MOE, "train.grad_accumulation=4")  # each metric is a mean over microbatches
    run = jax.jit(functools.partial(loss_and_gradients, config=split, execution=Execution()))
    _, metrics, _ = run(model, batch, hyper)
    experts, top_k, layers = 4, 2, 2
    np.testing.assert_allclose(metrics["moe_balance_loss"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["moe_z_loss"], np.log(experts) ** 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["moe_entropy_min"], np.log(top_k) / np.log(experts), rtol=1e-6)
    assert float(metrics["moe_dead_experts"]) == (experts - top_k) * layers
    assert float(metrics["moe_drop_fraction"]) == 0.0


def test_mixture_losses_reach_the_router_and_the_metrics():
    dispatch, state, config = mixture()
    batches = tokens_of(10, config)
    _, plain, _ = go(dispatch, state, batches, 10)
    _, tilted, _ = go(dispatch, with_hyper(state, moe_balance_loss=10.0), batches, 10)
    assert set(plain) == {
        "loss", "lr", "grad_norm", "param_norm", "update_norm", "bad", "moe_balance_loss", "moe_z_loss",
        "moe_sequence_balance_loss", "moe_entropy_min", "moe_dead_experts", "moe_drop_fraction",
    }  # fmt: skip
    assert tilted["moe_balance_loss"][-1] < plain["moe_balance_loss"][-1]
    assert np.all((plain["moe_entropy_min"] > 0) & (plain["moe_entropy_min"] <= 1 + 1e-6))
    assert plain["loss"][0] == tilted["loss"][0]  # the loss reported is cross-entropy alone


# ---------------------------------------------------------------- every kind trains
@pytest.mark.parametrize(
    ("optimizer", "schedule", "lr"),
    [
        ("adamw", "cosine", 0.02),
        ("muon", "linear", 0.02),
        pytest.param("lion", "wsd", 0.004, marks=pytest.mark.slow),
        pytest.param("adafactor", "constant", 0.02, marks=pytest.mark.slow),
        pytest.param("sgd", "cosine", 0.3, marks=pytest.mark.slow),
    ],
)
def test_every_kind_learns(optimizer: str, schedule: str, lr: float):
    config = run_config(
        f"optimizer={{kind: {optimizer}, lr: {lr}}}", f"schedule.kind={schedule}", "train.steps=30",
        "train.steps_per_dispatch=30", "model.segments=[{repeat: 1}]",
    )  # fmt: skip
    dispatch, state = prepare(config)
    _, metrics, _ = go(dispatch, state, tokens_of(30, config), 30)
    assert not metrics["bad"].any()
    assert metrics["loss"][0] == pytest.approx(np.log(256), rel=0.05)
    assert metrics["loss"][-5:].mean() < metrics["loss"][0] - 1.0  # of ln 256 = 5.5; ln 32 = 3.5 knows the alphabet


def test_vmap_over_hyper_is_separate_runs():
    dispatch, state, config = base()
    batches = tokens_of(10, config)
    states = [state, with_hyper(state, lr=0.03, weight_decay=0.5, b1=0.8, clip_norm=0.5, z_loss=0.01)]
    hyper = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(s.hyper for s in states))
    step = functools.partial(train_step, config=config, execution=Execution())
    three = {name: value[:3] for name, value in batches.items()}
    many, metrics = jax.jit(jax.vmap(lambda h: jax.lax.scan(step, dataclasses.replace(state, hyper=h), three)))(hyper)
    for i, alone in enumerate(states):
        after, single, _ = go(dispatch, alone, batches, 3)
        for name, value in single.items():
            np.testing.assert_allclose(metrics[name][i], value, rtol=1e-5, err_msg=name)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], many.model), after.model, 1e-4)
    assert float(metrics["loss"][0, 2]) != float(metrics["loss"][1, 2])


def test_a_cpu_runs_few_layers_as_straight_code():
    def unrolls(*overrides: str) -> bool:
        config = run_config(*overrides)
        return execution_of(config, load_rules(config.mesh.rules), make_mesh(config.mesh, jax.devices()[:1])).unroll

    assert unrolls("model.segments=[{repeat: 8}]")
    assert not unrolls("model.segments=[{repeat: 9}]")
    assert unrolls("model.segments=[{repeat: 9}]", "train.unroll_layers=true")
    assert not unrolls("train.unroll_layers=false")


def test_straight_code_by_platform():
    """Of GPUs only one alone: on several a scan keeps gathered weights from piling up."""
    found = [straight_layers(*place) for place in (("cpu", 2), ("gpu", 1), ("gpu", 2), ("tpu", 1))]
    assert found == [8, 64, 0, 0]


@pytest.mark.parametrize(
    ("flags", "left"),
    [("", set(CPU_OPTIONS)), ("--xla_cpu_prefer_vector_width=256", set(CPU_OPTIONS) - {"xla_cpu_prefer_vector_width"})],
)
def test_options_of_a_dispatch(flags: str, left: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What XLA_FLAGS names is the user's, and only CPUs have options."""
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert compiler_options(jax.devices("cpu")) == {name: CPU_OPTIONS[name] for name in left}
    assert compiler_options([Mock(spec=jax.Device, platform="gpu")]) is None
