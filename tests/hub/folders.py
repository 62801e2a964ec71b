"""Small Hugging Face folders for tests: this project's fixtures, the shared reference's, and damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

OWN = Path(__file__).parent / "fixtures"
NAMES = sorted(path.name for path in OWN.iterdir())
WITHOUT_CLASS = {"phi3small"}  # model types that transformers 5 cannot build; see phi3small.py
SPELLINGS = ("config.hub.json", "config.hub_style.json")  # ours, the reference's: files as the hub spells them


def copy(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of a model's folder with fields of its config.json replaced."""
    to.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(folder / name, to / name)
    data = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(data))
    return to


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file of any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, read with the format's own library."""
    from safetensors.numpy import load_file

    found: dict[str, np.ndarray] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found
