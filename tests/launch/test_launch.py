"""What a launch says before it starts anything, what it refuses, and how launchers are found."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamax.errors import UserError
from llamax.launch import launch as launches
from llamax.launch import records
from llamax.launch.estimate import estimate
from llamax.launch.on import local, slurm
from llamax.launch.protocol import Job, Launcher, Shape, find_launcher, launcher_names, load_settings
from llamax.sweep.status import status
from llamax.sweep.study import open_study
from tests.sweep.studies import BASE, seeds_plan
from tests.test_cli import call

GPUS = ["--set", "gpus_per_node=8", "--set", "device=h100", "--set", "nodes=2"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sweep of three cells as a file."""
    path = tmp_path_factory.mktemp("sweep") / "three.yaml"
    path.write_text(json.dumps({"name": "three", "base": BASE, "axes": [{"kind": "seeds", "count": 3}]}))
    return str(path)


# ---------------------------------------------------------------- launchers are files
@pytest.mark.parametrize("name", launcher_names())
def test_every_launcher_has_the_names_of_the_protocol(name: str) -> None:
    launcher = find_launcher(name)
    wanted = {key: value for key, value in vars(Launcher).items() if inspect.isfunction(value) and key[0] != "_"}
    assert len(wanted) >= 6
    for key, method in wanted.items():
        assert (
            list(inspect.signature(getattr(launcher, key)).parameters) == list(inspect.signature(method).parameters)[1:]
        )
    assert issubclass(launcher.Settings, local.Common)


def test_another_launcher_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llamax.launch.on as on

    (tmp_path / "elsewhere.py").write_text("from llamax.launch.on.local import *\n")
    monkeypatch.setattr(on, "__path__", [*on.__path__, str(tmp_path)])
    assert "elsewhere" in launcher_names()
    launcher, settings = load_settings("elsewhere", ["workers=3"])
    assert (launcher, settings.workers) == ("elsewhere", 3)
    sys.modules.pop("llamax.launch.on.elsewhere")


