"""How tensors arrive: types, fp8, shards of a mesh, memory; and what a loaded model is good for."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import llamax
from llamax.config.load import run_from_data, validate
from llamax.config.mesh import MeshConfig, load_rules
from llamax.config.model import ModelConfig
from llamax.errors import UserError
from llamax.hub import load as hub_load
from llamax.hub.convert import export_run, import_run
from llamax.hub.dialects import read_config
from llamax.hub.export import export_hf
from llamax.hub.load import load_hf
from llamax.hub.safetensors import Pending, write_file
from llamax.mesh.rules import make_mesh
from llamax.model.execution import Execution
from llamax.model.transformer import Transformer
from llamax.train.optimizer import make_optimizer
from llamax.train.state import abstract_state, init_state
from llamax.train.step import loss_and_gradients

from .folders import OWN, copy, tensors


def leaves(model: Transformer) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def write(folder: Path, found: dict[str, np.ndarray]) -> None:
    write_file(folder / "model.safetensors", {k: Pending(a.dtype, a.shape) for k, a in found.items()}, found.items())


MESHES = {
    "deepseek_v3": MeshConfig(data=1, fsdp=2, tensor=2, expert=2),
    "gemma2": MeshConfig(data=4, fsdp=2),
    "phi3": MeshConfig(data=2, fsdp=4),
    "phi3small": MeshConfig(data=1, fsdp=2, tensor=2, expert=2),
}


@pytest.mark.parametrize("name", MESHES)
def test_shards_onto_a_mesh_as_it_loads(name: str) -> None:
    """Eight devices: the same numbers, each device holding its part alone."""
    mesh = make_mesh(MESHES[name])
    whole, _ = load_hf(OWN / name)
    cut, _ = load_hf(OWN / name, mesh)
    for path, leaf in leaves(cut).items():
        assert leaf.sharding.mesh == mesh
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(leaves(whole)[path]))
    assert any(shard.data.size < leaf.size for leaf in leaves(cut).values() for shard in leaf.addressable_shards)


def test_arrays_larger_than_any_tensor_fill_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few bytes, so that every tensor is cut: the same arrays."""
    whole, _ = load_hf(OWN / "phi3")
    monkeypatch.setattr(hub_load, "CHUNK", 100)
    cut, _ = load_hf(OWN / "phi3")
    for path, leaf in leaves(cut).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(leaves(whole)[path]))


