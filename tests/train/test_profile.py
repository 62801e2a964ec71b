"""`llamax profile` end to end: a real run traced on the CPU, left as it was; wrong input."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jax.profiler import ProfileData

from tests.train.runs import RUN

Cli = Callable[..., tuple[int, str, str]]
FIELDS = {
    "format", "name", "hash", "weights", "first_step", "device", "jax", "model", "steps_per_dispatch", "traced_steps",
    "traced_dispatches", "step_seconds", "step_seconds_by_dispatch", "step_seconds_traced", "tokens_per_second",
    "flops_per_step", "flops_per_second", "mfu", "host_seconds_per_step", "processor_seconds_per_step", "cores",
    "load_average", "compile_seconds", "memory_bytes", "traced_device", "window_seconds", "shares", "parts", "backward",
    "operations", "rules", "files",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run of the loop's tests as a file."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump({**RUN, "data": {"store": str(store)}}))
    return path


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of twelve steps."""
    from llamax.config.load import load_run
    from llamax.train.loop import train

    folder = tmp_path_factory.mktemp("runs") / "a"
    train(load_run(config), folder)
    return folder


def digests(folder: Path) -> dict[str, tuple[int, str]]:
    """Modification time and content of everything in a folder but its profile."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
        if "profile" not in path.relative_to(folder).parts
    }


def test_a_run_is_profiled_and_left_as_it_was(run: Path, cli: Cli) -> None:
    before = digests(run)
    code, out, err = cli("profile", run, "--steps", 4, "--json")
    assert code == 0, err
    assert digests(run) == before
    found = json.loads(out)
    assert set(found) == FIELDS
    assert found == json.loads((run / "profile" / "summary.json").read_text())
    assert (found["name"], found["weights"], found["first_step"]) == (str(run), "checkpoint of step 12", 12)
    assert found["traced_steps"] == 4
    check_amounts(found)
    check_files(found, run / "profile")


def check_amounts(found: dict[str, Any]) -> None:
    """Shares are of the whole, and the model's own products are among the operations."""
    shares = {name: amount["share"] for name, amount in found["shares"].items()}
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(row["share"] for row in found["operations"]) + shares["idle"] == pytest.approx(1)
    assert {"attention", "mlp", "norm", "head, loss", "optimizer"} <= set(found["parts"])
    products = [row for row in found["operations"] if row["category"] == "matmul"]
    assert all(row["label"].startswith("dot ") and row["flops"] > 0 for row in products)
    heads = [row for row in products if row["where"].startswith("loss.py")]
    # 8 x 16 tokens, width 16, vocabulary 256: the logits, and the gradients of the stream and of the head
    assert sum(row["flops"] for row in heads) == 3 * 2 * 8 * 16 * 16 * 256
    assert any(row["backward"] and row["part"] == "mlp" for row in products)
    assert found["operations"] == sorted(found["operations"], key=lambda row: -row["seconds"])
    assert found["step_seconds"] > 0
    assert found["tokens_per_second"] == pytest.approx(8 * 16 / found["step_seconds"])
    memory = found["memory_bytes"]
    parts = memory["argument"] + memory["output"] - memory["alias"] + memory["temp"] + memory["code"]
    assert memory["program"] == parts > 0


def check_files(found: dict[str, Any], folder: Path) -> None:
    """What Perfetto and XProf open is there; the page is as wide as it should be."""
    files = {name: Path(path) for name, path in found["files"].items()}
    with gzip.open(files["perfetto"], "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {event.get("name") for event in events}
    assert set(found["operations"][0]["names"]) <= names, "the names of the summary are those of the trace"
    assert {plane.name for plane in ProfileData.from_file(str(files["xplane"])).planes} >= {"/host:CPU"}
    assert files["xplane"].parent.parent == folder / "plugins" / "profile", "where TensorBoard looks"
    page = files["page"].read_text()
    assert max(map(len, page.splitlines())) <= 100
    assert found["operations"][0]["label"] in page
    assert {path.name for path in folder.iterdir()} == {"plugins", "summary.json", "summary.md"}


def test_a_config_from_fresh_weights_twice_in_one_folder(config: Path, tmp_path: Path, cli: Cli) -> None:
    """On two devices: the program has a collective. The second profile takes the place of the first, and of no more."""
    folder = tmp_path / "there"
    (folder / "plugins" / "profile" / "another").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    words = ("profile", config, "mesh.data=2", "--steps", 1, "--out", folder)
    code, out, err = cli(*words)
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 100
    assert "collective" in out
    first = json.loads((folder / "summary.json").read_text())
    assert (first["weights"], first["first_step"], first["device"]["count"]) == ("fresh", 0, 2)
    assert first["shares"]["collective"]["seconds"] > 0
    assert cli(*words)[0] == 0
    second = json.loads((folder / "summary.json").read_text())
    kept = {path.name for path in (folder / "plugins" / "profile").iterdir()}
    assert kept == {"another", Path(second["files"]["xplane"]).parent.name}
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_run_without_a_checkpoint_has_fresh_weights(run: Path, tmp_path: Path, cli: Cli) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    code, out, err = cli("profile", begun, "--steps", 1, "--json")
    assert code == 0, err
    assert json.loads(out)["weights"] == "fresh, the run has no checkpoint yet"


# ---------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "--steps", "0"], "--steps=0: nothing to trace; give at least 1"),
        (["{tmp}/nowhere"], "nowhere: no such run; give the --run-dir of a training run, a shipped config"),
        (["{tmp}"], "not a run directory, it has no config.yaml"),
        (["tinny"], "config 'tinny' is not known; nearest: tiny"),
        (["{run}", "model.d_model=32"], "arrays differ from the ones asked for"),
        (["{run}", "mesh.data=9"], "does not fit the 8 devices there are"),
        (["{run}", "--out", "{tmp}/file/profile"], "cannot be written: not a directory"),
        (["{run}", "--out", "{tmp}/taken"], "taken/summary.json: not written by llamax profile"),
    ],
)
def test_wrong_input_is_one_message_and_nothing_written(
    run: Path, tmp_path: Path, cli: Cli, words: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "summary.json").write_text("{}")
    before, there = digests(tmp_path), (run / "profile").exists()
    code, out, err = cli("profile", *(word.format(run=run, tmp=tmp_path) for word in words))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert digests(tmp_path) == before
    assert (run / "profile").exists() == there


def test_training_that_diverges(config: Path, tmp_path: Path, cli: Cli) -> None:
    code, _, err = cli("profile", config, "optimizer.lr=1e30", "schedule.warmup=0.0", "--out", tmp_path / "p")
    assert code == 2
    assert "training has diverged" in err
    assert "train.on_divergence=skip" in err
    assert not (tmp_path / "p").exists()
