from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llamax.mesh import flags
from llamax.mesh.flags import FLAGS, expected_platform, set_flags


def test_added_to_what_is_there() -> None:
    environment = {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": "--xla_dump_to=/x --xla_gpu_enable_triton_gemm=true"}
    found = set_flags(environment)
    assert found == environment["XLA_FLAGS"]
    assert found.split() == [
        "--xla_dump_to=/x",
        "--xla_gpu_enable_triton_gemm=true",
        "--xla_gpu_enable_latency_hiding_scheduler=true",
    ]
    assert set_flags(environment) == found  # twice is once


@pytest.mark.parametrize("environment", [{"JAX_PLATFORMS": "cpu"}, {"JAX_PLATFORMS": "cuda", "LLAMAX_XLA_FLAGS": "0"}])
def test_nothing_added(environment: dict[str, str]) -> None:
    assert set_flags(environment) == ""
    assert "XLA_FLAGS" not in environment


def test_platform_without_starting_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [expected_platform({"JAX_PLATFORMS": name}) for name in ("cuda,cpu", "tpu", "cpu")] == ["gpu", "tpu", "cpu"]
    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda name: name == "jax_cuda12_plugin")
    assert expected_platform({}) == "gpu"
    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda name: None)
    assert expected_platform({}) == "cpu"


@pytest.mark.parametrize("platform", FLAGS)
def test_the_installed_jaxlib_knows_every_flag(platform: str) -> None:
    """XLA ends a process that names a flag it does not know, whatever the backend."""
    words = " ".join(f"--{name}={value}" for name, value in FLAGS[platform].items())
    environment = {**os.environ, "XLA_FLAGS": words, "JAX_PLATFORMS": "cpu"}
    code = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
