"""`llamax diff`: the differing fields are named, and the step at which two loss sequences part."""

import io
import json
import shutil

import pytest
import yaml
from rich.console import Console

from llamax.errors import UserError
from llamax.report.compare import compare, compare_table

from .make_study import make_study


@pytest.fixture
def pair(tmp_path):
    truth = make_study(tmp_path / "study", budgets=(1e11,), sizes=1, rows=30, held_out=False)
    a, b = tmp_path / "study" / next(iter(truth)), tmp_path / "copy"
    shutil.copytree(a, b)
    return a, b


def edit(file, change):
    load, dump = (yaml.safe_load, yaml.safe_dump) if file.suffix == ".yaml" else (json.loads, json.dumps)
    data = load(file.read_text())
    change(data)
    file.write_text(dump(data))


def test_a_copy_differs_in_nothing(pair):
    report = compare(*pair)
    assert report["config"] == report["environment"] == report["warnings"] == []
    assert report["data"]["same"] is True
    assert report["losses"] == {"compared": 30, "first_difference": None, "a": None, "b": None, "largest": 0.0}
    assert report["words"][0] == "the configs ask for the same run"
    assert report["results"]["eval_loss"]["difference"] == 0


def test_fields_versions_and_data_are_named(pair):
    a, b = pair
    edit(b / "config.yaml", lambda c: (c["optimizer"].update(lr=0.008), c.update(log={"every_steps": 5})))
    edit(b / "env.json", lambda e: e["versions"].update(jax="0.11.0"))
    edit(b / "result.json", lambda r: r.update(fingerprint="00", eval_loss=r["eval_loss"] + 0.25))
    report = compare(a, b)
    assert report["config"][0] == {"field": "optimizer.lr", "a": 0.004, "b": 0.008, "identity": True}
    assert report["config"][1]["identity"] is False
    assert report["environment"] == [{"field": "versions.jax", "a": "0.10.2", "b": "0.11.0"}]
    assert report["data"]["same"] is False
    assert report["results"]["eval_loss"]["difference"] == pytest.approx(0.25)
    words = " | ".join(report["words"])
    for part in ("optimizer.lr (0.004 against 0.008)", "data differ", "versions that differ: jax", "+0.2500 nats"):
        assert part in words
    json.dumps(report)


def test_the_first_step_that_differs_is_found(pair):
    a, b = pair
    lines = (b / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[11]["loss"] += 1e-9
    rows[20]["loss"] += 0.5
    (b / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = compare(a, b)["losses"]
    assert losses["first_difference"] == rows[11]["step"]
    assert losses["largest"] == pytest.approx(0.5)


def test_unfinished_damaged_and_not_a_run(pair, tmp_path):
    a, b = pair
    (b / "result.json").unlink()
    (b / "env.json").write_text("{")
    (b / "metrics.jsonl").unlink()
    report = compare(a, b)
    assert report["results"]["eval_loss"]["b"] is None
    assert report["results"]["eval_loss"]["difference"] is None
    assert report["losses"]["compared"] == 0
    assert "env.json" in report["warnings"][0]
    with pytest.raises(UserError, match="not a run directory"):
        compare(a, tmp_path)


def test_the_table_names_the_field_within_a_hundred_columns(pair):
    a, b = pair
    edit(b / "config.yaml", lambda c: c["model"]["mlp"].update(d_ff=192))
    out = io.StringIO()
    Console(file=out, width=100).print(compare_table(compare(a, b)))
    assert "model.mlp.d_ff" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 100