def test_types_of_the_file_are_kept(tmp_path: Path) -> None:
    folder = copy(OWN / "gemma", tmp_path / "model", dtype="bfloat16")
    found = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors(OWN / "gemma").items()}
    write(folder, found)
    model, config = load_hf(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
    export_hf(model, config, tmp_path / "out", max_shard_bytes=4000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    back = tensors(tmp_path / "out")
    assert {k: a.tobytes() for k, a in back.items()} == {k: a.tobytes() for k, a in found.items()}
    again, _ = load_hf(tmp_path / "out")  # through the index
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), model, again)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_fp8_blocks_are_scaled(tmp_path: Path) -> None:
    """Blocks that do not divide the weight; the numbers are weight x scale of their block."""
    block = [8, 5]
    fields = {"quant_method": "fp8", "weight_block_size": block}
    folder = copy(OWN / "mistral", tmp_path / "model", quantization_config=fields, dtype="float32")
    found = tensors(OWN / "mistral")
    wanted: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for name in [name for name in found if "_proj" in name]:
        small = found[name].astype(ml_dtypes.float8_e4m3fn)
        rows, columns = small.shape
        scale = rng.uniform(0.5, 2.0, (-(-rows // block[0]), -(-columns // block[1]))).astype(np.float32)
        found[name], found[f"{name}_scale_inv"] = small, scale
        at = np.arange(rows)[:, None] // block[0], np.arange(columns)[None] // block[1]
        wanted[name] = small.astype(np.float32) * scale[at]
    write(folder, found)
    model, config = load_hf(folder)
    export_hf(model, config, tmp_path / "out")
    back = tensors(tmp_path / "out")
    for name, array in wanted.items():
        np.testing.assert_array_equal(back[name], array)


def test_run_directory_there_and_back(tmp_path: Path) -> None:
    """import, llamax.load, export: the same bytes; bfloat16 stays bfloat16."""
    folder = copy(OWN / "mistral", tmp_path / "model")
    found = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors(OWN / "mistral").items()}
    write(folder, found)
    assert import_run(folder, tmp_path / "run")["dtype"] == "bfloat16"
    model, config = llamax.load(tmp_path / "run")
    direct, _ = llamax.load(folder)
    tokens = jnp.arange(8)[None] % 40
    np.testing.assert_array_equal(np.asarray(model(tokens)), np.asarray(direct(tokens)))
    assert config.model.dialect == "mistral"
    export_run(tmp_path / "run", tmp_path / "out")
    assert {k: a.tobytes() for k, a in tensors(tmp_path / "out").items()} == {k: a.tobytes() for k, a in found.items()}


def test_the_text_model_of_llama_3_2_vision(tmp_path: Path) -> None:
    """Layers that read images, set between those of a Llama, and rows after its vocabulary: text passes them by."""
    plain, found = OWN / "llama", tensors(OWN / "llama")
    config = json.loads((plain / "config.json").read_text())
    at = {0: 0, 1: 2, 2: 3, 3: 4, 4: 5}  # between them, and after: a layer 1 and a layer 6 of cross-attention
    assert config["num_hidden_layers"] == len(at)
    wrapped = {
        "vision_model.class_embedding": np.ones(3, np.float32),
        "multi_modal_projector.bias": np.ones(3, np.float32),
    }
    for name, array in found.items():
        new = re.sub(r"layers\.(\d+)\.", lambda match: f"layers.{at[int(match[1])]}.", name)
        if name == "model.embed_tokens.weight":
            array = np.concatenate([array, np.full((8, array.shape[1]), 9.0, array.dtype)])
        wrapped[f"language_model.{new}"] = array
        if "layers.0.mlp" in name or "layers.0.input" in name:
            for i in (1, 6):
                wrapped[f"language_model.{name.replace('layers.0.', f'layers.{i}.')}"] = array + 1
    text = config | {"num_hidden_layers": 7, "cross_attention_layers": [1, 6], "model_type": "mllama_text_model"}
    folder = copy(plain, tmp_path / "vision")
    (folder / "config.json").write_text(json.dumps({"model_type": "mllama", "text_config": text}))
    write(folder, wrapped)
    with pytest.warns(UserWarning, match=f"{len(wrapped) - len(found)} tensors outside the text model are left out"):
        model, run = load_hf(folder)
    direct, other = load_hf(plain)
    assert run.model == other.model
    tokens = jnp.arange(9)[None]
    np.testing.assert_array_equal(np.asarray(model(tokens)), np.asarray(direct(tokens)))
    export_hf(model, run, tmp_path / "out")
    assert {n: a.tobytes() for n, a in tensors(tmp_path / "out").items()} == {n: a.tobytes() for n, a in found.items()}
    embedding = "language_model.model.embed_tokens.weight"
    write(folder, wrapped | {embedding: np.concatenate([wrapped[embedding], wrapped[embedding][:1]])})
    with pytest.raises(UserError, match=r"of another shape: .*embed_tokens"), pytest.warns(match="left out"):
        load_hf(folder)


def test_the_defaults_of_llama_3_2_vision_are_its_own() -> None:
    config = read_config({"model_type": "mllama", "text_config": {}}, "test")[0]
    assert (config.layers[0].position.theta, config.norm.eps, config.max_seq_len) == (500000.0, 1e-5, 131072)
    assert (len(config.layers), config.vocab_size, config.d_model, config.layers[0].mlp.d_ff) == (
        32,
        128256,
        4096,
        14336,
    )


def test_tokenizer_files_go_through_a_run_directory(tmp_path: Path) -> None:
    """Also those that no config names, which is all that a model with a rank file has."""
    folder = copy(OWN / "mistral", tmp_path / "model")
    files = {"tokenizer_config.json": b"{}", "chat_template.jinja": b"{{ messages }}", "generation_config.json": b"{}"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    import_run(folder, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files


def test_a_training_state_starts_from_an_import() -> None:
    model, config = load_hf(OWN / "qwen3_moe", dtype="float32")
    mesh, rules = make_mesh(MeshConfig(data=1)), load_rules("default")
    fresh = init_state(config, 10, abstract_state(config, rules, mesh))
    state = dataclasses.replace(fresh, model=model)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    assert [a.dtype for a in jax.tree.leaves(state)] == [a.dtype for a in jax.tree.leaves(fresh)]


MEASURE = """
import sys
from llamax.hub.load import load_hf
def rss(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024
load_hf(sys.argv[1])  # everything is imported and compiled
before = rss("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model, _ = load_hf(sys.argv[2])
import jax
held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
print(rss("VmHWM") - before - held)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_above_the_destination_is_within_twice_the_largest_tensor(tmp_path: Path) -> None:
    """A model whose stacked arrays are larger than its largest tensor, 64 MiB: the peak of resident memory."""
    fields = {"hidden_size": 1024, "intermediate_size": 16384, "head_dim": 6, "num_hidden_layers": 4}
    folder = copy(OWN / "mistral", tmp_path / "model", **fields)
    shapes = {"embed_tokens": (40, 1024), "lm_head": (40, 1024), "q_proj": (36, 1024), "k_proj": (6, 1024),
              "v_proj": (6, 1024), "o_proj": (1024, 36), "up_proj": (16384, 1024), "gate_proj": (16384, 1024),
              "down_proj": (1024, 16384)}  # fmt: skip
    names = [name.replace("layers.2", f"layers.{i}") for name in tensors(OWN / "mistral") for i in (2, 3)]
    names = sorted({*names, *tensors(OWN / "mistral")})
    sizes = {n: next((s for part, s in shapes.items() if part in n), (1024,)) for n in names}
    pending = {n: Pending(np.dtype(np.float32), shape) for n, shape in sizes.items()}
    write_file(folder / "model.safetensors", pending, ((n, np.ones(shape, np.float32)) for n, shape in sizes.items()))
    command = [sys.executable, "-c", MEASURE, str(OWN / "mixtral"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 2 * 16384 * 1024 * 4


def test_multi_token_module_after_the_last_layer(tmp_path: Path) -> None:
    """Written as layer n and read back, with the copies of embedding and head that DeepSeek's files carry; a config
    that counts a module the file lacks has none."""
    _, run = load_hf(OWN / "deepseek_v3")
    config = validate(ModelConfig, run.model.as_dict() | {"mtp": 1}, "test")
    model = Transformer(config, key=jax.random.key(0))
    export_hf(model, config, tmp_path / "out")
    found = tensors(tmp_path / "out")
    n = len(config.layers)
    assert found[f"model.layers.{n}.eh_proj.weight"].shape == (config.d_model, 2 * config.d_model)
    found[f"model.layers.{n}.embed_tokens.weight"] = found["model.embed_tokens.weight"]
    found[f"model.layers.{n}.shared_head.head.weight"] = found["lm_head.weight"]
    write(tmp_path / "out", found)
    again, config_again = load_hf(tmp_path / "out")
    assert config_again.model.mtp == 1
    for path, leaf in leaves(again).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(leaves(model)[path]))
    write(tmp_path / "out", {name: a for name, a in found.items() if f"layers.{n}." not in name})
    assert load_hf(tmp_path / "out")[1].model.mtp == 0


def test_one_step_of_training_on_an_import(tmp_path: Path) -> None:
    """From a float32 import in a fresh state: the loss is the import's own, and it falls."""
    model, config = load_hf(OWN / "mixtral", dtype="float32")
    train = {"steps": 20, "batch_size": 2, "seq_len": 20}
    config = run_from_data({**config.as_dict(), "train": train, "mesh": {"data": 1}})
    mesh, rules = make_mesh(config.mesh), load_rules("default")
    abstract = abstract_state(config, rules, mesh)
    state = dataclasses.replace(init_state(config, 20, abstract), model=model)
    tokens = np.load(OWN / "mixtral" / "logits.npz")["input_ids"]
    batch = {"tokens": jnp.asarray(tokens)}
    losses = []
    for _ in range(3):
        loss, _, gradients = loss_and_gradients(state.model, batch, state.hyper, config, Execution())
        optimizer = make_optimizer(config.optimizer, state.hyper, jnp.float32(1e-2))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.model)
        state = dataclasses.replace(state, model=optax.apply_updates(state.model, updates), opt_state=opt_state)
        losses.append(float(loss))
    logits = np.load(OWN / "mixtral" / "logits.npz")["logits"].astype(np.float64)[:, :-1]
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(losses[0], nats.mean(), rtol=1e-4)
    assert losses[2] < losses[0]
