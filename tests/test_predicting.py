"""`llamax predict`: registered before the run exists, refused after, scored when it is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from llamax.cli import app
from llamax.columns import finished_runs
from llamax.config.load import validate
from llamax.config.sweep import SweepConfig
from llamax.errors import UserError
from llamax.fitting import FitOptions, fit_data
from llamax.predicting import register_prediction, score_all
from llamax.scaling import fit_frame
from llamax.scaling.records import data_digest, read_predictions
from llamax.sweep.plan import make_plan
from llamax.sweep.study import open_study
from tests.report.make_study import BUDGETS, law, make_study, optimum
from tests.sweep.finished import finish


def command(*words: str) -> str:
    done = CliRunner().invoke(app, ["predict", *words], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A CSV of the fabricated world, with columns named as a stranger would."""
    rng, rows = np.random.default_rng(0), []
    for budget in BUDGETS:
        for factor in (0.25, 0.5, 0.8, 1.25, 2, 4):
            n = factor * optimum(budget)
            d = budget / (6 * n)
            rows.append({"params": n, "seen": d, "ce": law(n, d) * np.exp(0.002 * rng.normal()), "bucket": budget})
    path = tmp_path / "mine.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


COLUMNS = "n=params,d=seen,loss=ce,budget=bucket"


def test_a_table_is_predicted_and_scored(table: Path) -> None:
    record = json.loads(command(str(table), "--flops", "1e13", "--columns", COLUMNS, "--bootstrap", "50", "--json"))
    assert record["interval"][0] < record["loss"] < record["interval"][1]
    assert record["loss"] == pytest.approx(law(record["n"], record["d"]), rel=0.01)
    frame = pd.read_csv(table)
    fit = fit_frame(frame, n="params", d="seen", loss="ce", flops=None, budget="bucket", bootstrap=0)
    assert record["data"] == {"runs": 24, "sha256": data_digest(fit.runs)}
    assert read_predictions(table.with_name("mine.predictions.jsonl")) == [record]
    assert "not run yet" in command(str(table), "--score", "--columns", COLUMNS)

    run = {"params": record["n"], "seen": record["d"], "ce": 1.01 * record["loss"], "bucket": 1e13}
    pd.concat([frame, pd.DataFrame([run])]).to_csv(table, index=False)
    (row,) = score_all(table, COLUMNS)
    assert row["miss_percent"] == pytest.approx(1.0)
    text = command(str(table), "--score", "--columns", COLUMNS)
    assert "+1.00 %" in text
    assert max(map(len, text.splitlines())) <= 100
    with pytest.raises(UserError, match="already has 1 finished runs at that compute"):
        register_prediction(table, 1e13, columns=COLUMNS, bootstrap=0)


def test_a_study_is_refused_where_a_run_is_done_or_under_way(tmp_path: Path) -> None:
    make_study(tmp_path, rows=20)  # its prediction cell, at 1e13, is done
    with pytest.raises(UserError, match="already has 1 finished"):
        register_prediction(tmp_path, 1e13, bootstrap=0)
    (run,) = tmp_path.glob("prediction-*")
    (run / "result.json").unlink()
    with pytest.raises(UserError, match=r"prediction-\w+ at that compute has begun"):
        register_prediction(tmp_path, 1e13, bootstrap=0)
    assert not (tmp_path / "predictions.jsonl").exists()
    assert register_prediction(tmp_path, 4e13, bootstrap=0)["index"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --flops C"),
        (["--flops", "1e13", "--score"], "give --flops C"),
        (["--flops", "-1"], "-1"),
        (["--score"], "no prediction was registered"),
        (["--flops", "1e13", "--columns", "n:params"], "give n=COLUMN"),
        (["--flops", "1e13", "--columns", "n=size"], "not in the table"),
        (["--flops", "1e13"], "no column for loss"),
        (["--flops", "1e13", "--columns", COLUMNS, "--seed", "-1"], "seed: -1"),
        (["--flops", "1e13", "--columns", COLUMNS, "--params", "1e30"], "pay for .* tokens"),
    ],
)
def test_what_cannot_be_done_is_said(table: Path, words: list[str], message: str) -> None:
    extra = ["--columns", COLUMNS] if "--score" in words or "-1" in words else []
    with pytest.raises(UserError, match=message):
        command(str(table), *words, *extra)


def test_a_claim_carries_the_doubts_about_its_table(table: Path) -> None:
    frame = pd.read_csv(table)
    frame.loc[3, "ce"] = np.nan
    frame.assign(seen=frame["seen"] / 1e9).to_csv(table, index=False)
    warnings = " | ".join(register_prediction(table, 1e13, columns=COLUMNS, bootstrap=5)["warnings"])
    for said in ("NaN rows dropped: 1", "check the units", "5 resamples are too few", "has no interval"):
        assert said in warnings, said
    frame.iloc[:7].to_csv(table, index=False)
    one = register_prediction(table, 1e13, columns=COLUMNS.removesuffix(",budget=bucket"), bootstrap=0)["warnings"]
    assert any("the fit follows noise" in word for word in one)


@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl"])
def test_tables_are_predicted_as_they_are_fitted(table: Path, tmp_path: Path, name: str) -> None:
    """A spreadsheet's decimal commas, and a table of JSON lines; a run without a loss answers no claim."""
    frame, path = pd.read_csv(table), tmp_path / name
    if path.suffix == ".csv":
        frame.to_csv(path, index=False, sep=";", decimal=",")
    else:
        frame.to_json(path, orient="records", lines=True)
    record = register_prediction(path, 1e13, columns=COLUMNS, bootstrap=0)
    run = pd.DataFrame([{"params": record["n"], "seen": record["d"], "bucket": 1e13}])
    for loss, measured in ((None, None), (2.0, 2.0)):
        more = pd.concat([frame, run.assign(ce=loss)]).astype(float)
        if path.suffix == ".csv":
            more.to_csv(path, index=False, sep=";", decimal=",")
        else:
            more.to_json(path, orient="records", lines=True)
        assert score_all(path, COLUMNS)[0]["measured"] == measured


def test_a_study_without_budgets_is_fitted_and_predicted(tmp_path: Path) -> None:
    """Its ledger has a column of budgets with nothing in it, which is not a missing value in every run."""
    base = {"model": {"base": "ladder/d8", "max_seq_len": 64}, "train": {"steps": 9, "seq_len": 64, "batch_size": 8}}
    axis = {"kind": "ladder", "sizes": ["ladder/d16", "ladder/d32", "ladder/d64"], "tokens_per_param": [5, 20, 80]}
    plan = make_plan(validate(SweepConfig, {"name": "s", "base": base, "axes": [axis]}, "test"))
    open_study(tmp_path, plan)
    assert finish(tmp_path, plan, law, noise=0.002) == 9
    assert fit_data(tmp_path, FitOptions(bootstrap=0))["n_points"] == 9
    assert register_prediction(tmp_path, 1e13, bootstrap=0)["data"]["runs"] == 9


def test_a_trunk_is_neither_fitted_nor_an_answer() -> None:
    """Its learning rate has not decayed, so its loss is not that of its size and tokens."""
    frame = pd.DataFrame(
        {"run": ["a", "b", "c"], "status": ["done", "done", "failed"], "stage": ["trunk", "branch", None]}
    )
    assert list(finished_runs(frame)[0]["run"]) == ["b"]
    assert list(finished_runs(frame.drop(columns="stage"))[0]["run"]) == ["a", "b"]
    assert len(finished_runs(frame[["run"]])[0]) == 3
