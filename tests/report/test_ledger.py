"""The ledger against fabricated run directories whose truth is known, whole, unfinished and damaged."""

import io
import json
import math
import os
import shutil
import time

import pandas as pd
import pytest
from rich.console import Console

from llamax.errors import UserError
from llamax.report.ledger import COSTS, LOSSES, SIZES, curves, ledger, ledger_table, save_ledger

from .make_study import make_study

TRUTH = [name for name in (*SIZES, *LOSSES, *COSTS) if name != "last_loss"]


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "study"
    return folder, make_study(folder, budgets=(1e11, 3e11), sizes=3, rows=40)


def row(folder, name):
    return ledger(folder).set_index("run").loc[name]


def unfinish(folder, name, *, age=3600.0):
    """Take the result away, and with it the signs of life."""
    (folder / name / "result.json").unlink()
    old = time.time() - age
    os.utime(folder / name / "metrics.jsonl", (old, old))


def test_rows_equal_the_fabricated_truth(study):
    folder, truth = study
    frame = ledger(folder).set_index("run")
    assert sorted(frame.index) == sorted(truth)
    assert set(frame["status"]) == {"done"}
    assert frame["warnings"].isna().all()
    for run, result in truth.items():
        assert {name: frame.loc[run, name] for name in TRUTH} == {name: result[name] for name in TRUTH}
        assert (frame.loc[run, "name"], frame.loc[run, "fingerprint"]) == (result["name"], result["fingerprint"])


def test_config_fields_and_tags_are_columns(study):
    folder, truth = study
    name = next(run for run in truth if run.startswith("1e11-d48"))
    found = row(folder, name)
    assert (found["budget"], found["size"], found["seed"]) == (1e11, "d48", 0)
    fields = ("optimizer.lr", "train.batch_size", "model.d_model", "model.layers", "model.mlp.kind", "data.corpus")
    assert [found[field] for field in fields] == [0.004, 4, 64, 3, "swiglu", "python-stdlib"]
    assert "train.steps" in found, "a field in which runs differ is a column"
    assert "model.norm.eps" not in found


def test_paths_are_relative_from_any_depth(study):
    folder, truth = study
    name = sorted(truth)[0]
    assert set(ledger(folder.parent)["run"]) == {f"study/{run}" for run in truth}
    assert set(ledger(folder.parent)["study"]) == {"study"}
    alone = ledger(folder / name)
    assert list(alone["run"]) == [name]
    assert alone["budget"].iloc[0] == truth[name]["flops_6n"] or alone["budget"].iloc[0] in (1e11, 3e11)


def test_a_tag_does_not_replace_a_measured_column(study):
    folder, truth = study
    plan = json.loads((folder / "plan.json").read_text())
    for cell in plan["cells"]:
        cell["tags"]["n"] = "mine"
    (folder / "plan.json").write_text(json.dumps(plan))
    frame = ledger(folder).set_index("run")
    name = sorted(truth)[0]
    assert (frame.loc[name, "n"], frame.loc[name, "tag.n"]) == (truth[name]["n"], "mine")


# ---------------------------------------------------------------- unfinished and damaged
def test_an_unfinished_run_has_no_final_loss(study):
    folder, truth = study
    name = sorted(truth)[0]
    unfinish(folder, name)
    found = row(folder, name)
    last = json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["status"] == "unfinished"
    assert math.isnan(found["train_loss"])
    assert math.isnan(found["eval_loss"])
    assert (found["last_loss"], found["steps"], found["n"]) == (last["loss"], last["step"], truth[name]["n"])


def test_running_is_a_recent_sign_of_life(study):
    folder, truth = study
    name = sorted(truth)[0]
    unfinish(folder, name, age=1.0)
    assert row(folder, name)["status"] == "running"
    os.utime(folder / name / "metrics.jsonl", (1, 1))
    leases = folder / "leases"
    leases.mkdir()
    cell = truth[name]["name"]
    (leases / f"{cell}~1.json").write_text('{"token": "x"}')
    assert row(folder, name)["status"] == "running"
    (leases / f"{cell}~1.json").write_text('{"token": "x", "released": true}')
    assert row(folder, name)["status"] == "unfinished"


