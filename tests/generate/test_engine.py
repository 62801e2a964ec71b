"""The engine draws what the model without a cache would draw, whatever the batch, the lengths and the mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.run import MeshConfig
from llamax.errors import UserError
from llamax.generate import engine as engine_module
from llamax.generate.engine import NOTHING, Engine
from llamax.generate.sampling import GREEDY, Sampling
from llamax.mesh.rules import make_mesh
from llamax.model.cache import in_order, init_cache
from llamax.model.transformer import Transformer
from tests.model.modules import small_model

GQA = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8}
ROPE = {"kind": "rope", "theta": 100.0}
MLA = {"kind": "mla", "heads": 4, "q_rank": 12, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}
STYLES: dict[str, dict[str, Any]] = {
    "llama": {"attention": GQA, "position": ROPE},
    "window": {"attention": GQA | {"window": 4}, "position": ROPE},
    "chunk and nope": {
        "attention": GQA | {"chunk": 4},
        "position": ROPE,
        "segments": [{"repeat": 1, "unit": [{}, {"attention": {"chunk": None}, "position": {"kind": "nope"}}]}],
    },
    "mla": {"attention": MLA, "position": ROPE},
    "sparse": {"attention": MLA | {"indexer": {"heads": 2, "head_dim": 8, "top_k": 5}}, "position": ROPE},
    "learned": {"attention": GQA, "position": {"kind": "learned"}},
    "alibi": {"attention": GQA, "position": {"kind": "alibi"}},
    "moe": {
        "attention": GQA,
        "position": ROPE,
        "mlp": {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 16}},
    },
}
PROMPTS = [np.array(ids, np.int32) for ids in ([1, 2, 3, 4, 5, 6, 7], [9], [11, 3, 11, 3])]


FORWARD = jax.jit(lambda model, tokens: model(tokens))


def model_of(style: str) -> Transformer:
    return small_model(max_seq_len=64, **STYLES[style])


def by_full_forwards(model: Transformer, prompt: np.ndarray, count: int) -> list[int]:
    """Greedy by running the whole text through the model for every token."""
    forward = FORWARD
    ids, width = prompt.tolist(), 20  # one width, one program
    for _ in range(count):
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(forward(model, padded)[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("style", STYLES)
def test_greedy_equals_full_forwards_for_unequal_prompts(style: str) -> None:
    model = model_of(style)
    ids, timings = Engine(model).run(PROMPTS, [GREEDY] * 3, [0] * 3, 10)
    assert [row.tolist() for row in ids] == [by_full_forwards(model, prompt, 10) for prompt in PROMPTS]
    assert len({tuple(row) for row in ids}) == 3
    assert timings.steps == 9


@pytest.mark.parametrize("style", ["llama", "window", "mla"])
def test_long_prompts_are_read_in_blocks(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(style)
    long = [np.arange(i, i + n, dtype=np.int32) % 32 for i, n in ((0, 37), (5, 16), (9, 3))]
    whole, _ = Engine(model).run(long, [GREEDY] * 3, [0] * 3, 6)
    monkeypatch.setattr(engine_module, "PREFILL", 16)
    blocks, _ = Engine(model).run(long, [GREEDY] * 3, [0] * 3, 6)
    assert [row.tolist() for row in blocks] == [row.tolist() for row in whole]


@pytest.mark.parametrize("style", ["llama", "mla"])
def test_matrices_kept_with_their_inputs_last_say_the_same(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU keeps them, for one row and for several."""
    model = model_of(style)
    plain = Engine(model).run(PROMPTS, [GREEDY] * 3, [0] * 3, 6)[0]
    monkeypatch.setattr(engine_module, "reads_rows", lambda config: True)
    engine = Engine(model)
    assert engine.model.stacks[0].blocks[0].mlp.up[...].shape[1:] == model.stacks[0].blocks[0].mlp.up[...].shape[:0:-1]
    turned = engine.run(PROMPTS, [GREEDY] * 3, [0] * 3, 6)[0]
    assert [row.tolist() for row in turned] == [row.tolist() for row in plain]
    assert engine.run(PROMPTS[:1], [GREEDY], [0], 6)[0][0].tolist() == plain[0].tolist()


