"""The main job: a whole scaling study on this machine, from text to a prediction that has been checked.

    corpus -> store -> plan -> train -> fit -> predict (written down) -> train that run -> score -> report

Every stage reads what the one before left in the study directory, so an interrupted quickstart continues where it was
and ends with the same numbers.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamax.accounting import count_params
from llamax.config.load import load_run
from llamax.config.sweep import Isoflop, SweepConfig, load_sweep
from llamax.errors import UserError
from llamax.mesh.cpu import cores
from llamax.storage.files import write_atomic
from llamax.sweep.plan import Cell, Plan, make_plan
from llamax.sweep.study import add_cells, open_study

# The prediction is made for this many times the largest trained budget: 3x is promised, the rest covers whole steps.
PREDICTION_FACTOR = 3.2
BOOTSTRAP = 400
ENDED = ("done", "diverged")
SHORT = {"corpus": "data.corpus", "tokenizer": "data.tokenizer.kind"}


def run_quickstart(
    directory: Path, *, fast: bool = False, settings: Sequence[str] = (), workers: int | None = None
) -> dict[str, Any]:
    """Run or continue the study in `directory`; returns what `--json` prints.

    `settings` are a.b.c=value overrides of every cell, with `corpus=` and `tokenizer=` as short names.

    Raises:
        UserError: bad settings, a directory with another study, or too few finished cells to fit.
        KeyboardInterrupt: interrupted; the same call continues.
    """
    clock = _Clock(directory)
    with clock.stage("data"):
        spec, corpus_tokens = _prepare("quickstart-fast" if fast else "quickstart", settings)
    count = workers or max(1, min(8, len(cores())))
    with clock.stage("plan"):
        plan = open_study(
            directory, make_plan(spec, corpus_tokens=corpus_tokens, throughput=_throughput(count), devices=1)
        )
        own = [cell for cell in plan.cells if not cell.extra]
        _say_plan(replace(plan, cells=tuple(own)), count)
    with clock.stage("train"):
        _train(directory, count, [cell.name for cell in own])
    with clock.stage("fit"):
        fit, fits = _fit(directory)
    with clock.stage("predict"):
        prediction, cell = _predict(directory, spec, plan, fit)
    with clock.stage("train the predicted run"):
        _train(directory, 1, [cell.name])
    with clock.stage("report"):
        prediction = _score(directory, cell, prediction)
        from llamax.report.html import write_report

        clock.save()
        report = write_report(directory, fits=fits, prediction=prediction, timings=clock.seconds)
    clock.save()
    keys = ("flops", "n", "d", "loss", "interval", "measured", "miss_percent", "inside", "rule", "words")
    return {
        "seconds": sum(clock.seconds.values()),
        "cells": len(own),
        "interior_minima": fit.approach2.interior_minima if fit.approach2 else 0,
        "fit": {"approach2": fits["approach2"], "approach3": fits["approach3"]},
        "prediction": {key: prediction.get(key) for key in keys},
        "warnings": fits["warnings"],
        "report": str(report),
    }


# ---------------------------------------------------------------- stages
def _prepare(name: str, settings: Sequence[str]) -> tuple[SweepConfig, int]:
    """The sweep with this machine's settings, and the training tokens of its corpus (built or opened here)."""
    from llamax.console import step_progress
    from llamax.data.open import open_data

    texts = [_long(text) for text in settings]
    spec = load_sweep(name, texts)
    if not isinstance(spec.base, str):
        raise UserError(f"sweep {name}: base is inline; the quickstart needs a named train config")
    with step_progress() as progress:
        store = open_data(load_run(spec.base, spec.overrides).data, progress)
    if store.vocab_size != 256 and not any(text.startswith("model.vocab_size=") for text in texts):
        spec = load_sweep(name, [*texts, f"model.vocab_size={store.vocab_size}"])
    _say(f"corpus: {store.tokens('train'):,} training and {store.tokens('held_out'):,} held-out tokens in {store.path}")
    return spec, store.tokens("train")


def _long(text: str) -> str:
    name, equals, value = text.partition("=")
    return f"{SHORT.get(name, name)}{equals}{value}"


