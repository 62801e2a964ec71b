from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamax.model.attention
import llamax.model.linear
import llamax.model.loss
import llamax.model.mla
from llamax.errors import UserError
from llamax.model.execution import Execution
from llamax.model.loss import next_token_loss
from llamax.model.position import rotary_table, sinusoids
from llamax.model.transformer import Transformer

from .modules import small_config, small_model, tokens_of

MOE = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 8}}
GQA = {"kind": "gqa", "heads": 4, "kv_heads": 2}
MLA = {"kind": "mla", "heads": 4, "q_rank": 8, "kv_rank": 6, "nope_dim": 4, "rope_dim": 4, "value_dim": 5}
LOCAL, GLOBAL = {"attention": {"window": 3}}, {"position": {"kind": "nope"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"mlp": MOE},
    "segments": {"segments": [{"repeat": 2, "unit": [LOCAL, GLOBAL]}, {"repeat": 1, "unit": [LOCAL]}]},
    "gpt": {
        "position": {"kind": "learned"},
        "norm": {"kind": "layernorm"},
        "mlp": {"kind": "gelu", "d_ff": 24, "bias": True},
        "attention": {"kind": "gqa", "heads": 2, "qkv_bias": True, "out_bias": True},
        "head": {"tied": True, "bias": True},
    },
    "gemma": {
        "placement": "sandwich",
        "mlp": {"kind": "geglu", "d_ff": 24},
        "attention": {"kind": "gqa", "heads": 4, "kv_heads": 1, "softcap": 5.0, "qk_norm": {"kind": "rmsnorm"}},
        "embedding": {"scale": "sqrt_d_model"},
        "head": {"tied": True, "softcap": 3.0},
    },
    "parallel_alibi": {"residual": "parallel", "position": {"kind": "alibi"}},
    "post": {"placement": "post", "position": {"kind": "sinusoidal"}},
    "deepseek": {"attention": {**MLA, "indexer": {"heads": 2, "head_dim": 6, "top_k": 4}}, "mlp": MOE},
    "llama4": {
        "position": {"kind": "rope", "layout": "interleaved"},
        "attention": {
            **GQA,
            "chunk": 7,
            "temperature": {"floor": 3},
            "qk_norm": {"kind": "rmsnorm", "weight": "none"},
            "qk_norm_place": "after",
        },
    },
    "arctic_cohere": {"branch": MOE, "head": {"scale": 0.3}, "norm": {"kind": "rmsnorm", "weight": "one_plus"}},
}


REPORTED = ("balance", "z", "indexer")


