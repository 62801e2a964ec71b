"""Writes tests/golden/: the resolved text of every shipped config.

    python tools/update_golden.py     after a change of configs/ or llamax/config; read the diff before committing it

A test compares these files with what the configs resolve to now, so that no default changes unseen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from llamax.config.cards import card_names
from llamax.config.files import read_yaml, shipped
from llamax.config.load import dump_yaml, load_corpus, load_model, load_run
from llamax.config.sweep import load_sweep
from llamax.launch.protocol import load_settings

STYLED = (16, 64, 512)  # ladder widths at which styles are recorded
GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


def golden_texts() -> dict[str, str]:
    """Path under tests/golden -> text, for every YAML file under configs/."""
    texts = {}
    for name in shipped("train"):
        config = load_run(name)
        texts[f"train/{name}.yaml"] = f"# hash {config.hash8}\n{dump_yaml(config)}"
    for family in shipped("models"):
        sizes = [name.partition("/")[2] for name in card_names() if name.startswith(f"{family}/")]
        texts[f"models/{family}.yaml"] = _models(family, sizes)
    for ladder, path in shipped("ladders").items():
        texts[f"ladders/{ladder}.yaml"] = _models(ladder, [f"d{width}" for width in read_yaml(path)["widths"]])
    for style in shipped("styles"):
        sizes = {f"d{width}": load_model(f"ladder/d{width}@{style}").as_dict() for width in STYLED}
        texts[f"styles/{style}.yaml"] = _text(sizes)
    for name in shipped("corpora"):
        texts[f"corpora/{name}.yaml"] = dump_yaml(load_corpus(name))
    for name in shipped("sweeps"):
        texts[f"sweeps/{name}.yaml"] = dump_yaml(load_sweep(name))
    for name, path in shipped("meshes").items():
        texts[f"meshes/{name}.yaml"] = _text(read_yaml(path))
    for name in shipped("launch"):
        overrides = ["image=IMAGE", "topology=v5e:4x4"] if name == "jobset" else []
        texts[f"launch/{name}.yaml"] = dump_yaml(load_settings(name, overrides)[1])
    return texts


def _models(family: str, sizes: list[str]) -> str:
    return _text({size: load_model(f"{family}/{size}").as_dict() for size in sizes})


def _text(data: dict[str, Any]) -> str:
    return yaml.safe_dump(data, sort_keys=False, width=100, default_flow_style=None)


def main() -> None:
    """Replaces the golden files, and removes those whose config is gone."""
    texts = golden_texts()
    for old in GOLDEN.rglob("*.yaml"):
        if str(old.relative_to(GOLDEN)) not in texts:
            old.unlink()
    for name, text in texts.items():
        path = GOLDEN / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"wrote {len(texts)} files under {GOLDEN}")


if __name__ == "__main__":
    main()
