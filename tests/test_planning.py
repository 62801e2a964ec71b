"""`llamax plan` from end to end: the JSON of a plan, its arithmetic, bad input, and a compilation for a real TPU."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from llamax import planning
from llamax.accounting.flops import training_flops_per_token
from llamax.accounting.memory import training_state_bytes
from llamax.accounting.topology import find_topology
from llamax.cli import main
from llamax.config.load import load_model, load_run
from llamax.errors import UserError
from llamax.planning import _config, plan_run
from llamax.report.changes import changes
from llamax.report.plan_page import plan_lines
from llamax.train.ahead import refused_bytes

OVERRIDES = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.remat=full"]


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    """tiny for a node of GPUs; without their compiler its collectives come from simulated devices."""
    before = planning._compiler
    planning._compiler = lambda topology: ("cpu", topology.name)
    try:
        return plan_run("tiny", OVERRIDES, "h100:8", price=2.0)
    finally:
        planning._compiler = before


def test_a_plan_is_json_and_says_where_its_numbers_are_from(plan: dict[str, Any]) -> None:
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    assert plan["topology"]["devices"] == 8
    assert {axis: size for axis, size in plan["mesh"].items() if size > 1} == {"data": 2, "fsdp": 2, "tensor": 2}
    assert "estimate" in plan["from"]["memory"]
    assert "8 simulated devices" in plan["compiler"]
    assert plan["compile"]["peak_host_bytes"] > 100e6
    assert set(plan["compile"]["seconds"]) == {"start", "lower", "compile", "read"}
    assert set(plan["rules"]) >= {"memory", "collectives", "compute", "network", "step", "mfu", "cost"}


def test_memory_is_a_quarter_of_the_state(plan: dict[str, Any]) -> None:
    """fsdp=2 and tensor=2 cut every matrix in four; norms are cut over fsdp alone."""
    memory, state = plan["memory"], training_state_bytes(load_run("tiny").model)
    assert state["parameters"] / 4 <= memory["weights"] < 1.05 * state["parameters"] / 4
    assert state["optimizer"] / 4 <= memory["optimizer"] < 1.05 * state["optimizer"] / 4
    parts = ("weights", "optimizer", "gradients", "workspace")
    assert memory["total"] == sum(memory[name] for name in parts)
    assert memory["fits"]
    assert memory["capacity"] == 80e9


def test_collectives_of_every_axis(plan: dict[str, Any]) -> None:
    """Two all-reduces of the stream in every layer's forward pass, once more where it is recomputed, two backward."""
    rows = {(row["kind"], tuple(row["axes"])): row for row in plan["collectives"]}
    layers, stream = 2, 32 * 128 // 4 * 64 * 4  # a quarter of the batch in float32
    tensor = rows["all-reduce", ("tensor",)]
    assert tensor["sent_bytes"] >= 4 * layers * stream
    assert any("data" in row["axes"] for row in plan["collectives"])
    assert any("fsdp" in row["axes"] for row in plan["collectives"])
    assert plan["seconds"]["network"] == pytest.approx(sum(row["seconds"] for row in plan["collectives"]))
    assert sum(plan["seconds"]["network_by_axis"].values()) == pytest.approx(plan["seconds"]["network"])


def test_time_and_money_follow_from_the_parts(plan: dict[str, Any]) -> None:
    seconds, flops = plan["seconds"], plan["flops_per_step"]
    tokens = 32 * 128
    assert flops["model"] == pytest.approx(tokens * training_flops_per_token(load_run("tiny").model, 128)["causal"])
    assert seconds["compute"] == pytest.approx((flops["model"] + flops["recomputed"]) / (8 * 989.4e12))
    assert seconds["memory"] == pytest.approx(plan["traffic_bytes"] / 3.35e12)
    parts = [seconds[name] for name in ("compute", "memory", "network")]
    assert seconds["step"] == pytest.approx((max(parts) + sum(parts)) / 2)
    assert plan["mfu"]["expected"] == pytest.approx(flops["model"] / (seconds["step"] * 8 * 989.4e12))
    assert plan["horizon"]["steps"] == 300
    assert plan["cost"] == pytest.approx(300 * seconds["step"] / 3600 * 8 * 2.0)


def test_the_page_is_a_hundred_columns(plan: dict[str, Any]) -> None:
    lines = list(plan_lines(plan))
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for part in ("memory a device", "fits", "all-reduce", "network", "MFU", "$", "rules"):
        assert part in text