def value_and_gradient(execution: Execution):  # type: ignore[no-untyped-def]
    """jitted (model, tokens) -> (mean loss with z-loss and router losses, gradient); chunks of two positions."""

    def loss(model: Transformer, tokens: jax.Array) -> jax.Array:
        nats, z, count, routers = next_token_loss(model, tokens, None, None, jnp.float32(0.1), 4, execution)
        return (nats + z) / count + sum(0.1 * routers[name].mean() for name in REPORTED if name in routers)

    return jax.jit(jax.value_and_grad(loss))


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Every leaf within `tolerance` of its largest entry, at least a thousandth of all' (a key bias's is zero)."""
    pairs = [
        (np.asarray(f), np.asarray(e)) for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]
    floor = 1e-3 * max(np.abs(e).max() for _, e in pairs)
    for f, e in pairs:
        np.testing.assert_allclose(f, e, atol=tolerance * max(np.abs(e).max(), floor), rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_do_not_depend_on_later_tokens(name: str) -> None:
    """The gradient of the logits at position t is exactly zero for the embeddings of the tokens after it."""
    fields = VARIANTS[name] | {"head": {**VARIANTS[name].get("head", {}), "tied": False}}
    model, t = small_model(**fields), 4
    tokens = jnp.arange(9)[None]

    def some_function(model: Transformer) -> jax.Array:
        return jnp.sum(jnp.sin(model(tokens)[0, t]))

    rows = np.abs(np.asarray(jax.jit(jax.grad(some_function))(model).embedding[...])).max(-1)
    assert np.all(rows[t + 1 :] == 0)
    assert np.all(rows[t - 1 : t + 1] > 0)


@pytest.mark.parametrize("name", ["mixtral", "segments"])
def test_masked_documents_equal_documents_alone(name: str) -> None:
    """Rotary and nope depend on distance only, so a packed document has the logits it has alone."""
    model, tokens = small_model(**VARIANTS[name]), tokens_of(1, 11)
    run = jax.jit(lambda t, s: model(t, s))
    packed = run(tokens, jnp.asarray([[7] * 4 + [8] * 7], jnp.int32))
    alone = [run(tokens[:, :4], None), run(tokens[:, 4:], None)]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, 1), atol=2e-5)
    assert float(jnp.abs(run(tokens, None)[:, 4:] - alone[1]).max()) > 1e-2


def test_unrolled_and_rematerialized_equal_the_scan() -> None:
    """Segments of several blocks, dense and mixture, window and nope."""
    segments = [{"repeat": 2, "unit": [{**LOCAL, "mlp": MOE}, GLOBAL]}, {"repeat": 1, "unit": [LOCAL]}]
    model, tokens = small_model(segments=segments), tokens_of(2, 9)
    expected = value_and_gradient(Execution())(model, tokens)
    for execution in (Execution(unroll=True), Execution(remat="dots"), Execution(remat="full", unroll=True)):
        assert_close(value_and_gradient(execution)(model, tokens), expected, 2e-6)


@pytest.mark.parametrize("name", ["deepseek", "arctic_cohere"])
def test_unrolled_equals_the_scan(name: str) -> None:
    """With remat on the way: what an indexer or a router chooses is chosen again."""
    model, tokens = small_model(**VARIANTS[name]), tokens_of(2, 9)
    expected = value_and_gradient(Execution())(model, tokens)
    assert_close(value_and_gradient(Execution(remat="full", unroll=True))(model, tokens), expected, 2e-6)


def test_remat_recomputes_what_it_says() -> None:
    """Matrix products in the backward pass: full runs the forward ones again, dots keeps those of `contract`."""
    model, tokens = small_model(), tokens_of(2, 9)

    def products(remat: Any) -> int:
        return str(value_and_gradient(Execution(remat=remat)).trace(model, tokens).jaxpr).count("dot_general")

    none, dots, full = products("none"), products("dots"), products("full")
    assert none <= dots < full


@pytest.mark.parametrize("name", ["mixtral", "gpt", "gemma", "deepseek", "llama4", "arctic_cohere"])
def test_explicit_backward_rules_equal_autodiff(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = small_model(**VARIANTS[name]), tokens_of(2, 9)
    found = value_and_gradient(Execution())(model, tokens)

    def plain_contract(x, w, inputs, compute):  # type: ignore[no-untyped-def]
        return jnp.tensordot(x, w, inputs)

    def plain_attend(*args):  # type: ignore[no-untyped-def]
        return llamax.model.attention._attend(*args)[0]

    def plain_loss(x, w, bias, targets, weights, z_loss, softcap, chunk, compute, scale, ways):  # type: ignore[no-untyped-def]
        logits = x @ w + (0.0 if bias is None else bias)
        logits = logits if scale is None else logits * scale
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        return (weights * nll).sum(), (weights * z_loss * jax.nn.logsumexp(logits, -1) ** 2).sum()

    monkeypatch.setattr(llamax.model.linear, "_contract", plain_contract)
    monkeypatch.setattr(llamax.model.attention, "attend", plain_attend)
    monkeypatch.setattr(llamax.model.mla, "attend", plain_attend)
    monkeypatch.setattr(llamax.model.loss, "cross_entropy", plain_loss)
    assert_close(found, value_and_gradient(Execution())(model, tokens), 2e-5)


@pytest.mark.parametrize("mlp", [{"kind": "swiglu", "d_ff": 24}, MOE], ids=["dense", "mixture"])
def test_segments_run_in_order(mlp: dict[str, Any]) -> None:
    """2 x [local, global] + 1 x [local] against a loop over its five layers, router statistics included."""
    model = small_model(segments=VARIANTS["segments"]["segments"], mlp=mlp)
    tokens = tokens_of(2, 9)
    table = jnp.asarray(rotary_table(model.config.position, 4, 9))
    x, balance = model.embedding[...][tokens], []
    for stack, repeat in ((0, 0), (0, 1), (1, 0)):
        for block in model.stacks[stack].blocks:
            one = jax.tree.map(lambda a, i=repeat: a[i], block)
            x, statistics = one(x, table if one.config.position.kind == "rope" else None, None, Execution())
            balance += [statistics["mlp"]["balance"]] if statistics else []
    found, statistics = jax.jit(lambda m, t: m.features(t))(model, tokens)
    assert [b.attention.window for b in model.config.layers] == [3, None, 3, None, 3]
    np.testing.assert_allclose(found, model.norm(x), atol=1e-5)
    np.testing.assert_allclose(statistics.get("balance", jnp.zeros(0)), balance, rtol=1e-6)


def test_mixed_dense_and_mixture_layers() -> None:
    """DeepSeek's shape: a dense layer, then mixtures; statistics have one entry a mixture."""
    model = small_model(segments=[{"repeat": 1}, {"repeat": 2, "unit": [{"mlp": MOE}, {}]}])
    _, statistics = jax.jit(lambda m, t: m.features(t))(model, tokens_of(2, 9))
    assert {name: value.shape for name, value in statistics.items()} == dict.fromkeys(statistics, (2,))
    assert len(statistics) == 6


