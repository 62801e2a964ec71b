"""Trunks and branches of a sweep: their numbers by hand, who waits for whom, and a small sweep from end to end."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import llamax
from llamax.config.load import run_from_data, validate
from llamax.config.sweep import SweepConfig
from llamax.errors import UserError
from llamax.report.branching import costs
from llamax.report.html import write_report
from llamax.report.ledger import ledger_table, usable_runs
from llamax.sweep.attempt import progress_path
from llamax.sweep.claim import claim
from llamax.sweep.local import run_local
from llamax.sweep.packing import NEVER, Pack, groups
from llamax.sweep.plan import Plan, load_plan, make_plan, save_plan
from llamax.sweep.status import status
from llamax.sweep.study import open_study, read_study, select
from llamax.sweep.tables import plan_tables, status_table
from llamax.sweep.throughput import Throughput
from llamax.sweep.worker import work
from llamax.train.loop import train
from llamax.train.run_dir import read_metrics
from tests.sweep import fake_train
from tests.train.conftest import build
from tests.train.runs import RUN, write_texts
from tests.train.test_loop import Killed, untimed

SLOW = Throughput(lambda n, tokens: 1e9, 3.0, "one GFLOP/s")
SIZES = {"kind": "product", "fields": {"model.d_model": [16, 32]}}
AXIS = {"kind": "horizons", "steps": [10, 20, 40]}
TOKENS = 8 * 16  # a step


def plan_of(*axes: dict[str, Any], store: Path | str = "none", overrides: tuple[str, ...] = (), **more: Any) -> Plan:
    base = {**RUN, "data": {"store": str(store)}, "schedule": {"kind": "linear", "warmup": 0.2, "final": 0.0}}
    spec = {"name": "study", "base": base, "axes": list(axes), "overrides": list(overrides), **more}
    return make_plan(validate(SweepConfig, spec, "test"), throughput=SLOW)


def text_of(*shown: Any) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(*shown, sep="\n")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 100
    return " ".join(text.split())


# ---------------------------------------------------------------- the plan
def test_numbers_by_hand():
    plan = plan_of(SIZES, AXIS)
    names = [f"d_model{d}-{part}" for d in (16, 32) for part in ("trunk", "T10", "T20", "T40")]
    assert [c.name for c in plan.cells] == names
    trunk, *branches = plan.cells[:4]
    # warmup 0.2 x 10 steps; decays of 2, 4, 8 steps begin at 8, 16, 32
    assert trunk.config.schedule.phases(trunk.steps) == (2, 0)
    assert (trunk.steps, trunk.config.checkpoint.branch_steps, trunk.trunk) == (32, (8, 16, 32), None)
    for branch, total, start in zip(branches, (10, 20, 40), (8, 16, 32), strict=True):
        point = branch.config.branch
        assert point is not None
        assert (point.trunk, point.step) == (trunk.run_name, start)
        assert branch.config.schedule.phases(total) == (2, total - start)
        assert branch.config.schedule.final == 0.0, "the base's, though its kind was another"
        assert (branch.steps, branch.tokens, branch.trained_tokens) == (total, total * TOKENS, (total - start) * TOKENS)
        assert branch.flops["6n"] == pytest.approx(6 * branch.n * total * TOKENS)
        assert branch.trained_flops("6n") == pytest.approx(6 * branch.n * (total - start) * TOKENS)
        assert branch.seconds == pytest.approx(3.0 + 6 * branch.n * (total - start) * TOKENS / 1e9)
        assert branch.tags == {"model.d_model": 16, "steps": total, "seed": 0}
        assert run_from_data(plan.spec.base, branch.overrides) == branch.config  # type: ignore[arg-type]
    assert trunk.tags == {"model.d_model": 16, "seed": 0}
    n = [plan.cells[0].n, plan.cells[4].n]
    assert plan.totals["flops_6n"] == pytest.approx(6 * sum(n) * TOKENS * (32 + 2 + 4 + 8))
    assert plan.totals["separate_flops_6n"] == pytest.approx(6 * sum(n) * TOKENS * (10 + 20 + 40))


def test_the_plan_prints_both_costs_and_is_stored(tmp_path: Path):
    plan = plan_of(SIZES, AXIS)
    shown = text_of(*plan_tables(plan, workers=4))
    trained, separate = plan.totals["flops_6n"], plan.totals["separate_flops_6n"]
    assert f"take {trained:.3g} FLOPs (6n) as trained; each horizon from scratch would take {separate:.3g}" in shown
    assert "so 34% is saved" in shown  # 1 - 46/70
    assert "trained 6n" in shown
    assert "warmup = 2 steps in the trunk and so in every branch, 0.2 x the 10 steps of the shortest horizon" in shown
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    plain = plan_of(SIZES)
    assert plain.totals["flops_6n"] == plain.totals["separate_flops_6n"]
    assert "trunk" not in text_of(*plan_tables(plain))


def test_rules_see_the_longest_horizon_and_hold_for_all():
    axis = {"kind": "horizons", "flops": [1e8, 2e8, 4e8], "decay": 0.5}
    law = {"kind": "power_law", "coefficient": 1e-3, "d_exponent": 0.2}
    batch = {"kind": "power_law", "coefficient": 0.05, "d_exponent": 0.5, "multiple": 1}
    cells = plan_of(axis, rules={"lr": law, "batch": batch}).cells
    d = 4e8 / (6 * cells[0].n)
    assert {c.lr for c in cells} == {float(f"{1e-3 * d**0.2:.3g}")}
    assert {c.batch for c in cells} == {round(0.05 * d**0.5)}
    assert [c.name for c in cells] == ["study-trunk", "study-C1e8", "study-C2e8", "study-C4e8"]
    assert [c.tags.get("budget") for c in cells] == [None, 1e8, 2e8, 4e8]
    assert "of the longest horizon" in cells[1].rules["lr"]
    with pytest.raises(UserError, match=r"horizons flops=1e\+08: \d+ steps are fewer than rules.min_steps=1000"):
        plan_of(axis, rules={"min_steps": 1000})


def test_every_kind_of_horizon_and_a_warmup_in_steps():
    n = plan_of(AXIS).cells[0].n
    for horizons in ({"tokens": [1280, 5120]}, {"tokens_per_param": [1280 / n, 5120 / n]}):
        cells = plan_of({"kind": "horizons", **horizons}, overrides=("schedule.warmup_steps=5",)).cells
        assert [c.steps for c in cells] == [32, 10, 40]
        assert [c.config.schedule.phases(c.steps)[0] for c in cells] == [5, 5, 5]
        assert "warmup = 5 steps in the trunk and so in every branch, as given" in cells[0].rules["warmup"]


@pytest.mark.parametrize(
    ("axis", "overrides", "match"),
    [
        ({"steps": [20, 10]}, (), r"axes.0: steps of horizons = \[20, 10\] do not increase"),
        ({"steps": [10, 10]}, (), r"steps of horizons = \[10, 10\] do not increase; list each once"),
        ({"steps": [10], "tokens": [5]}, (), "exactly one of steps, tokens, .*found steps and tokens"),
        ({}, (), "exactly one of .*found none"),
        ({"steps": []}, (), "axes.0.steps = .*at least 1"),
        ({"steps": [10], "decay": 1.5}, (), "axes.0.decay = 1.5: input should be less than 1"),
        ({"steps": [10], "decay": 0}, (), "axes.0.decay = 0: input should be greater than 0"),
        ({"steps": [10, 20]}, ("schedule.warmup_steps=9",), "steps=10: 10 steps are too few for a warmup of 9"),
        ({"steps": [10, 20]}, ("schedule.warmup_steps=15",), "schedule.warmup_steps=15 is longer than the 10 steps"),
        ({"steps": [2, 20]}, (), "steps=2: 2 steps are too few .* = 0 steps"),
        ({"tokens": [1280, 1281]}, (), "tokens=1280 and 1281 are both 10 steps"),
        ({"tokens": [3, 1280]}, (), "train.tokens=3 is less than one step"),
        ({"steps": [10]}, ("schedule.decay=0.1",), r"schedule.decay is set by overrides .* and by axes.0 \(horizons\)"),
        ({"steps": [10]}, ("train.steps=5",), "train.steps is set by overrides"),
    ],
)
def test_bad_horizons(axis: dict[str, Any], overrides: tuple[str, ...], match: str):
    with pytest.raises(UserError, match=match):
        plan_of({"kind": "horizons", **axis}, overrides=overrides)


def test_one_axis_sets_the_horizon():
    with pytest.raises(UserError, match=r"axes of kind ladder and horizons all set the horizon; .*kind: product"):
        plan_of({"kind": "ladder", "sizes": ["ladder/d16"]}, AXIS)
    with pytest.raises(UserError, match="horizons and horizons all set"):
        plan_of(AXIS, AXIS)


# ---------------------------------------------------------------- who waits for whom
def branched_fake(config: Any, run_dir: Path, **more: Any) -> Any:
    """The stand-in for training, with the checkpoints a trunk leaves."""
    result = fake_train.train(config, run_dir, **more)
    for step in config.checkpoint.branch_steps:
        (run_dir / "checkpoints" / str(step)).mkdir(parents=True)
    return result


def test_order_and_selection():
    plan = plan_of(SIZES, AXIS)
    order = [c.name for c in select(plan, None)]
    assert order[:2] == ["d_model32-trunk", "d_model16-trunk"]
    assert [c.name for c in select(plan, ["d_model16-T20", "d_model16-T10"])] == [
        "d_model16-trunk",
        "d_model16-T20",
        "d_model16-T10",
    ]


def test_a_branch_waits_for_its_trunk(tmp_path: Path):
    study = tmp_path / "study"
    open_study(study, plan_of(AXIS))
    held, seen = claim(study, "study-trunk"), []

    def note(kind: str, cell: str, details: dict[str, Any]) -> None:
        seen.append((kind, cell))
        if kind == "waiting" and held is not None:
            shown = status(study)
            assert [row["phase"] for row in shown["cells"]][1] == "waits for study-trunk at step 8"
            assert "waits for study-trunk" in text_of(status_table(shown))
            held.release()

    assert work(study, train=branched_fake, on_event=note)["done"][0] == "study-trunk"
    assert seen[0] == ("waiting", "study-trunk")
    assert next(cell for kind, cell in seen if kind == "start") == "study-trunk"
    assert status(study)["counts"]["done"] == 4


def test_a_branch_may_begin_while_its_trunk_goes_on(tmp_path: Path):
    study = tmp_path / "study"
    plan = open_study(study, plan_of(AXIS))
    held = claim(study, "study-trunk")
    assert held is not None
    (study / plan.cells[0].run_name / "checkpoints" / "8").mkdir(parents=True)
    (study / plan.cells[0].run_name / "checkpoints" / "16.saving").mkdir()
    stop: list[bool] = []

    def note(kind: str, cell: str, details: dict[str, Any]) -> None:
        stop.extend([True] * (kind == "waiting"))

    with pytest.raises(KeyboardInterrupt):
        work(study, train=branched_fake, on_event=note, should_stop=lambda: bool(stop))
    assert [row["state"] for row in status(study)["cells"]] == ["running", "done", "pending", "pending"]
    held.release()


def test_branches_fail_with_their_trunk_and_are_retried_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study = tmp_path / "study"
    open_study(study, plan_of(AXIS, {"kind": "seeds", "count": 2}))
    monkeypatch.setenv("FAKE_FAIL", "1")
    ended = work(study, train=branched_fake)
    assert sorted(ended["failed"]) == ["s1-T10", "s1-T20", "s1-T40", "s1-trunk"]
    assert sorted(ended["done"]) == ["s0-T10", "s0-T20", "s0-T40", "s0-trunk"]
    rows = {row["name"]: row for row in status(study)["cells"]}
    said = "its trunk s1-trunk failed before step 16: seed 1 is not to be trained; both are tried again with --retry"
    assert rows["s1-T20"]["error"].startswith(said)
    assert work(study, train=branched_fake) == {"done": [], "failed": []}
    monkeypatch.delenv("FAKE_FAIL")
    assert len(work(study, train=branched_fake, retry_failed=True, only=["s1-T20"])["done"]) == 2


def test_a_trunk_without_the_checkpoint(tmp_path: Path):
    study = tmp_path / "study"
    plan = open_study(study, plan_of(AXIS))
    folder = study / plan.cells[0].run_name
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"status": "diverged", "cause": "loss is nan at step 9"}))
    (folder / "checkpoints" / "8").mkdir(parents=True)
    ended = work(study, train=branched_fake)
    assert ended == {"done": ["study-T10"], "failed": ["study-T40", "study-T20"]}
    errors = [row["error"] for row in status(study)["cells"]]
    assert errors[2] == "its trunk study-trunk diverged before step 16: loss is nan at step 9; lower the learning rate"
    (folder / "result.json").write_text(json.dumps({"status": "done"}))
    work(study, train=branched_fake, retry_failed=True)
    assert "is finished and keeps no checkpoint of step 16; delete" in status(study)["cells"][2]["error"]


def test_time_left_counts_a_branchs_own_steps(tmp_path: Path):
    study = tmp_path / "study"
    plan = open_study(study, plan_of(AXIS))
    before = status(study)["seconds_left"]
    assert before == pytest.approx(sum(c.seconds for c in plan.cells))
    path = progress_path(study, "study-T40")
    path.parent.mkdir()
    path.write_text(json.dumps({"step": 36}))  # half of its own 8
    assert status(study)["seconds_left"] == pytest.approx(before - plan.cells[3].seconds / 2)


# ---------------------------------------------------------------- end to end
@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return build(write_texts(folder / "texts"), folder / "store").path


@pytest.fixture(scope="module")
def study(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by two workers, so that one waits."""
    path = tmp_path_factory.mktemp("runs") / "study"
    open_study(path, plan_of({**AXIS, "steps": [10, 20]}, {"kind": "seeds", "count": 2}, store=store))
    assert run_local(path, workers=2)["counts"]["done"] == 6
    return path


