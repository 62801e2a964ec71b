"""Bad input to `llamax train`: one clear message, exit code 2, nothing half-written; and damage that costs nothing.

The messages of the run directory and of checkpoints by themselves are in test_run_dir.py and test_checkpoints.py.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llamax.train.checkpoints as checkpoints_module
from llamax.config.load import dump_yaml
from llamax.errors import Interrupted, UserError
from llamax.train.checkpoints import find_checkpoints
from llamax.train.loop import train
from llamax.train.run_dir import open_run
from tests.train.conftest import build
from tests.train.runs import run_config, write_texts
from tests.train.test_loop import assert_same_run, loop_config, stop_at, whole

__all__ = ["whole"]  # a fixture
Cli = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


def written(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` but locks, with its content."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def short_store(tmp_path: Path) -> Path:
    folder = tmp_path / "short"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"{i} a.")
    return build(folder, tmp_path / "short-store").path


# ---------------------------------------------------------------- refused before anything is written
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["mesh.data=8", "train.batch_size=12"],
            "error: train.batch_size=12 / train.grad_accumulation=1 = 12 sequences are not divisible by the mesh's 8 "
            "batch shards; choose a multiple of 8",
        ),
        (
            ["mesh.data=4", "train.batch_size=8", "train.grad_accumulation=4"],
            "error: train.batch_size=8 / train.grad_accumulation=4 = 2 sequences are not divisible by the mesh's 4 "
            "batch shards; choose a multiple of 16",
        ),
        (
            ["mesh.data=2", "mesh.fsdp=8"],
            "error: mesh.stage=1, mesh.data=2, mesh.fsdp=8, mesh.expert=1, mesh.context=1, mesh.tensor=1: the fixed "
            "sizes multiply to 16, which does not fit the 8 devices there are; change one of them",
        ),
        (
            ["mesh.tensor=4"],
            "error: mesh: array model.stacks.0.blocks.0.attention.key, axis kv_heads of 2, is not divisible by "
            "tensor=4; change the mesh or the model",
        ),
        (["model.vocab_size=100"], "error: model.vocab_size=100 does not fit the store's vocabulary of 256 ("),
        (["model.vocab_size=512"], "error: model.vocab_size=512 does not fit the store's vocabulary of 256 ("),
        (["train.steps=null", "train.tokens=10"], "error: train.tokens=10 is less than one step of 128 tokens"),
        (["data.store={missing}"], "missing: "),
        (["train.seq_len=65"], "train.seq_len=65 exceeds model.max_seq_len=64; "),
        (["train.steps=5", "train.tokens=1000"], "the horizon is exactly one of train.steps, "),
        (["optimizer.momentum=0.9"], "optimizer.momentum"),
    ],
)
def test_refused_in_one_message_and_nothing_written(
    store: Path, tmp_path: Path, cli: Cli, overrides: list[str], message: str
):
    (tmp_path / "c.yaml").write_text(dump_yaml(run_config(store=store)))
    overrides = [word.replace("{missing}", str(tmp_path / "missing")) for word in overrides]
    code, out, err = cli("train", tmp_path / "c.yaml", *overrides, "--run-dir", tmp_path / "run", "--json")
    assert code == 2, err
    assert message in err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "run").exists()


def test_a_window_longer_than_the_corpus(tmp_path: Path, cli: Cli):
    (tmp_path / "c.yaml").write_text(dump_yaml(run_config("train.seq_len=64", store=short_store(tmp_path))))
    code, _, err = cli("train", tmp_path / "c.yaml", "--run-dir", tmp_path / "run", "--json")
    assert code == 2
    assert "error: train.seq_len=64: a window of 65 tokens is longer than the training text, " in err
    assert "lower train.seq_len or give more text" in err
    assert not (tmp_path / "run").exists()


def test_another_config_on_a_run_that_exists(store: Path, whole: Path, tmp_path: Path, cli: Cli):
    (tmp_path / "c.yaml").write_text(dump_yaml(loop_config(store, "train.seed=1", "optimizer.lr=0.5")))
    before = written(whole)
    code, _, err = cli("train", tmp_path / "c.yaml", "--run-dir", whole, "--json")
    assert code == 2
    assert f"error: {whole} holds another run: optimizer.lr is 0.01 there and 0.5 here; train.seed is 0 there" in err
    assert written(whole) == before


def test_other_data_under_the_same_name(whole: Path, store: Path, tmp_path: Path, cli: Cli):
    path, data = tmp_path / "run", tmp_path / "store"
    shutil.copytree(store, data)
    config = loop_config(data)
    with pytest.raises(Interrupted):
        train(config, path, report=stop_at(5))
    shutil.rmtree(data)
    build(write_texts(tmp_path / "texts", seed=1), data)
    before = written(path)
    (tmp_path / "c.yaml").write_text(dump_yaml(config))
    code, _, err = cli("train", tmp_path / "c.yaml", "--run-dir", path, "--json")
    assert code == 2
    assert "holds another run: the data's fingerprint is " in err
    assert written(path) == before


def test_a_second_process_on_the_same_run(store: Path, tmp_path: Path, cli: Cli):
    config, path = loop_config(store), tmp_path / "run"
    (tmp_path / "c.yaml").write_text(dump_yaml(config))
    from llamax.data.store import Store

    with open_run(path, config, Store.open(store).fingerprint):
        before = written(path)
        code, _, err = cli("train", tmp_path / "c.yaml", "--run-dir", path, "--json")
        assert code == 2
        assert f"error: {path}: process {os.getpid()} is using this run directory" in err
        assert written(path) == before


def test_no_traceback_from_a_real_process(store: Path, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(dump_yaml(run_config("model.vocab_size=100", store=store)))
    words = ["train", tmp_path / "c.yaml", "--run-dir", tmp_path / "run"]
    found = subprocess.run(
        [sys.executable, "-m", "llamax.cli", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert found.stderr.rstrip().splitlines()[-1].startswith("error: model.vocab_size=100 does not fit")


# ---------------------------------------------------------------- damage and full disks: nothing saved is lost
def interrupted(store: Path, path: Path, *overrides: str) -> None:
    """A run stopped at step 13 or soon after, with permanent checkpoints at 3, 6, 9 and 12."""
    with pytest.raises(Interrupted):
        train(loop_config(store, "checkpoint.every_steps=3", *overrides), path, report=stop_at(13))


@pytest.mark.parametrize("damage", ["flipped byte", "missing file"])
def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    store: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
):
    path = tmp_path / "run"
    interrupted(store, path)
    newest, before = find_checkpoints(path / "checkpoints")[:2]
    file = max((p for p in newest.path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "missing file":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    capsys.readouterr()
    train(loop_config(store), path)
    err = capsys.readouterr().err
    assert f"warning: {path / 'checkpoints'}: checkpoint {newest.path.name}: " in err
    assert f"using step {before.step} instead" in err
    assert_same_run(path, whole)


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_rows_cut_mid_line_are_neither_lost_nor_doubled(store: Path, whole: Path, tmp_path: Path, cut: int):
    path = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(loop_config(store), path, report=stop_at(14))  # one checkpoint, of the last row
    for name in ("metrics.jsonl", "evals.jsonl"):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[:-cut])
    train(loop_config(store), path)
    assert_same_run(path, whole)


def test_a_full_disk_while_saving_keeps_earlier_checkpoints(
    store: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, write = tmp_path / "run", checkpoints_module.write_digests

    def full(folder: Path, note: dict) -> None:
        if note["step"] >= 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, note)

    config = loop_config(store, "checkpoint.every_steps=3")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "write_digests", full)
        with pytest.raises(UserError) as error:
            train(config, path)
    assert str(error.value) == (
        f"checkpoint of step 9 could not be saved in {path / 'checkpoints'}: no space left on device, free some space; "
        "still saved: step 3, 6; then give the same command again to continue"
    )
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["3", "6"]
    assert not (path / "result.json").exists()
    train(config, path)
    assert_same_run(path, whole)


def test_a_full_disk_while_logging_keeps_what_was_saved(
    store: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "run"
    from llamax.train import run_dir

    append = run_dir.append_rows

    def full(file: Path, rows: list) -> None:
        if rows[-1]["step"] < 10:
            return append(file, rows)
        with open(file, "ab") as out:  # half a row fits
            out.write(b'{"step": 10, "tok')
        raise UserError(f"{file}: cannot be written: no space left on device")

    config = loop_config(store, "checkpoint.every_steps=3")
    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "append_rows", full)
        with pytest.raises(UserError, match="no space left"):
            train(config, path)
    train(config, path)
    assert_same_run(path, whole)
