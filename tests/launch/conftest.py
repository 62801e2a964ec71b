"""A kubectl that writes down what it is asked and answers as it is told."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

FAKE = """#!/usr/bin/env python3
import json, os, sys
folder = os.environ["FAKE_KUBECTL"]
words = sys.argv[1:]
with open(os.path.join(folder, "calls"), "a") as file:
    print(json.dumps(words), file=file)
answers = json.load(open(os.path.join(folder, "answers.json")))
key = next((key for key in answers if key in words), None)
if "create" in words and "-f" in words:
    open(os.path.join(folder, "created.yaml"), "w").write(sys.stdin.read())
code, out, err = answers.get(key, (0, "", ""))
sys.stdout.write(out); sys.stderr.write(err); sys.exit(code)
"""


class Kubectl:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def answers(self, **answers: tuple[int, str, str]) -> None:
        (self.folder / "answers.json").write_text(json.dumps({k.replace("_", "-"): v for k, v in answers.items()}))

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(FAKE)
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_KUBECTL", str(tmp_path))
    fake = Kubectl(tmp_path)
    fake.answers()
    return fake