def test_the_ledger_has_a_row_a_branch_with_both_costs(study: Path):
    frame = llamax.ledger(study).set_index("name")
    frame.index = frame.index.str[:-9]
    plan = {cell.name: cell for cell in read_study(study).cells}
    assert dict(frame["stage"]) == {name: "trunk" if name.endswith("trunk") else "branch" for name in plan}
    for seed in (0, 1):
        trunk = plan[f"s{seed}-trunk"]
        for name, total, start in (("T10", 10, 8), ("T20", 20, 16), ("trunk", 16, 0)):
            row, per_step = frame.loc[f"s{seed}-{name}"], 6 * trunk.n * TOKENS
            assert (row["steps"], row["tokens"], row["trained_tokens"]) == (total, total * 128, (total - start) * 128)
            assert row["flops_6n"] == pytest.approx(per_step * total)
            assert row["trained_flops_6n"] == pytest.approx(per_step * (total - start))
            assert row["trunk"] == trunk.hash
            assert row["branch_step"] == start or name == "trunk"
            assert row["eval_loss"] > 0
    n = trunk.n
    assert costs(frame) == (pytest.approx(2 * 6 * n * TOKENS * (16 + 2 + 4)), pytest.approx(2 * 6 * n * TOKENS * 30))
    assert costs(frame, "causal")[0] == pytest.approx(frame["trained_flops_causal"].sum())
    assert "each horizon from scratch" in text_of(ledger_table(llamax.ledger(study)))


