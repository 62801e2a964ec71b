"""Every shipped config resolves to the text under tests/golden."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from llamax.config.files import configs_dir

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("update_golden", ROOT / "tools" / "update_golden.py")
assert spec is not None
assert spec.loader is not None
update_golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(update_golden)
TEXTS = update_golden.golden_texts()


@pytest.mark.parametrize("name", TEXTS)
def test_resolved_text_is_the_recorded_one(name: str) -> None:
    path = update_golden.GOLDEN / name
    assert path.is_file(), f"no golden text of {name}: run tools/update_golden.py"
    assert TEXTS[name] == path.read_text(encoding="utf-8"), f"{name} resolves differently: run tools/update_golden.py"


def test_every_shipped_file_is_recorded_and_nothing_else() -> None:
    files = {str(path.relative_to(configs_dir())) for path in configs_dir().rglob("*.yaml")}
    golden = {str(path.relative_to(update_golden.GOLDEN)) for path in update_golden.GOLDEN.rglob("*.yaml")}
    assert files == set(TEXTS)
    assert golden == set(TEXTS)


@pytest.mark.parametrize("path", sorted(configs_dir().rglob("*.yaml")), ids=lambda path: path.name)
def test_a_config_opens_with_its_lab_note(path: Path) -> None:
    """What it is, in a comment; a run or a sweep also says what it costs and the command."""
    note = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    assert note
    assert path.read_text(encoding="utf-8").startswith("#")
    if path.parent.name in ("train", "sweeps", "models"):
        assert "Cost" in note
        assert "llamax " in note
