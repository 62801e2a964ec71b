"""`llamax generate` on a Hugging Face folder: text, JSON, chat, infilling, several prompts, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llamax import export_hf
from llamax.cli import app
from llamax.errors import UserError
from llamax.generate.engine import Engine
from llamax.generate.sampling import GREEDY
from llamax.generate.text import generate_text
from llamax.generating import generate_from_cli
from llamax.text.tokenizers import ByteTokenizer
from tests.model.modules import small_model
from tests.text import made

OPTIONS: dict[str, Any] = {
    "max_new_tokens": 12,
    "sampling": {"temperature": 0.0},
    "seed": 0,
    "stops": [],
    "chat": False,
    "system": None,
    "infill": None,
    "compute": "float32",
    "mesh": [],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 500 rows with Code Llama's kind of tokenizer and a chat template."""
    where = tmp_path_factory.mktemp("model") / "hf"
    model = small_model(vocab_size=500, max_seq_len=128)
    export_hf(model, model.config, where)
    return made.folder_of(
        where,
        tokenizer_model=made.sentencepiece_model(),
        tokenizer_config_json={"bos_token": "<s>"},
        chat_template_jinja="{{ bos_token }}[{{ messages[-1].content }}]",
    )


def test_json_and_terminal_say_the_same(folder: Path) -> None:
    arguments = ["generate", str(folder), "def f", "--max-new-tokens", "12", "--temperature", "0"]
    machine = CliRunner().invoke(app, [*arguments, "--json"])
    assert machine.exit_code == 0, machine.output
    found = json.loads(machine.stdout)
    person = CliRunner().invoke(app, arguments)
    assert person.stdout == found["text"] + "\n"
    assert "tokens_per_second" in person.stderr
    assert len(found["ids"]) == found["timings"]["new_tokens"] == 12
    assert found["timings"]["prefill_seconds"] > 0
    assert found["timings"]["seconds_per_token"] > 0
    assert "decode seconds / steps" in found["timings"]["rule"]
    assert found["outputs"][0]["prompt_tokens"] == found["timings"]["prompt_tokens"]


def test_prompts_chat_and_infill(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("another prompt, longer than the first")
    two = generate_from_cli(folder, ["x"], [tmp_path / "p.txt"], **OPTIONS)
    alone = generate_from_cli(folder, ["another prompt, longer than the first"], [], **OPTIONS)
    assert two["outputs"][1]["ids"] == alone["ids"] != two["ids"]
    said = generate_from_cli(folder, ["hi"], [], **OPTIONS | {"chat": True})
    listed = [{"role": "user", "content": "a"}, {"role": "user", "content": "hi"}]
    assert generate_from_cli(folder, [json.dumps(listed)], [], **OPTIONS | {"chat": True})["ids"] == said["ids"]
    filled = [generate_from_cli(folder, ["a<FILL_ME>b"], [], **OPTIONS | {"infill": kind}) for kind in ("psm", "spm")]
    assert filled[0]["timings"]["prompt_tokens"] == filled[1]["timings"]["prompt_tokens"] >= 6
    assert filled[0]["ids"] != filled[1]["ids"]


REFUSED = [
    ({"chat": True, "infill": "psm"}, "x", "--chat and --infill"),
    ({"infill": "sideways"}, "x", "--infill sideways: give psm"),
    ({"infill": "psm"}, "no hole", "the prompt has 0 <FILL_ME>"),
    ({"sampling": {"top_p": 2.0}}, "x", "top_p=2.0: give more than 0"),
    ({"compute": "int4"}, "x", "--compute int4"),
    ({"mesh": ["tensor"]}, "x", "--mesh tensor: give an axis"),
    ({"mesh": ["stage=2"]}, "x", "--mesh stage=2: sequences and layers are cut for training alone"),
    ({"max_new_tokens": 0}, "x", "max_new_tokens=0"),
]


@pytest.mark.parametrize(("options", "prompt", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_refused(folder: Path, options: dict[str, Any], prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate_from_cli(folder, [prompt], [], **OPTIONS | options)


def test_folders_without_text(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prompt; give one"):
        generate_from_cli(folder, [], [], **OPTIONS)
    model = small_model(vocab_size=100, max_seq_len=128)
    export_hf(model, model.config, tmp_path / "bare")
    with pytest.raises(UserError, match="no tokenizer; a model's folder holds"):
        generate_from_cli(tmp_path / "bare", ["x"], [], **OPTIONS)
    made.folder_of(tmp_path / "bare", tokenizer_model=made.sentencepiece_model())
    with pytest.raises(UserError, match=r"500 .*100 rows"):
        generate_from_cli(tmp_path / "bare", ["x"], [], **OPTIONS)


def test_stop_strings_and_streams() -> None:
    """Greedy text cut before a string that spans tokens, streamed in pieces that join to it."""
    engine, tokenizer = Engine(small_model(vocab_size=256, max_seq_len=128)), ByteTokenizer()
    prompts = [tokenizer.encode("abc"), tokenizer.encode("q")]
    free, _ = generate_text(engine, tokenizer, prompts, [GREEDY] * 2, [0, 0], 40)
    stop = free[0].text[7:10]
    streamed = ["", ""]

    def on_text(row: int, text: str) -> None:
        streamed[row] += text

    cut, _ = generate_text(engine, tokenizer, prompts, [GREEDY] * 2, [0, 0], 40, stops=[stop], on_text=on_text)
    assert cut[0].text == free[0].text[: free[0].text.index(stop)] == streamed[0]
    assert cut[0].finish == "stop"
    assert cut[0].ids == free[0].ids[: len(cut[0].ids)]
    assert len(cut[0].ids) < 40
    assert streamed[1] == cut[1].text
    end = free[1].ids[5]
    ended, _ = generate_text(engine, tokenizer, prompts, [GREEDY] * 2, [0, 0], 40, stop_ids=[end])
    assert ended[1].finish == "end"
    assert ended[1].ids == free[1].ids[: free[1].ids.index(end) + 1]
    assert free[0].finish == "length"
    assert len(free[0].ids) == 40
