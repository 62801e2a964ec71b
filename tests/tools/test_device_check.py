"""tools/device_check.py at toy sizes: every section gives figures that are what their names say, or says why not."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
device_check, device_sections = (importlib.import_module(name) for name in ("device_check", "device_sections"))
SLOW = ("mfu-moe", "fp8", "remat", "torch")  # several programs to compile


@pytest.fixture
def one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_sections, "DENSE", {name: device_sections.DENSE[name] for name in ("1B", "10M")})
    monkeypatch.setattr(device_sections, "TARGETED", ("1B",))


@pytest.mark.parametrize(
    "name", [pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in device_sections.SECTIONS]
)
def test_every_section_tiny(one_size: None, name: str) -> None:
    rows = list(device_sections.SECTIONS[name][0](True))
    assert rows
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        figures = [row.get(field) for field in ("milliseconds", "error_value", "eval_loss")]
        assert ("missing" in row) != any(figure is not None for figure in figures), row
        assert row.get("agrees", True), row
        if "tokens_per_second" in row and "batch" in row:
            assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] * row["seq"] / row["milliseconds"])
    if name == "decode":
        assert rows[0]["bytes_per_second"] == pytest.approx(1e3 * rows[0]["bytes_per_step"] / rows[0]["milliseconds"])


def test_sizes_are_what_they_are_called() -> None:
    from llamax.accounting import count_params

    for name, shape in device_sections.DENSE.items():
        wanted = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
        assert count_params(device_sections.config_of(shape, 1).model).total == pytest.approx(wanted, rel=0.16), name
        assert shape.d == 128 * shape.heads
        assert shape.vocab % 256 == 0
    mixture = count_params(device_sections.config_of(device_sections.MIXTURE, 1).model)
    assert mixture.active == pytest.approx(1e9, rel=0.1)


def test_batch_shrinks_with_memory_down_to_its_least() -> None:
    shape = device_sections.DENSE["1B"]
    sizes = [device_sections.batch_of(shape, memory) for memory in (None, 141 * 10**9, 80 * 10**9, 30 * 10**9)]
    assert sizes[0] * shape.seq == device_sections.TOKENS
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] * shape.seq == device_sections.LEAST_TOKENS


def test_memory_that_does_not_suffice_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    def full(config: Any, tiny: bool) -> Any:
        if config.train.batch_size > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return {"batch": config.train.batch_size}

    monkeypatch.setattr(device_sections, "_timed", full)
    assert device_sections.train_row("x", device_sections.TINY, True, 8) == {
        "what": "x",
        "batch": 2,
        "too_large": [8, 4],
    }


def test_rows_are_kept_of_a_section_that_is_stopped_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "tools" / "device_sections.py"
    script.parent.mkdir()
    code = 'import sys, time\nprint(\'{"what": "first", "milliseconds": 1.0}\', flush=True)\n'
    code += "time.sleep(60) if sys.argv[1] == 'slow' else sys.exit('no such device')\n"
    script.write_text(code)
    monkeypatch.setattr(device_check, "ROOT", tmp_path)
    rows: list[dict[str, Any]] = []
    begun = time.perf_counter()
    device_check.run_section("slow", True, 2.0, rows.append)
    assert time.perf_counter() - begun < 20
    device_check.run_section("broken", True, 20.0, rows.append)
    assert [row["what"] for row in rows] == ["first", "the rest", "first", "the rest"]
    assert rows[1]["missing"] == "stopped after its 2 s"
    assert rows[3]["missing"] == "ended with code 1: no such device"


def test_file_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Sections in order; what no time is left for is named; the file has every row."""
    known = {"device": "NVIDIA H200", "versions": {"jax": "0.10.2"}, "flags": {}}
    monkeypatch.setattr(device_check, "about", lambda: known)
    figures = {"what": "1B", "milliseconds": 250.0, "tokens_per_second": 131072.0, "mfu": 0.561, "kernels": ["cudnn"]}

    def fake(name: str, tiny: bool, seconds: float, keep: Any) -> None:
        monkeypatch.setattr(device_check, "STARTED", device_check.STARTED - 100)
        keep({"section": name, **figures})

    monkeypatch.setattr(device_check, "run_section", fake)
    monkeypatch.setattr(device_check, "STARTED", time.perf_counter())
    arguments = ["device_check.py", "--only", "mfu-dense", "decode", "--minutes", "1.5", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    device_check.main()
    printed = capsys.readouterr().out
    assert "| mfu-dense | 1B | 250.00 | 131,072 | 56.1% |  |  |  | cudnn |  |  |" in printed
    assert "| decode | all |  |  |  |  |  |  |  |  | missing skipped: 0 s left |" in printed
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-nvidia-h200.json")
    assert [row["section"] for row in json.loads(path.read_text())["rows"]] == ["mfu-dense", "decode"]