def test_a_trunk_is_no_point_of_a_fit(study: Path):
    used, words = usable_runs(llamax.ledger(study))
    assert set(used["stage"]) == {"branch"}
    assert "a trunk: its learning rate has not decayed" in words[0]


def test_the_report_of_branches(study: Path):
    page = write_report(study).read_text()
    assert "Branches of shared trunks: as trained" in page


def test_a_killed_branch_of_a_sweep_resumes(store: Path, study: Path, tmp_path: Path):
    other = tmp_path / "study"
    plan = open_study(other, plan_of({**AXIS, "steps": [10, 20]}, store=store))
    branch = next(c for c in plan.cells if c.name == "study-T20")
    killed: list[bool] = []

    def dying(config: Any, run_dir: Path, report: Any) -> Any:
        def watched(progress: Any) -> None:
            report(progress)
            if run_dir.name == branch.run_name and progress.step > 16 and not killed:
                killed.append(True)
                raise Killed

        return train(config, run_dir, report=watched)

    with pytest.raises(Killed):
        work(other, train=dying)
    assert killed
    assert set(work(other)["done"]) >= {"study-T20"}
    whole = next(p for p in study.glob("s0-T20-*"))
    assert untimed(read_metrics(other / branch.run_name)) == untimed(read_metrics(whole))


def test_packed_trunks_and_branches(store: Path, study: Path, tmp_path: Path):
    """Seeds of one shape pack, trunks with trunks and branches with branches of the same step."""
    other = tmp_path / "study"
    plan = open_study(other, plan_of({**AXIS, "steps": [10, 20]}, {"kind": "seeds", "count": 2}, store=store))
    found = groups(plan.cells, Pack("most", 8))
    assert [set(g.cells) for g in found] == [{f"s{s}-{part}" for s in (0, 1)} for part in ("trunk", "T10", "T20")]
    assert groups(plan.cells, NEVER)[0].size == 1
    assert len(work(other, pack=Pack("most", 8))["done"]) == 6
    ours, theirs = (llamax.ledger(path).sort_values("name")["eval_loss"].to_numpy() for path in (other, study))
    assert ours == pytest.approx(theirs, rel=1e-5)
