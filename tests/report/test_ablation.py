"""An ablation from its study directory to the page and the command line, without training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llamax.config.load import validate
from llamax.config.sweep import SweepConfig
from llamax.errors import UserError
from llamax.report.ablation import ablation_page, ablation_runs, effects_picture, gains_picture
from llamax.scaling import ablation
from llamax.sweep.plan import make_plan
from llamax.sweep.study import open_study
from tests.test_cli import call

SPEC = {
    "name": "tiny",
    "base": {
        "model": {"base": "ladder/d16", "max_seq_len": 64},
        "train": {"seq_len": 16, "batch_size": 2, "steps": 20},
    },
    "axes": [{"kind": "ladder", "sizes": ["ladder/d16", "ladder/d24", "ladder/d32"], "tokens_per_param": [2]}],
    "ablate": {"norm": ["rmsnorm", "layernorm"], "mlp": ["gelu"], "mode": "full", "match": ["params", "flops"]},
}


def made(path: Path, spec: dict = SPEC) -> Path:
    """A study whose runs' results are made up: GELU is worse by 0.05, LayerNorm as good."""
    plan = open_study(path, make_plan(validate(SweepConfig, spec, "test")))
    rng = np.random.default_rng(0)
    for cell in plan.cells:
        run = path / cell.run_name
        run.mkdir()
        loss = 1 + 30 * cell.flops["causal"] ** -0.2 + 0.05 * ("gelu" in cell.name) + 0.003 * rng.standard_normal()
        result = {"status": "done", "steps": cell.steps, "tokens": cell.tokens, "eval_loss": loss, "fingerprint": "f"}
        result |= {"params_total": cell.tags["params_unmatched"], **{f"flops_{k}": v for k, v in cell.flops.items()}}
        (run / "result.json").write_text(json.dumps(result))
        (run / "config.yaml").write_text(json.dumps(cell.config.as_dict()))
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("ablation") / "study")


def test_runs_carry_what_the_comparison_needs(study: Path) -> None:
    runs = ablation_runs(study)
    assert len(runs) == 3 * 3 * (1 + 1 + 2 + 2)
    assert set(runs["size"]) == {"d16", "d24", "d32"}
    assert (runs["fraction"] == 1).all()
    assert {"ablate.norm", "ablate.mlp", "params_unmatched", "flops_unmatched", "flops_causal"} <= set(runs)
    found = ablation(runs, draws=100).effects
    gelu = found[found["variant"] == "gelu"]
    assert (gelu["effect"] > 0.03).all()
    assert set(gelu["match"]) == {"params", "flops"}
    assert (gelu["flops_off_unmatched"] < -0.05).all()


def test_lengths_of_one_size_are_told_apart(tmp_path: Path) -> None:
    axes = [{**SPEC["axes"][0], "tokens_per_param": [2, 4]}]
    runs = ablation_runs(made(tmp_path / "study", {**SPEC, "axes": axes}))
    assert "d16-t2" in set(runs["size"])
    assert len(ablation(runs, draws=20).noise) == 2 * 6


def test_an_unfinished_study_is_refused_and_its_whole_sizes_are_not(tmp_path: Path) -> None:
    path = made(tmp_path / "study")
    cell = next(p for p in path.iterdir() if p.name.startswith("d24-t2-gelu-s1"))
    (cell / "result.json").unlink()
    (cell / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": 5.0, "tokens": 96}) + "\n")
    gone = next(p for p in path.iterdir() if p.name.startswith("d24-t2-base-s0"))
    for file in gone.iterdir():
        file.unlink()
    gone.rmdir()
    refused = call("ablate", "report", str(path))
    assert refused.code == 2
    assert "2 of 54 runs are not at the end of their schedule" in refused.err
    assert not (path / "ablation.html").exists()
    whole = call("ablate", "report", str(path), "--sizes", "d16,d32", "--json")
    assert whole.code == 0, whole.err
    assert {row["size"] for row in whole.out and json.loads(whole.out)["noise"]} == {"d16", "d32"}
    assert "sizes are d16" in call("ablate", "report", str(path), "--sizes", "d17").err


def test_pictures_and_page(study: Path) -> None:
    found = ablation(ablation_runs(study), draws=100)
    assert "layernorm+gelu" in effects_picture(found, "params").svg
    assert "layernorm x gelu" in effects_picture(found, "params", factors=True).svg
    gain = gains_picture(found, "flops")
    assert gain is not None
    assert "layernorm" in gain.svg
    page = ablation_page("tiny <study>", found)
    assert "Ablation: tiny &lt;study&gt;" in page
    assert page.count("<svg") == 6
    assert "Holm" in page


def test_report_prints_within_100_columns_and_writes_its_files(study: Path, tmp_path: Path) -> None:
    done = call("ablate", "report", str(study), "--out", str(tmp_path / "runs.parquet"))
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 100
    assert "Compute-equivalent gain" in done.out
    assert "Main effects and interactions" in done.out
    assert "…" not in done.out
    again = call("ablate", "report", str(tmp_path / "runs.parquet"), "--json")
    assert again.code == 0, again.err
    direct = call("ablate", "report", str(study), "--json")
    assert again.json["effects"] == direct.json["effects"]
    assert Path(again.json["page"]).is_file()


def test_plan_prints_within_100_columns(tmp_path: Path) -> None:
    import yaml

    spec = tmp_path / "a.yaml"
    spec.write_text(yaml.safe_dump(SPEC))
    done = call("ablate", "plan", str(spec), "ablate.seeds=2")
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 100
    assert "…" not in done.out
    assert "layernorm+gelu" in done.out
    found = call("ablate", "plan", str(spec), "--json").json
    assert found["power"]["comparisons"] == 3 * 2 * 3  # variants, ways of matching, sizes
    assert len(found["cells"]) == 54


def test_run_reads_its_spec_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    import llamax.config.sweep
    import llamax.sweep.local

    spec, read, ran = tmp_path / "a.yaml", list[str](), list[Path]()
    spec.write_text(yaml.safe_dump(SPEC))
    load = llamax.config.sweep.load_sweep
    monkeypatch.setattr(llamax.config.sweep, "load_sweep", lambda name, more: [read.append(name), load(name, more)][1])
    monkeypatch.setattr(llamax.sweep.local, "run_local", lambda path, **_: [ran.append(path), {"counts": {}}][1])
    for _ in range(2):
        done = call("ablate", "run", str(spec), "ablate.seeds=2", "--dir", str(tmp_path / "study"), "--json")
        assert done.code == 0, done.err
    assert read == [str(spec)] * 2
    assert ran == [tmp_path / "study"] * 2
    assert len(json.loads((tmp_path / "study" / "plan.json").read_text())["cells"]) == 54 - 18
    assert call("ablate", "run", str(spec), "--pack", "some").code == 2


def test_a_sweep_without_an_ablation_is_refused(tmp_path: Path) -> None:
    for verb in ("plan", "run"):
        done = call("ablate", verb, "quickstart")
        assert done.code == 2
        assert "without `ablate`" in done.err
    with pytest.raises(UserError, match=r"no plan\.json"):
        ablation_runs(tmp_path)
    with pytest.raises(UserError, match="no such table"):
        ablation_runs(tmp_path / "runs.parquet")
