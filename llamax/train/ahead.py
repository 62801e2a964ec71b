"""The training step compiled for accelerators that are not there: `python -m llamax.train.ahead FOLDER`.

A process of its own, because JAX reads its environment when it starts. FOLDER has `request.json` (`Request`); the
optimized program goes to `program.txt`, what the compiler says of it to `answer.json`, and to standard output a line
for each phase that begins. Bad input is `{"error": ...}` in the answer and exit code 2.
"""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llamax.errors import UserError
from llamax.mesh.flags import FLAGS

REQUEST, ANSWER, PROGRAM = "request.json", "answer.json", "program.txt"
PHASES = ("start", "lower", "compile", "read")
# No metadata server is asked, and one machine may compile several programs at once.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any: the topology is named when it is asked for
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}
# What the CUDA compiler must know of a GPU; xla/backends/gpu/target_config/specs has these figures.
_GPU = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile: a resolved config for `devices` devices of a topology, with the compiler of `platform` (tpu,
    cuda, or cpu: devices simulated here, whatever the topology is of)."""

    config: dict[str, Any]
    platform: str
    topology: str  # as that compiler names it
    devices: int
    device_kind: str
    memory: float | None  # bytes of a device, None: no limit
    bandwidth: float | None


def environment(request: Request) -> dict[str, str]:
    """What the process needs in its environment, beside the caller's own."""
    if request.platform == "cpu":
        return {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={request.devices} "
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        }
    if request.platform == "tpu":
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **TPU_ENVIRONMENT}
    # The flags of a run, without the search for the fastest tiles, which would need the GPU.
    flags = {**FLAGS["gpu"], "xla_gpu_autotune_level": "0"}
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in flags.items())}


def compile_ahead(request: Request, folder: Path) -> dict[str, Any]:
    """Compile the step of `request`; the answer as JSON data, all sizes bytes of one device.

    Raises:
        UserError: a compiler that is not installed, a mesh that does not fit the devices, an axis that does not divide.
    """
    marks = {}

    def phase(name: str) -> None:
        marks[name] = time.perf_counter()
        print(name, flush=True)

    phase("start")
    import jax

    from llamax.config.load import validate
    from llamax.config.run import RunConfig
    from llamax.train.setup import dispatch_shapes, share_places
    from llamax.train.step import make_dispatch

    jax.config.update("jax_compilation_cache_dir", None)
    devices = devices_of(request)
    config = validate(RunConfig, request.config, "config")
    rules, mesh, abstract = share_places(config, devices)
    if mesh.size != request.devices:
        sizes = ", ".join(f"mesh.{axis}={size}" for axis, size in mesh.shape.items())
        raise UserError(
            f"{sizes}: uses {mesh.size} of the {request.devices} devices of the topology; set one axis to -1"
        )
    config = _settled(config, request, dict(mesh.shape))
    phase("lower")
    arguments = dispatch_shapes(config, SimpleNamespace(rules=rules, mesh=mesh, abstract=abstract))  # type: ignore[arg-type]
    lowered = make_dispatch(config, rules, mesh, abstract).lower(*arguments)  # type: ignore[attr-defined]
    phase("compile")
    answer: dict[str, Any] = {
        "compiler": _compiler(request, mesh.devices.flat[0]),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "places": [_place(device) for device in mesh.devices.flat],
        "state": {"weights": _shard_bytes(abstract.model), "optimizer": _shard_bytes(abstract.opt_state)},
        "remat": config.train.remat,
        "needed": None,
        "memory": None,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        answer["needed"] = needed = refused_bytes(str(error), sum(answer["state"].values()))
        if needed is None:
            raise
        compiled = None
    phase("read")
    if compiled is not None:
        plan = compiled.memory_analysis()
        answer["memory"] = {
            name: int(getattr(plan, f"{name}_size_in_bytes"))
            for name in ("argument", "output", "alias", "temp", "generated_code")
        }
        (folder / PROGRAM).write_text(compiled.as_text())
    end = time.perf_counter()
    times = [*(marks[name] for name in PHASES), end]
    answer["seconds"] = {name: times[i + 1] - times[i] for i, name in enumerate(PHASES)}
    return answer


def devices_of(request: Request) -> list[Any]:
    """The devices of a request, described where they are not here."""
    import jax
    from jax.experimental import topologies

    if request.platform == "cpu":
        return jax.devices()
    if request.platform == "tpu":
        return list(topologies.get_topology_desc(platform="tpu", topology_name=request.topology).devices)
    target = _GPU.format(
        bandwidth=int(request.bandwidth or 0), memory=int(request.memory or 0), name=request.device_kind
    )
    from jax._src.cudnn import fused_attention_stablehlo as library

    # The library asks this machine for its cuDNN and GPU even to lower for another.
    library.check_cudnn_version = lambda: 91200
    library.check_compute_capability = lambda capability: True
    library.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"
    described = topologies.get_topology_desc(platform="cuda", target_config=target, topology=request.topology)
    return list(described.devices)


def _settled(config: Any, request: Request, mesh: dict[str, int]) -> Any:
    """`config` with what a run would ask its devices for already decided."""
    from llamax.train.remat import fitting
    from llamax.train.step import straight_layers

    train: dict[str, Any] = {}
    if config.train.unroll_layers is None:  # simulated devices would be taken for CPUs, where short stacks unroll
        most = straight_layers("gpu", request.devices) if request.platform == "cuda" else 0
        train["unroll_layers"] = len(config.model.layers) <= most
    if config.train.remat == "auto" and request.memory is not None:
        train["remat"], _ = fitting(config, int(request.memory), request.platform != "cpu", mesh)
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def _compiler(request: Request, device: Any) -> str:
    import jax

    if request.platform == "tpu":
        from importlib.metadata import version

        return f"libtpu {version('libtpu')} for {device.device_kind}, jax {jax.__version__}"
    if request.platform == "cuda":
        return f"XLA's CUDA compiler for {device.device_kind}, jax {jax.__version__}"
    return f"XLA's CPU compiler for {request.devices} simulated devices, jax {jax.__version__}"


def _place(device: Any) -> list[int]:
    """Where a device is: the coordinates of its chip on a torus, else its number, node by node."""
    return [int(c) for c in device.coords] if device.platform == "tpu" else [int(device.id)]


def _shard_bytes(tree: Any) -> int:
    import math

    import jax

    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"
# What the TPU compiler says of a program that does not fit: all it uses, or what it needs beside its arguments.
_REFUSALS = ((rf"[Uu]sed {_SIZE} of [\d.]+\w* hbm", False), (rf"required for HLO temporaries \({_SIZE}\)", True))


def refused_bytes(message: str, arguments: int) -> int | None:
    """Bytes that a program needs which the compiler refused for its memory, `arguments` those of its arguments; None
    for another error."""
    for pattern, beside in _REFUSALS:
        if found := re.search(pattern, message):
            return int(float(found[1]) * _UNITS[found[2]]) + (arguments if beside else 0)
    return None


def main(folder: Path) -> int:
    """Answer the request in `folder`; the exit code."""
    request = Request(**json.loads((folder / REQUEST).read_text()))
    try:
        answer, code = compile_ahead(request, folder), 0
    except UserError as error:
        answer, code = {"error": str(error)}, 2
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    measured = {"peak_host_bytes": peak, "processor_seconds": used.ru_utime + used.ru_stime}
    (folder / ANSWER).write_text(json.dumps({**answer, **measured}))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