def _throughput(workers: int) -> Any:
    from llamax.sweep.throughput import guess

    return guess(max(1, len(cores()) // workers))


def _train(directory: Path, workers: int, names: list[str]) -> None:
    from llamax.sweep.live import live
    from llamax.sweep.local import run_local

    with live() as report:
        state = run_local(directory, workers=workers, only=names, report=report, retry_failed=True)
    if open_cells := [f"{row['name']} ({row['state']})" for row in state["cells"] if row["state"] not in ENDED]:
        raise UserError(
            f"{directory}: {len(open_cells)} cells are not finished: {', '.join(open_cells)}; "
            f"run the same command again, and look in {directory / 'failures'} if it repeats"
        )


def _fit(directory: Path) -> tuple[Any, dict[str, Any]]:
    """Both fits over the finished cells of the sweep (the predicted run is never among them); saved as fits.json."""
    from llamax.columns import LEDGER_COLUMNS
    from llamax.report.ledger import ledger, usable_runs
    from llamax.scaling import fit_frame

    frame = ledger(directory)
    frame, words = usable_runs(
        frame[frame["size"].notna() & (frame.get("role") != "prediction")] if "role" in frame else frame
    )
    if len(frame) < 6:
        raise UserError(f"{directory}: only {len(frame)} cells finished; a fit needs at least 6 (see failures/ in it)")
    fit = fit_frame(frame, **LEDGER_COLUMNS, bootstrap=BOOTSTRAP, seed=0)  # type: ignore[arg-type]
    fits = fit.as_dict() | {"warnings": [*words, *fit.all_warnings()]}
    write_atomic(directory / "fits.json", json.dumps(fits, indent=1))
    return fit, fits


def _predict(directory: Path, spec: SweepConfig, plan: Plan, fit: Any) -> tuple[dict[str, Any], Cell]:
    """The claim, registered in the study's prediction ledger before its run exists, and the cell that will test it."""
    from llamax.predicting import claim_of, refuse_if_known
    from llamax.scaling import predict, recommend
    from llamax.scaling.records import ledger_path, read_predictions, register

    path = ledger_path(directory)
    largest = max(cell.tags["budget"] for cell in plan.cells if not cell.extra)
    flops = float(f"{PREDICTION_FACTOR * largest:.3g}")
    stored = next((record for record in read_predictions(path) if "cell" in record), None)
    size = stored["size"] if stored else nearest_size(spec, recommend(fit, flops).n)
    cell = _prediction_cell(spec, plan, flops, size)
    if stored is None:
        refuse_if_known(directory, "", cell.flops["6n"])
        claim = predict(fit, flops=cell.flops["6n"], n=cell.n, d=cell.tokens)
        stored = register(path, claim_of(claim, fit) | {"size": size, "cell": cell.name, "run": cell.run_name})
    add_cells(directory, [cell])
    _say(
        f"prediction for {cell.name}: loss {stored['loss']:.4f}, interval {_pair(stored['interval'])}; {stored['rule']}"
    )
    return stored, cell


def nearest_size(spec: SweepConfig, n: float) -> str:
    """The ladder size whose N is nearest to `n` in ratio; any width of the rule counts, not only the listed ones."""
    axis = next(axis for axis in spec.axes if isinstance(axis, Isoflop))
    first = axis.pairs[0][1]
    ladder = first.partition("/")[0]
    if not (math.isfinite(n) and n > 0):
        raise UserError(f"the fit recommends N = {n}; no size can be chosen, add cells or budgets to the sweep")
    best, best_miss = first, math.inf
    for width in range(8, 4097, 8):
        config = load_run(str(spec.base), (*spec.overrides, f"model.base={ladder}/d{width}")).model
        miss = abs(math.log(count_params(config).active_matmul / n))
        if miss > best_miss:
            break  # N grows with the width
        best, best_miss = f"{ladder}/d{width}", miss
    return best


def _prediction_cell(spec: SweepConfig, plan: Plan, flops: float, size: str) -> Cell:
    """The run at `flops` with `size`, its batch and learning rate by the sweep's own rules."""
    alone = spec.model_copy(update={"axes": (Isoflop(kind="isoflop", budgets=(flops,), sizes=(size,)),)})
    cell = make_plan(alone, corpus_tokens=plan.corpus_tokens, throughput=_throughput(1), devices=1).cells[0]
    return replace(cell, name=f"prediction-{cell.name}", tags={**cell.tags, "role": "prediction"}, extra=True)


def _score(directory: Path, cell: Cell, prediction: dict[str, Any]) -> dict[str, Any]:
    from llamax.predicting import measured
    from llamax.scaling.records import scores
    from llamax.train.run_dir import read_result

    result = read_result(directory / cell.run_name)
    if result is None or result["status"] != "done":
        cause = (result or {}).get("cause") or "see failures/ in the study"
        raise UserError(
            f"{directory}: the predicted run {cell.name} did not finish ({cause}); run the quickstart again"
        )
    prediction = scores([prediction], measured(directory))[0]
    _say(prediction["words"])
    return prediction


# ---------------------------------------------------------------- telling and timing
class _Clock:
    """Seconds by stage, summed over the sessions of a study and kept in timings.json."""

    def __init__(self, directory: Path):
        self.path = directory / "timings.json"
        self.seconds: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}

    @contextmanager
    def stage(self, name: str) -> Any:
        """Time a block under `name`, also when it is interrupted."""
        began = time.perf_counter()
        _say(f"== {name}")
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            if self.path.parent.is_dir():
                self.save()

    def save(self) -> None:
        """Write the seconds so far."""
        write_atomic(self.path, json.dumps(self.seconds, indent=1))


def _say_plan(plan: Plan, workers: int) -> None:
    from rich.console import Console

    from llamax.sweep.tables import plan_tables

    console = Console(stderr=True, width=None if sys.stderr.isatty() else 100)
    for table in plan_tables(plan, workers):
        console.print(table)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _pair(pair: Any) -> str:
    return "none" if not pair else f"[{pair[0]:.4f}, {pair[1]:.4f}]"