@pytest.mark.parametrize(
    ("on", "changes", "says"),
    [
        ("slrm", [], "nearest: slurm"),
        ("slurm", ["partion=gpu"], "did you mean partition"),
        ("slurm", ["nodes=0"], "nodes = 0"),
        ("slurm", ["gpus_per_node=8", "tasks_per_node=3"], "not shared evenly"),
        ("slurm", ["hours=0.05", "signal_seconds=120"], "more hours"),
        ("slurm", ["partition=a b"], "partition"),
        ("slurm", ["env={1A: x}"], "env"),
        ("local", ["workers=two"], "workers"),
    ],
)
def test_bad_settings_are_one_message(on: str, changes: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_settings(on, changes)


def test_a_block_of_settings_names_its_launcher(tmp_path: Path) -> None:
    block = tmp_path / "lab.yaml"
    block.write_text("launcher: slurm\npartition: gpu\nworkers: 4\n")
    launcher, settings = load_settings(str(block), ["workers=2"])
    assert (launcher, settings.partition, settings.workers) == ("slurm", "gpu", 2)
    block.write_text("partition: gpu\n")
    with pytest.raises(UserError, match="write `launcher:`"):
        load_settings(str(block))


# ---------------------------------------------------------------- SLURM's script
def script(*changes: str) -> str:
    return slurm.script("/shared/runs/a study", load_settings("slurm", list(changes))[1], 0)


def test_the_script_asks_for_what_the_settings_say() -> None:
    text = script(
        "nodes=2",
        "gpus_per_node=8",
        "gpu_type=h100",
        "hours=1.5",
        "workers=4",
        "account=me",
        "memory_gb=64",
        "env={A: 'x y'}",
    )
    options = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert options >= {
        "--array=0-3",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gres=gpu:h100:8",
        "--time=0-01:30:00",
        "--account=me",
        "--mem=64G",
        "--requeue",
        "--signal=TERM@120",
        '--output="/shared/runs/a study/logs/slurm-%A_%a.log"',
    }
    assert "export A='x y'" in text
    assert "-m llamax.sweep.worker '/shared/runs/a study'" in text


def test_the_script_is_shell_and_does_what_exit_codes_ask(tmp_path: Path) -> None:
    """srun, squeue and scontrol are stand-ins here; tests/launch/test_slurm.py has the real ones."""
    text = script("python=python", "tries=2").replace("sleep 600", ":")
    log = tmp_path / "log"

    def run(*codes: int, state: str = "RUNNING") -> tuple[int, str]:
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        log.write_text("")
        programs = {
            "srun": f'echo srun >> {log}; code=$(head -1 {tmp_path}/codes); sed -i 1d {tmp_path}/codes; exit "$code"',
            "squeue": f"echo {state}",
            "scontrol": f'echo "$1" >> {log}',
        }
        for name, body in programs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        done = subprocess.run(["bash"], input=text, env=env, text=True, capture_output=True, timeout=30, check=False)
        return done.returncode, " ".join(log.read_text().split())

    assert run(0) == (0, "srun")
    assert run(2) == (2, "srun"), "bad input does not get better"
    assert run(1, 0) == (0, "srun srun"), "a crash is tried again"
    assert run(75, 137) == (137, "srun srun"), "but not for ever"
    assert run(3, 3, 3, 0) == (0, "srun srun srun srun"), "a cell that failed is written down and no crash"
    assert run(143) == (143, "srun requeue")
    assert run(143, state="COMPLETING") == (143, "srun"), "a cancelled job stays cancelled"


# ---------------------------------------------------------------- what it will take
def test_the_estimate_by_hand() -> None:
    cells = seeds_plan(3).cells
    _, settings = load_settings(
        "slurm", ["workers=2", "utilization=0.5", "price_per_device_hour=2", "startup_seconds=36"]
    )
    found = estimate(cells, Shape(2, 16, 16, "h100"), settings)
    work = 6 * cells[0].n * cells[0].tokens / (16 * 989.4e12 * 0.5)  # microseconds; data.eval_tokens is null here
    assert cells[0].config.data.eval_tokens is None or work < 1e-3
    seconds = 36 + work
    assert found.hours == pytest.approx(2 * seconds / 3600, rel=1e-4)  # three cells, two workers
    assert found.device_hours == pytest.approx(16 * 3 * seconds / 3600, rel=1e-4)
    assert found.dollars == pytest.approx(2 * found.device_hours)
    assert (found.devices, found.processes) == (32, 2)


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    cells, (_, settings) = seeds_plan(1).cells, load_settings("slurm", [])
    for kind, why in ((None, "device="), ("Abacus 3", "no peak rate of 'Abacus 3'")):
        found = estimate(cells, Shape(1, 8, 8, kind), settings)
        assert found.hours is None
        assert found.dollars is None
        assert why in found.rules["hours"]


# ---------------------------------------------------------------- the verb
def test_dry_run_prints_the_script_on_stdout_and_writes_nothing(sweep: str, tmp_path: Path) -> None:
    study = tmp_path / "study"
    done = call("launch", sweep, "--on", "slurm", "--dir", str(study), "--workers", "3", *GPUS, "--dry-run")
    assert done.code == 0, done.err
    assert done.out.startswith("#!/bin/bash\n#SBATCH --job-name=llamax-study\n#SBATCH --array=0-2\n")
    assert not study.exists()
    for words in (
        "48 x h100",
        "devices: workers (3) x h100s of one (16)",
        "utilization: assumed",
        "cost",
        "list price",
    ):
        assert words in done.err
    told = call("launch", sweep, "--on", "slurm", "--dir", str(study), "--dry-run", *GPUS, "--json").json
    assert told["cells"] == 3
    assert told["devices"] == 16
    assert told["text"].startswith("#!/bin/bash")


@pytest.mark.slow
def test_local_trains_here_and_ends_with_the_table(sweep: str, tmp_path: Path) -> None:
    study = tmp_path / "study"
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("some text to learn from\n" * 400)
    assert call("data", "build", "--text", str(text), "--out", str(tmp_path / "store"), "--json").code == 0
    fields = [f"data.store={tmp_path / 'store'}", "data.eval_tokens=64", "train.batch_size=8", "axes.0.count=1"]
    done = call("launch", sweep, *fields, "--dir", str(study))
    assert done.code == 0, done.err
    assert "1 cells of" in done.err
    assert status(study)["counts"]["done"] == 1
    assert records.jobs(study) == []
    again = call("launch", str(study))
    assert again.code == 2
    assert "no cell is left" in again.err


def test_no_slurm_is_one_message(sweep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = call("launch", sweep, "--on", "slurm", "--dir", str(tmp_path / "study"))
    assert done.code == 2
    assert done.err.startswith("error: sbatch is not on this machine")


def test_storage_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    study = tmp_path / "study"
    open_study(study, seeds_plan(2))
    (study / "launches").write_text("in the way")  # root may write into a read-only folder, but not into a file
    with pytest.raises(UserError, match="cannot be written"):
        launches.launch(study, seeds_plan(2), "local", local.Settings())


class Scheduler:
    """A launcher in memory."""

    Settings = local.Settings

    def __init__(self) -> None:
        self.live: dict[str, bool] = {}

    shape, script, check = staticmethod(local.shape), staticmethod(local.script), staticmethod(local.check)

    def submit(self, study: str, settings: Any, launch: int) -> list[str]:
        self.live[f"job{launch}"] = True
        return [f"job{launch}"]

    def jobs(self, settings: Any, ids: list[str]) -> list[Job]:
        return [Job(id, "RUNNING" if self.live[id] else "ENDED", self.live[id]) for id in ids]

    def cancel(self, settings: Any, ids: list[str]) -> None:
        self.live |= dict.fromkeys(ids, False)


def test_two_launches_of_one_study_are_refused_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, study, plan = Scheduler(), tmp_path / "study", seeds_plan(2)
    for module in (launches, records):
        monkeypatch.setattr(module, "find_launcher", lambda name: scheduler)
    assert launches.launch(study, plan, "local", local.Settings())[1] == ["job0"]
    with pytest.raises(UserError, match=r"has workers already: local job0 \(RUNNING\).*--add"):
        launches.launch(study, plan, "local", local.Settings())
    assert launches.launch(study, plan, "local", local.Settings(), add=True)[1] == ["job1"]
    assert [(job["id"], job["live"]) for job in records.jobs(study)] == [("job0", True), ("job1", True)]
    assert records.cancel(study) == ["job0", "job1"]
    assert launches.launch(study, plan, "local", local.Settings())[1] == ["job2"]
    assert "job2" in call("sweep", "status", str(study)).out
    told = call("sweep", "cancel", str(study), "--json")
    assert told.json["ended"] == ["job2"]


def test_status_on_a_machine_without_the_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tmp_path / "study"
    open_study(study, seeds_plan(2))
    records.record(study, "slurm", slurm.Settings(), ["12"], "#!/bin/bash\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    (row,) = call("sweep", "status", str(study), "--json").json["jobs"]
    assert (row["id"], row["live"]) == ("12", None)
    assert "squeue is not on this machine" in row["note"]
    assert call("sweep", "cancel", str(study)).code == 2


# ---------------------------------------------------------------- the guide
GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "clusters.md").read_text()


def test_the_commands_and_the_block_of_the_guide_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMAX_CACHE", str(tmp_path / "cache"))
    commands = [line.partition("#")[0].split() for line in GUIDE.splitlines() if line.startswith("llamax launch")]
    slurm_ones = [words[1:] for words in commands if "slurm" in words]
    assert len(slurm_ones) == 2
    for words in slurm_ones:
        done = call(*words, *([] if "--dry-run" in words else ["--dry-run"]))
        assert done.code == 0, done.err
        assert "#SBATCH --partition=PARTITION" in done.out
    (tmp_path / "my-cluster.yaml").write_text(GUIDE.partition("```yaml\n")[2].partition("```")[0])
    launcher, settings = load_settings("my-cluster.yaml")
    assert (launcher, settings.nodes * settings.gpus_per_node) == ("slurm", 16)
