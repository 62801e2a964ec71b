"""Damaged folders: one clear message each, and nothing left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llamax.errors import UserError
from llamax.hub.convert import import_run
from llamax.hub.load import load_hf
from llamax.hub.safetensors import read_header

from .folders import OWN, copy, raw_file, tensors

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def refused(folder: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as found:
        load_hf(folder)
    assert len(str(found.value)) < 1000


@pytest.mark.parametrize(
    ("header", "data", "pattern"),
    [
        (b"", b"", "not valid JSON"),
        (b'{"a": 1', b"", "not valid JSON"),
        (b"\xff\xfe{}", b"", "not valid JSON"),
        (b"[]", b"", "is a list"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', bytes(8), "'a' is given twice"),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8), "NaN"),
        (b"[" * 100_000, b"", "not valid JSON"),
        ({"a": {**F32, "dtype": "F31"}}, bytes(8), "'F31' is not one of"),
        ({"a": {**F32, "dtype": ["F32"]}}, bytes(8), "is not one of"),
        ({"a": {**F32, "shape": [-2]}}, bytes(8), "not a list of sizes"),
        ({"a": {**F32, "shape": [2.0]}}, bytes(8), "not a list of sizes"),
        ({"a": {**F32, "shape": [True, 2]}}, bytes(8), "not a list of sizes"),
        ({"a": {**F32, "shape": [3]}}, bytes(8), "takes 12 bytes"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8), "takes 8 bytes"),
        ({"a": {**F32, "data_offsets": [0, 4, 8]}}, bytes(8), "data_offsets has 3"),
        ({"a": {"dtype": "F32"}}, bytes(8), "expected dtype, shape and data_offsets"),
        ({"a": F32}, bytes(4), "truncated, or the offsets leave the file"),
        ({"a": F32}, bytes(12), "4 bytes after the last tensor"),
        ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12), "overlaps 'a'"),
        ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20), "leaves 4 unused bytes after 'a'"),
    ],
)
def test_header(tmp_path: Path, header: Any, data: bytes, pattern: str) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(UserError, match=pattern):
        read_header(path)


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((10**12).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="truncated or no safetensors file"):
        read_header(path)
    path.write_bytes(b"abc")
    with pytest.raises(UserError, match="truncated or no safetensors file"):
        read_header(path)


def test_oversized_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(200_000_100)  # sparse: nothing is read
    with pytest.raises(UserError, match="exceeds the format's 100000000"):
        read_header(path)


# ---------------------------------------------------------------- tensors of the wrong kind
def changed(tmp_path: Path, change: Any) -> Path:
    folder = copy(OWN / "mistral", tmp_path / "model")
    found = tensors(OWN / "mistral")
    change(found)
    save_file(found, folder / "model.safetensors")
    return folder


def test_missing_tensor(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, r"1 tensor missing: model\.layers\.1\.mlp\.up_proj\.weight \[20, 12\]")


def test_extra_tensor(tmp_path: Path) -> None:
    folder = changed(
        tmp_path, lambda t: t.update({"model.layers.3.mlp.up_proj.weight": np.zeros((20, 12), np.float32)})
    )
    refused(folder, r"1 tensor not part of the model: model\.layers\.3\.mlp\.up_proj\.weight")


def test_wrong_shape(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda t: t.update({"model.norm.weight": np.zeros(13, np.float32)}))
    refused(folder, r"of another shape: model\.norm\.weight is \[13\], the config asks for \[12\]")


def test_integer_weights(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda t: t.update({"model.norm.weight": np.zeros(12, np.int32)}))
    refused(folder, "model.norm.weight is I32 without a scale")


def test_truncated_data(tmp_path: Path) -> None:
    folder = copy(OWN / "mistral", tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    refused(folder, "truncated")


# ---------------------------------------------------------------- index
def indexed(tmp_path: Path, weight_map: Any) -> Path:
    folder = copy(OWN / "mistral", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


@pytest.mark.parametrize("name", ["../part.safetensors", "/etc/part.safetensors", "a/../part.safetensors", "..", "", 7])
def test_index_naming_a_file_outside(tmp_path: Path, name: Any) -> None:
    (tmp_path / "part.safetensors").write_bytes(b"")
    refused(indexed(tmp_path, {"model.norm.weight": name}), "no file name inside this folder")


def test_index_with_a_key_twice(tmp_path: Path) -> None:
    text = '{"weight_map": {"a": "part.safetensors", "a": "part.safetensors"}}'
    refused(indexed(tmp_path, text), "'a' is given twice")


def test_index_and_files_disagree(tmp_path: Path) -> None:
    refused(indexed(tmp_path, {"model.norm.weight": "part.safetensors"}), "is not in model.safetensors.index.json")
    refused(indexed(tmp_path / "2", {"nothing": "part.safetensors"}), "tensor nothing is not in part.safetensors")
    refused(indexed(tmp_path / "3", {"nothing": "gone.safetensors"}), "gone.safetensors: the index names it")
    refused(indexed(tmp_path / "4", {}), "no weight_map")


# ---------------------------------------------------------------- pickles
@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_is_refused_with_the_way_to_convert(tmp_path: Path, name: str) -> None:
    folder = copy(OWN / "mistral", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04.")
    refused(folder, "never does; convert it where you trust it.*save_pretrained")
    refused(folder / name, "save_pretrained")
    (folder / "config.json").unlink()
    refused(folder, "save_pretrained")


def test_index_of_pickles(tmp_path: Path) -> None:
    refused(indexed(tmp_path, {"a": "pytorch_model.bin"}), "save_pretrained")


# ---------------------------------------------------------------- config
def mllama(layers: Any, left_out: Any) -> dict[str, Any]:
    text = {"num_hidden_layers": layers, "cross_attention_layers": left_out}
    return {"model_type": "mllama", "text_config": text}


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"model_type": "mystral"}, "model_type 'mystral' is not known; nearest: mistral"),
        ({"model_type": 3}, "model_type is 3"),
        (
            mllama(2, [5]),
            r"cross_attention_layers = \[5\]: give the numbers, from 0, of some of the num_hidden_layers",
        ),
        (mllama(2, [0, 0]), "some of the num_hidden_layers = 2 layers"),
        (mllama(1, [0]), "num_hidden_layers = 1 layers"),
        (mllama("2", [0]), "num_hidden_layers = '2' layers"),
        (mllama(2, None), "cross_attention_layers = None"),
        ({"hidden_size": "twelve"}, "hidden_size = 'twelve': give a positive integer"),
        ({"hidden_size": 13, "head_dim": None}, "not a multiple"),
        ({"num_hidden_layers": 10**9}, "at most 512 layers"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ({"rope_parameters": {"mrope_section": [1, 2]}}, "no rotary embedding with this field"),
        ({"partial_rotary_factor": 0.5}, "turns whole heads"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "not a multiple of kv_heads"),
        ({"quantization_config": {"quant_method": "gptq"}}, "only fp8"),
        ({"vocab_size": 41}, "of another shape: .*embed_tokens"),
    ],
)
def test_config(tmp_path: Path, fields: dict[str, Any], pattern: str) -> None:
    refused(copy(OWN / "mistral", tmp_path / "model", **fields), pattern)


def test_config_that_is_no_json(tmp_path: Path) -> None:
    folder = copy(OWN / "mistral", tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "mistral", "model_type": "llama"}')
    refused(folder, "'model_type' is given twice")
    (folder / "config.json").write_text("model_type: mistral")
    refused(folder, "not valid JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "expected a JSON object")
    refused(tmp_path, "no config.json")


# ---------------------------------------------------------------- tokenizer, and what is left behind
def test_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    folder = copy(OWN / "mistral", tmp_path / "model")
    vocab = {f"t{i}": i for i in range(41)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}}))
    refused(folder, re.escape("ids up to 40 do not fit the embedding's 40 rows (vocab_size)"))


def test_nothing_is_left_half_imported(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        import_run(folder, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("kept")
    with pytest.raises(UserError, match="already there"):
        import_run(OWN / "mistral", tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