@pytest.mark.parametrize(
    ("topology", "overrides", "parts"),
    [
        ("v5p:2x2x4", [], 16),  # 64 rows a chip, four at a time
        ("v5p:4x4x4", [], 4),  # 16 rows a chip, four at a time too: their logits are what counts
        ("v5e:4x4", [], 64),  # nothing fits 16 GB, not even one row
        ("v5p:2x2x4", ["train.grad_accumulation=8"], 8),
        ("v5p:2x2x4", ["train.remat=none"], 64),  # what is kept for the backward pass leaves room for one row
        ("v5p:2x2x4", ["mesh=auto"], 16),  # the layout is chosen later
        ("v5p:2x2x4", ["mesh.stage=4"], 256),  # a pipeline is filled by its microbatches
    ],
)
def test_a_model_by_its_name_has_few_microbatches(topology: str, overrides: list[str], parts: int) -> None:
    """As few as keep the estimate within half of the memory; what is asked for is kept."""
    where = find_topology(topology)
    train = _config("llama3/8b", overrides, where).train
    assert (train.batch_size, train.grad_accumulation) == (1024, parts)


# ---------------------------------------------------------------- what does not fit
def test_changes_until_it_fits() -> None:
    """Llama 3 8B with everything kept, 16 sequences a device: settings alone bring it down."""
    data = ["model=llama3/8b", "train.batch_size=256", "train.seq_len=4096", "train.steps=1", "train.remat=none"]
    config = load_run("tiny", [*data, "train.activation_dtype=float32"])
    topology = find_topology("v5p:2x2x4")
    needed = {"total": 500 * 2**30, "capacity": topology.kind.memory}
    found = changes(config, topology, {"data": 1, "fsdp": 16, "tensor": 1, "expert": 1}, needed)
    assert [row["fits"] for row in found] == [False] * (len(found) - 1) + [True]
    sizes = [row["bytes"] for row in found]
    assert sizes == sorted(sizes, reverse=True)
    assert found[0]["change"] == "train.loss_chunk=8192"
    assert any(row["change"] == "train.grad_accumulation=16" for row in found)


def test_a_state_that_is_too_large_needs_more_devices() -> None:
    """Llama 3.1 405B: 6.5 TB of weights, moments and gradients are more than 16 x 95 GiB, less than 128 of them."""
    config = load_run("pretrain", ["model=llama3.1/405b", "train.grad_accumulation=64", "train.loss_chunk=2048"])
    topology = find_topology("v5p:2x2x4")
    state = training_state_bytes(load_model("llama3.1/405b"))
    needed = {"total": (sum(state.values()) + state["gradients"]) / 16, "capacity": topology.kind.memory}
    found = changes(config, topology, {"data": 1, "fsdp": 16, "tensor": 1, "expert": 1}, needed)
    assert found[-1]["fits"]
    assert found[-1]["change"] == "--topology v5p:4x4x8"


def test_a_refusal_of_the_compiler_is_read() -> None:
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 120.50G of 95.74G hbm."
    assert refused_bytes(said, 10) == int(120.5 * 2**30)
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (36.30G) exceeds"
    )
    assert refused_bytes(said, 10) == int(36.3 * 2**30) + 10
    assert refused_bytes("INTERNAL: something else", 10) is None


# ---------------------------------------------------------------- bad input
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["llamax", "plan", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    return int(stop.value.code or 0), said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny"], "--topology is missing"),
        (["tiny", "--topology", "v9:2x2"], "is not known"),
        (["tiny", "--topology", "v5p:3x3x3"], "is not a shape"),
        (["tiny", "--topology", "h100:8", "--price", "-1"], "--price"),
        (["nothing", "--topology", "h100:8"], "config or model 'nothing' is not known"),
        (["llama3/9b", "--topology", "h100:8"], "model 'llama3/9b' is not known"),
        (["tiny", "--topology", "h100:8", "train.flops=1"], "less than one step"),
    ],
)
def test_bad_input_is_one_message(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run(monkeypatch, capsys, *words)
    assert code == 2
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in text


def test_a_mesh_that_does_not_fit_the_devices_is_one_message() -> None:
    with pytest.raises(UserError, match=r"cpu:4: .*mesh\.data=-1, mesh\.fsdp=3.*does not fit the 4 devices"):
        plan_run("tiny", ["mesh.fsdp=3"], "cpu:4")


def test_without_libtpu_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install llamax\[tpu\]"):
        plan_run("tiny", [], "v5p:2x2x1")


# ---------------------------------------------------------------- with the TPU compiler
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is llamax[tpu]")
def test_a_small_step_for_a_tpu() -> None:
    found = plan_run("tiny", ["mesh.data=2", "mesh.tensor=2"], "v5p:2x2x1")
    assert found["compiler"].startswith("libtpu")
    assert found["from"]["memory"] == "the compiler of this hardware"
    state = training_state_bytes(load_run("tiny").model)
    memory = found["memory"]
    assert memory["weights"] < state["parameters"]
    assert memory["total"] >= memory["weights"] + memory["optimizer"] + memory["gradients"]
    rows = {(row["kind"], tuple(row["axes"])) for row in found["collectives"]}
    assert ("all-reduce", ("tensor",)) in rows
    assert any("data" in axes for _, axes in rows)
    assert 0 < found["mfu"]["worst"] < found["mfu"]["expected"] < found["mfu"]["best"] < 1
