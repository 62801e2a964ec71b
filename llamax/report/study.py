"""A study as the report sees it: everything that can be read from its folder, and what could not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamax.errors import UserError
from llamax.report.ledger import curves, ledger
from llamax.report.read import find_runs, number, read_object
from llamax.scaling.laws import ChinchillaLaw, Cost, CoupledLaw, Law, optimal_allocation
from llamax.scaling.records import ledger_path, read_predictions, scores
from llamax.storage.copies import at_hand
from llamax.train.goodput import total
from llamax.train.run_dir import TIME

if TYPE_CHECKING:
    import pandas as pd

HELD_OUT = ("held_out", "held-out", "prediction", "target")


@dataclass(frozen=True)
class Study:
    """The files of one study. Mappings are empty where a file is missing; `problems` says what was not readable."""

    path: Path
    runs: pd.DataFrame
    curves: pd.DataFrame
    plan: Mapping[str, Any]
    spec: Mapping[str, Any]
    fits: Mapping[str, Any]
    prediction: Mapping[str, Any]
    timings: Mapping[str, Any]
    env: tuple[Mapping[str, Any], ...]
    spent: Mapping[str, float]  # seconds by kind, summed over runs (train/goodput.py)
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        """The study's own name, or its folder's."""
        return str(self.spec.get("name") or self.path.resolve().name)

    @cached_property
    def held_out(self) -> pd.Series | None:
        """The row of the run the prediction is about, if it has been started."""
        runs, claim = self.runs, self.prediction
        cells = [c for c in self.plan.get("cells") or () if isinstance(c, dict) and c.get("extra")]
        extra = {str(c.get("name")) for c in cells if (c.get("tags") or {}).get("role") != "next"}
        if claim.get("run") is not None:
            hit = runs["run"].eq(str(claim["run"])) | runs["name"].eq(str(claim["run"]))
        elif "role" in runs and runs["role"].isin(HELD_OUT).any():
            hit = runs["role"].isin(HELD_OUT)
        elif runs["name"].isin(extra).any():  # cells added to a plan beyond its own
            hit = runs["name"].isin(extra)
        else:  # the run with the very N and D that were claimed
            near = [(runs[c] / number(claim.get(k)) - 1).abs() < 2e-3 for c, k in (("n", "n"), ("tokens", "d"))]
            hit = near[0] & near[1]
        return runs[hit].iloc[-1] if hit.any() else None

    @cached_property
    def cells(self) -> pd.DataFrame:
        """The finished runs that were there to be fitted: done, with a held-out loss, without trunks, which have not
        decayed, and without the predicted run."""
        runs = self.runs
        keep = runs["status"].eq("done") & runs["eval_loss"].gt(0) & runs["n"].gt(0) & runs["tokens"].gt(0)
        keep &= runs["stage"] != "trunk"
        if self.held_out is not None:
            keep &= runs["run"] != self.held_out["run"]
        return runs[keep]

    @cached_property
    def budgets(self) -> list[float]:
        """The compute budgets of the finished cells, least first; none if no cell has a numeric `budget` tag."""
        labels = self.cells["budget"].map(number).dropna()
        return sorted(float(label) for label in labels.unique())

    @cached_property
    def valleys(self) -> list[Mapping[str, Any]]:
        """Approach 2's entries that have a number for a budget, least first."""
        entries = _part(self.fits, "approach2").get("budgets") or []
        good = [e for e in entries if isinstance(e, Mapping) and number(e.get("budget")) > 0]
        return sorted(good, key=lambda e: number(e["budget"]))

    @property
    def approach2(self) -> Mapping[str, Any]:
        return _part(self.fits, "approach2")

    @property
    def approach3(self) -> Mapping[str, Any]:
        return _part(self.fits, "approach3")

    @property
    def coupled(self) -> Mapping[str, Any]:
        return _part(self.fits, "coupled")

    @property
    def law_name(self) -> str:
        """`coupled` or `approach3`: the law that made the prediction, else the one the fits would predict with."""
        said = self.prediction.get("law") or self.fits.get("law")
        return "coupled" if said == "coupled" and _numbers(self.fits, "coupled") else "approach3"

    @property
    def law_fit(self) -> Mapping[str, Any]:
        """The stored fit of that law."""
        return _part(self.fits, self.law_name)

    @property
    def law(self) -> Law | None:
        """The law itself, when all its parameters are numbers."""
        return self.laws.get(self.law_name)

    @cached_property
    def laws(self) -> dict[str, Law]:
        """Every parametric law whose stored parameters are all numbers, by its name in the fits."""
        found: dict[str, Law] = {}
        if values := _numbers(self.fits, "approach3"):
            found["approach3"] = ChinchillaLaw(**values)
        if values := _numbers(self.fits, "coupled"):
            found["coupled"] = CoupledLaw(**values)
        return found

    def law_loss(self, n: Any, d: Any) -> Any:
        """Nats per token of the law that predicts, at `n` parameters and `d` tokens; nan without one."""
        return self.law.loss(n, d) if self.law else float("nan")

    def law_optimum(self, flops: Any) -> tuple[Any, Any]:
        """N and D at which the law is least on C = k·N^s·D, at compute `flops`, a number or `[points]`; needs `law`."""
        cost = _part(self.fits, "cost")
        costs = Cost(number(cost.get("coefficient", 6.0)), number(cost.get("n_exponent", 1.0)))
        if self.law is None:
            raise ValueError("no law was fitted")
        best = [optimal_allocation(self.law, float(c), costs) for c in np.ravel(flops)]
        shape = np.shape(flops)
        return np.reshape([b.n for b in best], shape), np.reshape([b.d for b in best], shape)