@pytest.mark.parametrize("turned", [True, False])
def test_the_cache_is_pinned_on_one_gpu_alone(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's compiler would turn it in each layer (benchmarks/README.md); cut over several devices, XLA would gather
    what a pin is put on."""
    pinned = []
    monkeypatch.setattr(engine_module, "reads_rows", lambda config: True)
    monkeypatch.setattr(engine_module, "in_order", lambda cache: pinned.append(cache) or in_order(cache))
    mesh = None if turned else make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    Engine(model_of("llama"), mesh).run(PROMPTS[:1], [GREEDY], [0], 4)
    assert bool(pinned) == turned


@pytest.mark.parametrize("style", ["llama", "sparse"])
def test_every_array_of_the_cache_is_pinned_row_by_row(style: str) -> None:
    cache = init_cache(model_of(style).config, 1, 16)
    pinned = [line for line in jax.jit(in_order).lower(cache).as_text().splitlines() if "@LayoutConstraint" in line]
    for array, line in zip(jax.tree.leaves(cache.layers), pinned, strict=True):
        assert f"result_layouts = [dense<{list(reversed(range(array.ndim)))}>" in line


def test_a_row_draws_the_same_alone_and_with_others_and_again() -> None:
    model = model_of("window")
    samplings = [Sampling(0.9), Sampling(1.5, top_k=5), Sampling(1.0, top_p=0.8, min_p=0.02)]
    engine = Engine(model)
    together, _ = engine.run(PROMPTS, samplings, [1, 2, 3], 12)
    for prompt, s, seed, row in zip(PROMPTS, samplings, [1, 2, 3], together, strict=True):
        alone, _ = engine.run([prompt], [s], [seed], 12)
        assert alone[0].tolist() == row.tolist()
    other, _ = engine.run(PROMPTS, samplings, [4, 5, 6], 12)
    assert [row.tolist() for row in other] != [row.tolist() for row in together]


def test_longrope_turns_by_the_length_a_text_has() -> None:
    scaling = {"kind": "longrope", "short": [1.0] * 4, "long": [4.0, 5.0, 6.0, 7.0], "original_max_len": 10}
    model = small_model(max_seq_len=64, attention=GQA, position=ROPE | {"scaling": {**scaling, "factor": 6.4}})
    prompts = [PROMPTS[0], PROMPTS[1], np.arange(13, dtype=np.int32) % 7]
    expected = []
    for prompt in prompts:
        ids = prompt.tolist()
        while len(ids) < len(prompt) + 12:  # unpadded: the angles depend on the length
            ids.append(int(jnp.argmax(FORWARD(model, jnp.array([ids], jnp.int32))[0, -1])))
        expected.append(ids[len(prompt) :])
    engine, seen = Engine(model), []
    found, timings = engine.run(prompts, [GREEDY] * 3, [0] * 3, 12, watch=lambda tokens: seen.append(tokens))
    assert [row.tolist() for row in found] == expected
    assert [row[row != NOTHING].tolist() for row in np.concatenate(seen, axis=1)] == expected
    assert timings.prefill > 0
    alone, _ = engine.run(prompts[:1], [Sampling(1.0)], [5], 12)
    together, _ = engine.run(prompts, [Sampling(1.0)] * 3, [5, 6, 7], 12)
    assert alone[0].tolist() == together[0].tolist()
    stop = expected[0][5]
    stopped, _ = engine.run(prompts[:1], [GREEDY], [0], 12, [stop])
    assert stopped[0].tolist() == expected[0][: expected[0].index(stop) + 1]


def test_few_programs_for_many_lengths() -> None:
    engine = Engine(model_of("llama"))
    compiled = []
    for n in (1, 3, 9, 14):
        prompts = [np.arange(n, dtype=np.int32) % 32]
        _, timings = engine.run(prompts, [Sampling(1.0)], [n], 2 + n)
        compiled.append(timings.compile)
    assert compiled[0] > 0
    assert compiled[1:] == [0, 0, 0]


def test_stop_ids_and_halts() -> None:
    engine = Engine(model_of("llama"))
    free, _ = engine.run(PROMPTS, [GREEDY] * 3, [0] * 3, 12)
    stop = int(free[0][4])
    stopped, _ = engine.run(PROMPTS, [GREEDY] * 3, [0] * 3, 12, stop_ids=[stop])
    for whole, row in zip(free, stopped, strict=True):
        where = whole.tolist().index(stop) + 1 if stop in whole else len(whole)
        assert row.tolist() == whole[:where].tolist()
    seen: list[np.ndarray] = []

    def watch(tokens: np.ndarray) -> np.ndarray:
        seen.append(tokens)
        return np.array([True, False, False])

    halted, _ = engine.run(PROMPTS, [GREEDY] * 3, [0] * 3, 12, watch=watch)
    assert [len(row) for row in halted] == [1, 12, 12]
    assert halted[1].tolist() == free[1].tolist()
    joined = np.concatenate(seen, axis=1)
    assert joined.shape == (3, 12)
    assert (joined[0, 1:] == NOTHING).all()


@pytest.mark.parametrize(
    ("style", "axes"),
    [
        ("llama", {"tensor": 2}),
        pytest.param("window", {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        ("mla", {"data": 2, "tensor": 2}),
        pytest.param("moe", {"expert": 4}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_sharded_equals_unsharded(style: str, axes: dict[str, int], rows: int) -> None:
    model, wanted = model_of(style), ([GREEDY, Sampling(1.0), Sampling(0.7, top_k=4)][:rows], [1, 2, 3][:rows], 8)
    plain, _ = Engine(model).run(PROMPTS[:rows], *wanted)
    mesh = make_mesh(MeshConfig(**{"data": 1, **axes}))
    engine = Engine(model, mesh)
    sharded, _ = engine.run(PROMPTS[:rows], *wanted)
    assert [row.tolist() for row in sharded] == [row.tolist() for row in plain]
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(engine.model))


BAD = [
    ([], 4, "0 prompts"),
    ([np.zeros(0, np.int32)], 4, "prompt 0 has no token"),
    ([np.array([1, 99], np.int32)], 4, "the token 99, which the embedding of model.vocab_size=32"),
    ([np.array([1], np.int32)], 0, "max_new_tokens=0"),
    ([np.ones(60, np.int32)], 10, "exceed the learned positions, model.max_seq_len=64"),
]


@pytest.mark.parametrize(("prompts", "count", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_requests(prompts: list[np.ndarray], count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Engine(model_of("learned")).run(prompts, [GREEDY] * len(prompts), [0] * len(prompts), count)
