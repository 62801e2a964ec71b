"""Why two runs differ: the config fields, the environment and the data, beside the losses and where they part."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamax.config.load import diff
from llamax.config.run import IDENTITY
from llamax.errors import UserError
from llamax.report.read import RUN_FILES, number, read_lines, read_object
from llamax.storage.copies import at_hand

if TYPE_CHECKING:
    from rich.console import Group

LOSSES = ("train_loss", "eval_loss", "eval_bits_per_byte")
AMOUNTS = ("n", "params_total", "steps", "tokens", "epochs", "flops_6n", "seconds", "tokens_per_second")
SHOWN = 60  # characters of a value in the table


def compare(run_a: str | Path, run_b: str | Path) -> dict[str, Any]:
    """What differs between two run directories, finished or not, as JSON data.

    runs: both paths. config, environment: lists of `{field, a, b}`, the fields that differ (`identity` is True where
    the field makes it another run; those come first). data: `{a, b, same}`, fingerprints, same None when unknown.
    results: `{name: {a, b, difference}}`, losses in nats per token, None where not measured. losses: `{compared,
    first_difference, a, b, largest}`: rows of equal step, the first step whose losses differ, both losses there, the
    largest absolute difference. words: a sentence a finding. warnings: what was not readable.

    Raises:
        UserError: one of them is not a run directory.
    """
    paths = [_run(run_a), _run(run_b)]
    configs, w1 = _pair(paths, "config.yaml")
    envs, w2 = _pair(paths, "env.json")
    results, w3 = _pair(paths, "result.json")
    metrics = [read_lines(path / "metrics.jsonl") for path in paths]
    w4 = [f"{path}: {word}" for path, (_, word) in zip(paths, metrics, strict=True) if word]
    prints = [result.get("fingerprint") or env.get("fingerprint") for result, env in zip(results, envs, strict=True)]
    fields = [{**row, "identity": row["field"].partition(".")[0] in IDENTITY} for row in _differing(*configs)]
    report: dict[str, Any] = {
        "runs": {"a": str(run_a), "b": str(run_b)},
        "config": sorted(fields, key=lambda row: not row["identity"]),
        "environment": _differing(
            *({k: v for k, v in env.items() if k not in ("sessions", "fingerprint")} for env in envs)
        ),
        "data": {"a": prints[0], "b": prints[1], "same": prints[0] == prints[1] if all(prints) else None},
        "results": {name: _amount(name, *results) for name in (*LOSSES, *AMOUNTS)},
        "losses": _losses(metrics[0][0], metrics[1][0]),
        "warnings": [*w1, *w2, *w3, *w4],
    }
    return report | {"words": _words(report)}


def compare_table(report: Mapping[str, Any]) -> Group:
    """The comparison for a terminal of 100 columns: the findings in words, then the fields, then the results."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(title: str, rows: list[tuple[str, str, str]]) -> Table:
        grid = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
        for name in ("", "a", "b"):
            grid.add_column(name, overflow="fold", max_width=38 if name else 34)
        for row in rows:
            grid.add_row(*(Text(cell) for cell in row))
        return grid

    parts: list[Any] = [Text(f"- {word}") for word in report["words"]]
    for name in ("config", "environment"):
        rows = [(row["field"], _shown(row["a"]), _shown(row["b"])) for row in report[name]]
        if rows:
            parts.append(table(f"\n{name}: fields that differ", rows))
    known = [(name, r["a"], r["b"]) for name, r in report["results"].items() if not (r["a"] is None and r["b"] is None)]
    if known:
        parts.append(table("\nresults", [(name, _number(a), _number(b)) for name, a, b in known]))
    return Group(*parts, *(Text(f"warning: {word}", style="yellow") for word in report["warnings"]))


# ---------------------------------------------------------------- parts
def _words(report: Mapping[str, Any]) -> list[str]:
    own = [row for row in report["config"] if row["identity"]]
    named = "; ".join(f"{row['field']} ({_shown(row['a'])} against {_shown(row['b'])})" for row in own[:6])
    more = f"; and {len(own) - 6} more" if len(own) > 6 else ""
    words = [f"config fields that differ: {named}{more}" if own else "the configs ask for the same run"]
    if report["data"]["same"] is False:
        words.append("the data differ: their fingerprints are not the same")
    versions = [
        row["field"].rpartition(".")[2] for row in report["environment"] if row["field"].startswith("versions.")
    ]
    if versions:
        words.append(f"versions that differ: {', '.join(versions)}")
    others = {row["field"].partition(".")[0] for row in report["environment"]} - {"versions"}
    if others:
        words.append(f"the environments also differ in {', '.join(sorted(others))}")
    losses = report["losses"]
    if not losses["compared"]:
        words.append("no step was logged by both, so the loss sequences cannot be compared")
    elif losses["first_difference"] is None:
        words.append(f"all {losses['compared']} losses logged by both are equal, bit for bit")
    else:
        words.append(
            f"the losses first differ at step {losses['first_difference']} ({_number(losses['a'])} against "
            f"{_number(losses['b'])}); the largest difference is {losses['largest']:.3g} nats per token"
        )
    final = report["results"]["eval_loss"]
    if final["difference"] is not None:
        words.append(
            f"held-out loss: {final['a']:.4f} against {final['b']:.4f}, "
            f"a difference of {final['difference']:+.4f} nats per token"
        )
    return words


def _losses(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of equal step side by side; two losses that are both not finite count as equal."""
    left, right = ({row["step"]: number(row.get("loss")) for row in rows} for rows in (a, b))
    steps = [step for step in left if step in right]
    apart = [s for s in steps if left[s] != right[s] and not (math.isnan(left[s]) and math.isnan(right[s]))]
    gaps = [abs(left[s] - right[s]) for s in apart]
    finite = [gap for gap in gaps if math.isfinite(gap)]
    first = apart[0] if apart else None
    return {
        "compared": len(steps),
        "first_difference": first,
        "a": None if first is None else _finite(left[first]),
        "b": None if first is None else _finite(right[first]),
        "largest": max(finite) if finite else (math.inf if gaps else 0.0),
    }


def _amount(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, float | None]:
    left, right = _finite(number(a.get(name))), _finite(number(b.get(name)))
    return {"a": left, "b": right, "difference": None if left is None or right is None else right - left}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"field": name, "a": left, "b": right} for name, left, right in diff(a, b)]


def _pair(paths: list[Path], name: str) -> tuple[list[dict[str, Any]], list[str]]:
    found = [read_object(path / name) for path in paths]
    return [data for data, _ in found], [
        f"{path}: {word}" for path, (_, word) in zip(paths, found, strict=True) if word
    ]


def _run(path: str | Path) -> Path:
    run = at_hand(path).expanduser()
    if not any((run / name).is_file() for name in RUN_FILES):
        raise UserError(f"{path}: not a run directory (no {' or '.join(RUN_FILES)}); give the folder of one run")
    return run


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.6g}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
