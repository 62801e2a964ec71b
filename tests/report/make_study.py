"""Fabricate a study directory from a known law and noise: the runs a sweep would leave, without training anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

LAW = {"E": 0.85, "A": 38.0, "B": 260.0, "alpha": 0.36, "beta": 0.39}
BUDGETS = (1e11, 3e11, 1e12, 3e12)
TARGET = 1e13
SMALLEST, RATIO = 2500.0, 1.75  # of the ladder of sizes that the budgets share
VERSIONS = {"python": "3.11.2", "jax": "0.10.2", "flax": "0.12.8", "llamax": "0.1.0"}
MODEL = {
    "vocab_size": 256,
    "attention": {"kind": "gqa", "heads": 4, "kv_heads": 4, "head_dim": 16},
    "position": {"kind": "rope", "theta": 10000.0},
    "mlp": {"kind": "swiglu", "d_ff": 176},
}


def law(n: float, d: float) -> float:
    """Nats per token of the fabricated world."""
    return LAW["E"] + LAW["A"] * n ** -LAW["alpha"] + LAW["B"] * d ** -LAW["beta"]


def optimum(flops: float) -> float:
    """Parameters the fabricated world spends `flops` = 6 N D on best."""
    ratio = LAW["alpha"] * LAW["A"] / (LAW["beta"] * LAW["B"])
    return (ratio * (flops / 6) ** LAW["beta"]) ** (1 / (LAW["alpha"] + LAW["beta"]))


def make_study(
    path: Path,
    *,
    budgets: tuple[float, ...] = BUDGETS,
    sizes: int = 7,
    noise: float = 0.002,
    rows: int = 120,
    held_out: bool = True,
) -> dict[str, dict[str, Any]]:
    """Write study.yaml, plan.json and finished run directories under `path`; returns each run's result."""
    rng = np.random.default_rng(0)
    path.mkdir(parents=True, exist_ok=True)
    cells, truth = [], {}
    for budget in budgets:
        middle = round(np.log(optimum(budget) / SMALLEST) / np.log(RATIO))
        for s in range(middle - sizes // 2, middle - sizes // 2 + sizes):
            tags = {"budget": budget, "size": f"d{16 * (s + 1)}", "seed": 0}
            cells.append(
                {
                    "name": f"{budget:.0e}-d{16 * (s + 1)}".replace("+", ""),
                    "tags": tags,
                    "n": round(SMALLEST * RATIO**s),
                    "flops": budget,
                }
            )
    if held_out:
        n = round(optimum(TARGET) * 1.1)
        cells.append(
            {
                "name": "prediction",
                "tags": {"budget": TARGET, "size": "d192", "seed": 0},
                "n": n,
                "flops": TARGET,
                "extra": True,
            }
        )
    for i, cell in enumerate(cells):
        cell["hash"] = f"{i:02x}" * 8
        truth[f"{cell['name']}-{cell['hash'][:8]}"] = make_run(path, cell, rng, noise, rows)
    rules = {"learning rate": "lr = 4e-3 · (64 / d_model)^0.5", "tokens": "D = C / (6 N), rounded to whole steps"}
    (path / "plan.json").write_text(json.dumps({"cells": cells, "rules": rules, "warnings": []}))
    (path / "study.yaml").write_text(yaml.safe_dump({"name": "quickstart", "target_flops": TARGET}))
    return truth


def make_run(path: Path, cell: dict[str, Any], rng: np.random.Generator, noise: float, rows: int) -> dict[str, Any]:
    """One finished run directory; returns its result."""
    batch, seq, n = 4, 256, cell["n"]
    run = path / f"{cell['name']}-{cell['hash'][:8]}"
    run.mkdir()
    steps = max(rows, round(cell["flops"] / (6 * n * batch * seq)))
    tokens = steps * batch * seq if steps > rows else cell["flops"] / (6 * n)
    loss = law(n, tokens) * float(np.exp(noise * rng.standard_normal()))
    model = MODEL | {"d_model": 16 * (1 + cells_size(cell)), "segments": [{"repeat": 3}]}
    config = {
        "model": model,
        "data": {"corpus": "python-stdlib", "tokenizer": {"kind": "bytes"}},
        "optimizer": {"kind": "adamw", "lr": 0.004, "weight_decay": 0.1},
        "schedule": {"kind": "cosine"},
        "train": {"batch_size": batch, "seq_len": seq, "steps": steps, "seed": 0},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    seconds = 6 * n * tokens / 4e10
    share = np.linspace(1 / rows, 1, rows)
    seen = tokens * share
    falling = loss + _transient(n, tokens, share)
    falling = falling * np.exp(0.012 * rng.standard_normal(rows))
    lines = [
        {
            "step": int(steps * f), "tokens": float(t), "loss": float(y), "lr": 0.004, "grad_norm": 0.5,
            "seconds": float(seconds * f),
            "tokens_per_second": tokens / seconds, **{f"flops_{c}": float(k * n * t) for c, k in CONVENTIONS.items()},
        }
        for f, t, y in zip(share, seen, falling, strict=True)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "evals.jsonl").write_text(
        json.dumps({"step": steps, "tokens": tokens, "loss": loss, "bits_per_byte": loss / np.log(2)}) + "\n"
    )
    env = {
        "versions": VERSIONS,
        "devices": ["cpu"],
        "flags": {},
        "git": {"commit": "0123abc", "dirty": ""},
        "sessions": [{"seconds": seconds}],
    }
    (run / "env.json").write_text(json.dumps(env))
    spent = {"start": 0.02 * seconds, "compile": 0.06 * seconds, "step": 0.9 * seconds, "checkpoint": 0.02 * seconds}
    (run / "time.json").write_text(json.dumps({"time": 1e9, "step": steps, "seconds": spent}))
    result = {
        "status": "done", "cause": None, "steps": steps, "tokens": tokens,
        "train_loss": float(falling[-1]), "eval_loss": loss,
        "eval_bits_per_byte": loss / float(np.log(2)), "eval_tokens": 262144, "params_total": n + 4096,
        "params_active": n + 4096, "n": n,
        **{f"flops_{c}": k * n * tokens for c, k in CONVENTIONS.items()}, "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "unique_tokens": min(tokens, 2.8e7), "epochs": tokens / 2.8e7, "fingerprint": "f1" * 16,
        "name": cell["name"], "hash": cell["hash"],
    }  # fmt: skip
    (run / "result.json").write_text(json.dumps(result))
    return result


CONVENTIONS = {"6n": 6.0, "chinchilla": 6.6, "palm": 7.1, "causal": 6.5}


def cells_size(cell: dict[str, Any]) -> int:
    """The width index of a cell's size tag."""
    return int(str(cell["tags"]["size"]).removeprefix("d")) // 16


def _transient(n: float, tokens: float, share: np.ndarray) -> np.ndarray:
    """What the training loss still has to fall at a share of the run: the law's data term, and a start near ln 256."""
    data = LAW["B"] * ((tokens * share) ** -LAW["beta"] - tokens ** -LAW["beta"])
    return np.minimum(data, 5.5 - law(n, tokens))


def add_fits(path: Path, bootstrap: int = 100) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fit the study, predict its held-out run, and store fits.json and the registered claim as quickstart does."""
    from llamax.report.ledger import ledger
    from llamax.scaling import fit_frame, predict, score
    from llamax.scaling.records import ledger_path, register

    frame = ledger(path)
    held = frame[frame["name"] == "prediction"].iloc[0]
    fit = fit_frame(
        frame[frame["name"] != "prediction"], d="tokens", loss="eval_loss", flops="flops_6n", bootstrap=bootstrap
    )
    claim = predict(fit, flops=TARGET, n=held["n"], d=held["tokens"])
    fits, prediction = fit.as_dict(), claim.as_dict() | score(claim, held["eval_loss"]).as_dict()
    (path / "fits.json").write_text(json.dumps(fits))
    register(ledger_path(path), claim.as_dict())
    return fits, prediction


def reclaim(path: Path, **changes: Any) -> None:
    """The study's one claim made anew with `changes`, as if it had been registered so."""
    from llamax.scaling.records import ledger_path, read_predictions, register

    (record,) = read_predictions(ledger_path(path))
    for file in path.glob("predictions.jsonl*"):
        file.unlink()
    register(ledger_path(path), record | changes)


if __name__ == "__main__":
    import sys

    make_study(Path(sys.argv[1]))
    add_fits(Path(sys.argv[1]))
