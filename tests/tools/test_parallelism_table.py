"""The guide's table is what the accounting computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from llamax.config.mesh import AXES

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "make_parallelism_table.py"
spec = importlib.util.spec_from_file_location("make_parallelism_table", SCRIPT)
assert spec is not None
assert spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_the_guide_has_the_table_of_the_rules() -> None:
    page = script.DOCS.read_text(encoding="utf-8")
    assert script.START in page
    assert script.with_table(page) == page, "run python tools/make_parallelism_table.py"
    assert set(script.WHEN) == set(AXES)


def test_numbers_of_the_table_by_hand() -> None:
    """Llama 3 8B has 8,030,261,248 parameters of four bytes; data sends twice 7/8 of them, stage two ways 39 turns of
    2 sequences of 4096 rows of 4096 bfloat16 numbers, and once the gradients of embedding and head."""
    assert script.sent(script.DENSE, "data") == f"{8_030_261_248 * 4 * 2 * 7 / 8 / 1e9:.1f}"
    tables = 2 * 128_256 * 4096 * 4 * 2 * 7 / 8
    assert script.sent(script.DENSE, "stage", 32) == f"{(2 * 39 * 2 * 4096 * 4096 * 2 + tables) / 1e9:.1f}"