def load_study(
    path: str | Path,
    fits: Mapping[str, Any] | None = None,
    prediction: Mapping[str, Any] | None = None,
    timings: Mapping[str, Any] | None = None,
) -> Study:
    """Read a study directory, a folder of runs or a single run; what is not given comes from its JSON files.

    Raises:
        UserError: `path` is not a folder.
    """
    root = at_hand(path)
    runs, rows = ledger(root), curves(root)
    names = {"fits": fits, "timings": timings, "plan": None}
    parts, problems = {}, []
    for name, given in names.items():
        parts[name], word = (given, None) if given is not None else read_object(root / f"{name}.json")
        problems += [word] if word else []
    if prediction is None:
        prediction, word = _claim(root, runs)
        problems += [word] if word else []
    spec, word = read_object(root / "study.yaml")
    problems += [word] if word else []
    return Study(
        path=root,
        runs=runs,
        curves=rows,
        spec=spec,
        env=_environments(root),
        spent=_spent(root),
        problems=tuple(problems),
        prediction=prediction,
        **parts,
    )


def _claim(root: Path, runs: pd.DataFrame) -> tuple[Mapping[str, Any], str | None]:
    """The newest registered prediction with its score so far, or why the ledger of predictions cannot be believed."""
    try:
        records = read_predictions(ledger_path(root))
    except (UserError, OSError) as error:
        return {}, str(error)
    if not records:
        return {}, None
    done = runs[runs["status"].eq("done")]
    known = done.rename(columns={"flops_6n": "flops", "eval_loss": "loss"})[["run", "n", "flops", "loss"]]
    return scores(records[-1:], known)[0], None


def _spent(root: Path) -> Mapping[str, float]:
    """Where the time of the runs went; a run whose time.json is missing or damaged is left out."""
    accounts = (_part(read_object(run / TIME)[0], "seconds") for run in find_runs(root))
    return total({str(kind): number(value) for kind, value in account.items()} for account in accounts)


def _environments(root: Path) -> tuple[Mapping[str, Any], ...]:
    """The env.json of every run, each distinct one once (sessions, which differ from run to run, left aside)."""
    seen: dict[str, Mapping[str, Any]] = {}
    for run in find_runs(root):
        env = {
            key: value
            for key, value in read_object(run / "env.json")[0].items()
            if key not in ("sessions", "fingerprint")
        }
        if env:
            seen.setdefault(json.dumps(env, sort_keys=True, default=str), env)
    return tuple(seen.values())


def _numbers(fits: Mapping[str, Any], name: str) -> dict[str, float] | None:
    """The parameters of a stored law, when all of them are numbers."""
    params = _part(_part(fits, name), "params")
    keys = ("E", "A", "B", "alpha", "beta", *(["gamma"] if name == "coupled" else []))
    values = {key: number(params.get(key)) for key in keys}
    return values if all(value == value for value in values.values()) else None


def _part(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name)
    return value if isinstance(value, Mapping) else {}
