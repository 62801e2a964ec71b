"""`llamax curves` on fabricated runs: what it finds, draws and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from llamax.cli import app
from llamax.curving import examine
from llamax.errors import UserError

ROWS = 200


def make_run(
    path: Path, *, spike_at: int | None = None, noise: bool = False, seed: int = 0, lr: float = 0.01, status: str = ""
) -> Path:
    """A run of 200 logged rows, 1,000 tokens each, loss 2 + 3 / sqrt(row); with a `status`, one that ended so."""
    path.mkdir(parents=True)
    train = {"batch_size": 8, "seq_len": 125, "steps": ROWS, "grad_accumulation": 4 if noise else 1, "seed": seed}
    (path / "config.yaml").write_text(yaml.safe_dump({"train": train, "optimizer": {"lr": lr}}))
    if status:
        (path / "result.json").write_text(json.dumps({"status": status, "n": 1000, "tokens": 1000 * ROWS}))
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(1, ROWS + 1):
        loss = 2 + 3 * i**-0.5 + 0.01 * rng.normal() + (1.0 if i == spike_at else 0.0)
        row = {"step": i, "tokens": 1000 * i, "loss": loss, "seconds": 0.5 * i, "flops_6n": 6e5 * i, "grad_norm": 1.0}
        rows.append(row | ({"micro_grad_norm": 2.0} if noise else {}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_spikes_noise_and_the_common_point_are_found(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "x" / "a", spike_at=150), make_run(tmp_path / "y" / "b", noise=True, seed=1)
    found = examine([a, b], on="tokens")
    first, second = found["runs"]
    assert (first["run"], second["run"]) == ("a", "b")
    (spike,) = first["spikes"]
    assert (spike["step"], spike["recovered"]) == (150, True)
    assert spike["height"] == pytest.approx(1.0, abs=0.1)
    # |G|² = (1000·1 - 250·4) / 750 = 0: nothing but noise, and no number is made up
    assert first["gradient_noise"] is None
    assert second["gradient_noise"]["scale"] is None
    assert found["common"]["at"] == pytest.approx(2e5)
    assert found["common"]["losses"]["a"] == pytest.approx(2.2, abs=0.05)


def test_one_name_twice_is_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / folder / "a") for folder in ("x", "y")]
    assert [run["run"] for run in examine(runs, on="seconds")["runs"]] == [str(run) for run in runs]


def test_the_command_prints_draws_and_refuses(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "a", spike_at=150, status="done"), tmp_path / "figure.png"
    done = CliRunner().invoke(app, ["curves", str(run), "--smooth", "5", "--on", "flops", "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["smooth"] == 5
    assert out.read_bytes()[:4] == b"\x89PNG"
    text = CliRunner().invoke(app, ["curves", str(run)]).stdout
    assert "recovered" in text
    assert max(map(len, text.splitlines())) <= 100
    for options, words in (
        (["--out", "a.gif"], r"--out a\.gif"),
        (["--on", "epochs"], "on: 'epochs'"),
        (["--floor", "1.0"], "1 run; a collapse"),
    ):
        with pytest.raises(UserError, match=words):
            CliRunner().invoke(app, ["curves", str(run), *options], catch_exceptions=False)
    going_on = make_run(tmp_path / "b", spike_at=150)
    with pytest.raises(UserError, match="two or more finished runs; not finished: b"):
        CliRunner().invoke(app, ["curves", str(run), str(going_on), "--floor", "1.0"], catch_exceptions=False)


def test_a_collapse_is_of_finished_runs_and_its_noise_of_seeds(tmp_path: Path) -> None:
    """Runs of two learning rates are no seeds of one; the last row of a run that diverged is not its end."""
    runs = [make_run(tmp_path / "a", status="done"), make_run(tmp_path / "b", seed=1, lr=0.1, status="done")]
    runs.append(make_run(tmp_path / "c", seed=2, status="diverged"))
    found = examine(runs, on="tokens", floor=1.0)["collapse"]
    assert (found["runs"], found["ratio"]) == (2, None)
    runs.append(make_run(tmp_path / "d", seed=3, status="done"))
    found = examine(runs, on="tokens", floor=1.0)["collapse"]
    assert found["runs"] == 3
    assert found["ratio"] > 0


def test_a_run_without_its_config_has_curves_all_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", noise=True)
    (run / "config.yaml").unlink()
    assert examine([run], on="tokens")["runs"][0]["gradient_noise"] is None


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run there has logged"):
        examine([tmp_path], on="tokens")