def test_failed_and_diverged_carry_their_cause(study):
    folder, truth = study
    first, second = sorted(truth)[:2]
    unfinish(folder, first)
    (folder / "failures").mkdir()
    (folder / "failures" / f"{truth[first]['name']}.json").write_text('{"error": "out of memory"}')
    result = truth[second] | {"status": "diverged", "cause": "loss is not finite at step 20", "eval_loss": None}
    (folder / second / "result.json").write_text(json.dumps(result))
    frame = ledger(folder).set_index("run")
    assert tuple(frame.loc[first, ["status", "cause"]]) == ("failed", "out of memory")
    assert tuple(frame.loc[second, ["status", "cause"]]) == ("diverged", "loss is not finite at step 20")
    assert math.isnan(frame.loc[second, "eval_loss"])


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "result.json", "env.json"])
@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"[1, 2", b'"text"', b'{"step": {}, "steps": "many"}'])
def test_damage_is_a_row_with_a_warning(study, file, damage):
    folder, truth = study
    name = sorted(truth)[0]
    (folder / name / file).write_bytes(damage)
    frame = ledger(folder).set_index("run")
    assert len(frame) == len(truth)
    found = frame.loc[name]
    losses = found[["train_loss", "eval_loss", "last_loss", "steps", "n", "seconds"]].astype(float)
    assert not (losses == 0).any(), "a number that is not known is missing, never zero"
    silent = file == "env.json" or (damage == b"" and file == "metrics.jsonl") or damage.startswith(b'{"step')
    if not silent:
        assert file in found["warnings"]
    if file == "result.json":
        assert math.isnan(found["eval_loss"])
    curves(folder)  # and no crash here either


def test_a_cut_line_and_repeated_steps_are_said(study):
    folder, truth = study
    name = sorted(truth)[0]
    metrics = folder / name / "metrics.jsonl"
    text = metrics.read_text()
    first = text.splitlines()[0]
    metrics.write_text(text + first + "\n" + first[:30])
    words = row(folder, name)["warnings"]
    assert "1 unreadable lines" in words
    assert "1 repeated steps" in words
    frame = curves(folder)
    assert list(frame.attrs["warnings"]) == [name]
    assert len(frame[frame["run"] == name]) == len(text.splitlines())


def test_a_planned_directory_with_nothing_in_it_is_a_row(study):
    folder, truth = study
    name = sorted(truth)[0]
    shutil.rmtree(folder / name)
    (folder / name).mkdir()
    found = row(folder, name)
    assert (found["status"], found["warnings"]) == ("unfinished", "config.yaml: missing")
    assert math.isnan(found["train_loss"])


def test_n_of_an_unplanned_unfinished_run_is_counted_from_its_config(tmp_path):
    from llamax.accounting.params import count_params
    from llamax.config.load import dump_yaml, load_run

    config = load_run("tiny")
    run = tmp_path / "tiny-00000000"
    run.mkdir()
    (run / "config.yaml").write_text(dump_yaml(config))
    assert ledger(tmp_path)["n"].iloc[0] == count_params(config.model).active_matmul


def test_nothing_there(tmp_path):
    assert ledger(tmp_path).empty
    assert list(curves(tmp_path).columns) == ["run", "step", "tokens", "loss", "seconds"]
    with pytest.raises(UserError, match="no such folder"):
        ledger(tmp_path / "nowhere")


# ---------------------------------------------------------------- other forms
def test_curves_hold_every_row(study):
    folder, truth = study
    frame, evals = curves(folder), curves(folder, evals=True)
    assert frame.groupby("run").size().to_dict() == dict.fromkeys(truth, 40)
    last = frame.groupby("run").last()
    assert {run: last.loc[run, "loss"] for run in truth} == {run: truth[run]["train_loss"] for run in truth}
    assert dict(zip(evals["run"], evals["loss"], strict=True)) == {run: truth[run]["eval_loss"] for run in truth}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_saving_and_reading_back(study, tmp_path, suffix):
    frame = ledger(study[0])
    file = save_ledger(frame, tmp_path / "new" / f"ledger{suffix}")
    back = pd.read_csv(file) if suffix == ".csv" else pd.read_parquet(file)
    assert list(back.columns) == list(frame.columns)
    assert back["eval_loss"].tolist() == frame["eval_loss"].tolist()
    assert os.listdir(file.parent) == [file.name]


def test_saving_refuses_other_suffixes_and_names_the_missing_extra(study, tmp_path, monkeypatch):
    frame = ledger(study[0])
    with pytest.raises(UserError, match=r"\.csv or \.parquet"):
        save_ledger(frame, tmp_path / "ledger.xlsx")

    def absent(*_args, **_kwargs):
        raise ImportError("no pyarrow")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", absent)
    with pytest.raises(UserError, match=r"llamax\[parquet\]"):
        save_ledger(frame, tmp_path / "ledger.parquet")


def test_the_table_fits_a_hundred_columns(study):
    folder, truth = study
    unfinish(folder, sorted(truth)[0])
    out = io.StringIO()
    Console(file=out, width=100).print(ledger_table(ledger(folder)))
    lines = out.getvalue().rstrip().splitlines()
    assert len(lines) == len(truth) + 1
    assert max(map(len, lines)) <= 100
    assert "unfinished" in out.getvalue()
    assert "…" not in out.getvalue()
