"""Published scaling data for the tests: never part of the project, found by LLAMAX_SCALING_DATA or skipped."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "reference" / "scaling"


def folder() -> Path:
    """The folder with expected.json; skips the calling test, saying why, where there is none."""
    path = Path(os.environ.get("LLAMAX_SCALING_DATA", DEFAULT))
    if not (path / "expected.json").is_file():
        pytest.skip(
            f"no published scaling data: set LLAMAX_SCALING_DATA to a folder with expected.json ({path} has none)"
        )
    return path


def expected(check: str) -> dict[str, Any]:
    """One check of expected.json by its id."""
    checks = json.loads((folder() / "expected.json").read_text())["checks"]
    return next(item for item in checks if item["id"] == check)


def chinchilla_runs(*, keep_all: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D, loss of the runs read off Hoffmann et al. figure 4: 240 of them, or all 245."""
    frame = pd.read_csv(folder() / "epoch_chinchilla" / "svg_extracted_data.csv")
    if not keep_all:
        frame = frame[frame["loss"] < np.sort(frame["loss"])[-5]]
    n, flops, loss = (frame[c].to_numpy(float) for c in ("Model Size", "Training FLOP", "loss"))
    return n, flops / (6 * n), loss
