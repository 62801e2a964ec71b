"""What the operand type becomes where the config leaves it to the machine, and that a run keeps it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from llamax.train import precision as module
from llamax.train.loop import train
from llamax.train.precision import Precision, cpu_flag, precision
from llamax.train.profile import _Session as ProfileSession

from .runs import run_config


def device(platform: str, kind: str) -> SimpleNamespace:
    return SimpleNamespace(platform=platform, device_kind=kind)


def test_what_the_config_says_stays():
    assert precision("float32", [device("gpu", "NVIDIA H200")]) == Precision("float32", "as the config says")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("NVIDIA H200", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "bfloat16"),
        ("Tesla V100-SXM2-16GB", "float32"),
        ("Tesla T4", "float32"),
        ("a device of next year", "bfloat16"),
    ],
)
def test_accelerators_multiply_bfloat16_where_they_can(kind, dtype):
    found = precision("auto", [device("gpu", kind)])
    assert found.dtype == dtype
    assert kind in found.why


@pytest.mark.parametrize(("flag", "dtype"), [("amx_bf16", "bfloat16"), ("avx512_bf16", "bfloat16"), (None, "float32")])
def test_a_cpu_needs_instructions_of_its_own(monkeypatch, flag, dtype):
    monkeypatch.setattr(module, "cpu_flag", lambda: flag)
    found = precision("auto", [device("cpu", "cpu")])
    assert found.dtype == dtype
    assert (flag or "amx_bf16") in found.why


def test_the_flags_are_read_as_words(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("flags\t\t: fpu avx512f avx512_bf16x\n")
    assert cpu_flag(info) is None
    info.write_text("flags\t\t: fpu avx512f avx512_bf16\n")
    assert cpu_flag(info) == "avx512_bf16"
    assert cpu_flag(tmp_path / "absent") is None


def test_a_run_keeps_the_type_it_began_with(monkeypatch, tmp_path, store, capsys):
    config = run_config("train.compute_dtype=auto", "train.steps=4", store=store)
    monkeypatch.setattr(module, "cpu_flag", lambda: None)

    class Enough(Exception):
        pass

    def stop(progress):
        if progress.step:
            raise Enough

    with pytest.raises(Enough):
        train(config, tmp_path / "run", report=stop)
    said = capsys.readouterr().err
    assert "note: products in float32: this CPU has none of amx_bf16, avx512_bf16" in said
    monkeypatch.setattr(module, "cpu_flag", lambda: "amx_bf16")
    result = train(config, tmp_path / "run")
    assert "note: products in float32: the run began with it" in capsys.readouterr().err
    assert (result["compute_dtype"], result["hash"]) == ("float32", config.hash8)
    assert json.loads((tmp_path / "run" / "env.json").read_text())["precision"]["dtype"] == "float32"
    assert train(config, tmp_path / "other")["compute_dtype"] == "bfloat16"
    profiled = ProfileSession(config, tmp_path / "run", lambda *_: None)
    assert profiled.config.train.compute_dtype == "float32", "a profile shows the run's own step"