@pytest.mark.parametrize(
    "head",
    [{}, {"tied": True, "scale": 0.3}, {"bias": True, "softcap": 2.0, "scale": 0.3}, {"tied": True, "bias": True}],
)
def test_head(head: dict[str, Any]) -> None:
    model, tokens = small_model(head=head), tokens_of(2, 5)
    w = model.embedding[...].T if head.get("tied") else model.head[...]
    features, found = jax.jit(lambda m, t: (m.features(t)[0], m(t)))(model, tokens)
    logits = np.asarray(features @ w)
    logits = logits + np.asarray(model.head_bias[...]) if head.get("bias") else logits
    logits = logits * head.get("scale", 1.0)
    logits = 2.0 * np.tanh(logits / 2.0) if head.get("softcap") else logits
    np.testing.assert_allclose(found, logits, atol=1e-5)
    assert hasattr(model, "head") != head.get("tied", False)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "nope", "alibi"])
@pytest.mark.parametrize("scale", ["none", "sqrt_d_model", 2.5])
def test_input_of_the_first_block(position: str, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """token embedding, scaled where asked for, plus the position vector of the kinds that have one."""
    model, tokens = small_model(position={"kind": position}, embedding={"scale": scale}), tokens_of(2, 5)
    expected = np.asarray(model.embedding[...])[tokens] * {"sqrt_d_model": 4.0, "none": 1.0}.get(scale, scale)
    if position == "learned":
        expected = expected + np.asarray(model.position[...])[:5]
    if position == "sinusoidal":
        expected = expected + sinusoids(5, 16)
    seen: list[jax.Array] = []
    monkeypatch.setattr(Execution, "place", lambda self, x: (seen.append(x), x)[1])
    found = jax.jit(lambda m, t: (m.features(t), seen[0])[1])(model, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_learned_positions_end_at_max_seq_len() -> None:
    model = small_model(position={"kind": "learned"})
    with pytest.raises(UserError, match=r"33 tokens.*max_seq_len=32"):
        model(tokens_of(1, 33))


@pytest.mark.parametrize(
    ("position", "moves"), [("learned", True), ("sinusoidal", True), ("rope", False), ("alibi", False), ("nope", False)]
)
def test_absolute_and_relative_positions(position: str, moves: bool) -> None:
    """A masked document moved three tokens on: the same logits for relative kinds, others for absolute ones."""
    model, tokens = small_model(position={"kind": position}), tokens_of(1, 8)
    run = jax.jit(lambda t, s: model(t, s))
    early = run(tokens, jnp.asarray([[1] * 5 + [2] * 3], jnp.int32))[:, :5]
    shifted = jnp.concatenate([tokens[:, 5:], tokens[:, :5]], 1)
    late = run(shifted, jnp.asarray([[2] * 3 + [1] * 5], jnp.int32))[:, 3:]
    assert (float(jnp.abs(early - late).max()) > 1e-2) == moves
    if not moves:
        np.testing.assert_allclose(early, late, atol=1e-5)


@pytest.mark.parametrize("depth_scaling", ["total", "layer"])
def test_initial_weights(depth_scaling: str) -> None:
    """Std of every matrix by role and layer; layers, matrices and experts all differ; norms and biases neutral."""
    init = {"std": 0.05, "depth_scaling": depth_scaling}
    attention = {"kind": "gqa", "heads": 8, "head_dim": 8, "qkv_bias": True}
    segments = [{"repeat": 2}, {"repeat": 1, "unit": [{"mlp": {**MOE, "expert": {"kind": "swiglu", "d_ff": 64}}}, {}]}]
    mlp = {"kind": "swiglu", "d_ff": 64}
    config = small_config(d_model=64, attention=attention, mlp=mlp, init=init, segments=segments)
    model = jax.jit(lambda key: Transformer(config, key=key))(jax.random.key(0))
    layers: dict[str, list[np.ndarray]] = {"query": [], "attention_out": [], "up": [], "down": []}
    for stack in model.stacks:
        for i in range(stack.repeat):
            for block in stack.blocks:
                layers["query"].append(np.asarray(block.attention.query[...][i]))
                layers["attention_out"].append(np.asarray(block.attention.out[...][i]))
                layers["up"].append(np.asarray(block.mlp.up[...][i]))
                layers["down"].append(np.asarray(block.mlp.down[...][i]))
    gains = {"total": [8**-0.5] * 4, "layer": [(2 * (i + 1)) ** -0.5 for i in range(4)]}[depth_scaling]
    for name, matrices in layers.items():
        for gain, matrix in zip(gains, matrices, strict=True):
            expected = 0.05 * (gain if name in ("attention_out", "down") else 1.0)
            assert matrix.std() == pytest.approx(expected, rel=4 / (2 * 4096) ** 0.5), name
    for table in (model.embedding[...], model.head[...]):
        assert float(table.std()) == pytest.approx(0.05, rel=0.08)
    drawn = [m for matrices in layers.values() for matrix in matrices for m in matrix.reshape(-1, 4096)]
    correlation = np.abs(np.corrcoef(np.stack([m / m.std() for m in drawn])) - np.eye(len(drawn)))
    assert correlation.max() < 0.1
    first = model.stacks[0].blocks[0]
    assert np.all(np.asarray(first.attention_norm.scale[...]) == 1)
    assert np.all(np.asarray(first.attention.query_bias[...]) == 0)


def test_fan_in_keeps_the_embedding_at_std() -> None:
    config = small_config(d_model=64, vocab_size=64, init={"kind": "fan_in", "std": 0.01, "depth_scaling": "none"})
    model = jax.jit(lambda key: Transformer(config, key=key))(jax.random.key(0))
    assert float(model.embedding[...].std()) == pytest.approx(0.01, rel=0.05)
    assert float(model.head[...].std()) == pytest.approx(1 / 8, rel=0.05)
    assert float(model.stacks[0].blocks[0].mlp.down[...].std()) == pytest.approx(24**-0.5, rel=0.1)


def test_fan_in_of_a_tied_embedding_is_the_head_s() -> None:
    config = small_config(d_model=64, vocab_size=64, init={"kind": "fan_in", "std": 0.01}, head={"tied": True})
    model = jax.jit(lambda key: Transformer(config, key=key))(jax.random.key(0))
    assert float(model.embedding[...].std()) == pytest.approx(1 / 8, rel=0.05)


def test_prediction_modules_written_out() -> None:
    """arXiv:2412.19437, eq. 21-23: M [norm(Emb(t + k)); norm(h)] through one more block, module after module."""
    model, tokens = small_model(mtp=2, embedding={"scale": "sqrt_d_model"}), tokens_of(2, 9)
    table = jnp.asarray(rotary_table(model.config.position, 4, 6))

    def found(model: Transformer) -> list[jax.Array]:
        first, _ = model.further(0, model.features(tokens[:, :6])[0], tokens[:, 1:7])
        return [first, model.further(1, first, tokens[:, 2:8])[0]]

    def expected(model: Transformer) -> list[jax.Array]:
        h, out = model.features(tokens[:, :6])[0], []
        for k, module in enumerate(model.mtp):
            e = module.embed_norm(4.0 * model.embedding[...][tokens[:, k + 1 : k + 7]])
            both = e @ module.project[...][:16] + module.stream_norm(h) @ module.project[...][16:]
            h = module.norm(module.block(both, table, None, Execution())[0])
            out.append(h)
        return out

    for a, b in zip(*jax.jit(lambda m: (found(m), expected(m)))(model), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert not hasattr(small_model(), "mtp")
