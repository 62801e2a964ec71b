"""docs/models.md is what the cards say now, and what it says was checked is so."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

from llamax.accounting import list_models
from llamax.config.cards import find_size, listed_names
from llamax.config.files import read_yaml, shipped

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("make_model_docs", ROOT / "tools" / "make_model_docs.py")
assert spec is not None
assert spec.loader is not None
make_model_docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_model_docs)


def test_the_page_is_up_to_date() -> None:
    page = make_model_docs.DOCS.read_text(encoding="utf-8")
    assert page == make_model_docs.model_docs(), "run tools/make_model_docs.py"


def test_every_family_and_size_has_its_row() -> None:
    lines = make_model_docs.model_docs().splitlines()
    for family in shipped("models"):
        assert sum(line.startswith(f"| [{family}](#") for line in lines) == 1
        assert f"## {family}" in lines
    counts = {row["name"]: row["params_total"] for row in list_models()}
    for name in listed_names():
        (line,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        assert f"{counts[name]:,}" in line if counts[name] else "nothing to check" in line


def test_checked_names_sizes_that_exist() -> None:
    checked = read_yaml(make_model_docs.CHECKED)
    named = [name for names in checked["counts"].values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) | set(checked["no_config"]) <= set(listed_names())


def test_a_check_must_name_a_test_that_exists() -> None:
    make_model_docs._must_exist("tests/tools/test_model_docs.py::test_a_check_must_name_a_test_that_exists")
    with pytest.raises(SystemExit, match="does not exist"):
        make_model_docs._must_exist("tests/tools/test_model_docs.py::test_of_nothing")


def test_how_counts_are_known_is_as_the_reference_says(shared_reference: Path) -> None:
    rows = yaml.load((shared_reference / "models.yaml").read_text(), Loader=yaml.CSafeLoader)["models"]
    counts, listed = read_yaml(make_model_docs.CHECKED)["counts"], set()
    for row in (row for row in rows if "verification" in row):
        name = "/".join(find_size(row["hub_id"]) or ()) if row["hub_id"] else "llama2/34b"
        verification = row["verification"]
        exact, recalled = verification["published_exact"] is not None, verification["source"] == "recall"
        assert (name in counts["rounded"]) == (not exact), name
        assert (name in counts["recalled"]) == (exact and recalled), name
        listed.add(name)
    assert listed.isdisjoint(counts["own"])
    assert set(counts["rounded"]) | set(counts["recalled"]) <= listed
