"""Tokenizers give back the text they were given."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llamax.config.run import HuggingFace, SentencePiece
from llamax.errors import UserError
from llamax.text import sentence
from llamax.text.open import load_tokenizer
from llamax.text.sentence import SentencePieceTokenizer, train_sentencepiece
from llamax.text.tokenizers import ByteTokenizer
from tests.data.corpora import text

anything = st.text(st.characters(exclude_categories=["Cs"]))
without_nul = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
codelike = st.text(st.sampled_from(" \t\n\r\u2581\u3000ab_().<>/sk0é漢🙂"))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_sentencepiece([text(i, 300) for i in range(20)], 320, request.param))


@given(anything)
def test_bytes_round_trip(content: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(content)
    assert ids.tolist() == list(content.encode("utf-8"))
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == content
    assert tokenizer.decode([*ids.tolist(), tokenizer.eos_id]) == content


def test_bytes_decode_a_cut_character_and_refuse_other_ids() -> None:
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"
    with pytest.raises(ValueError, match="256"):
        ByteTokenizer().decode([256])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(without_nul | codelike)
@example("  leading,  double,\ttab \r\n trailing  ")
@example("\u2581 the piece for a space, itself \u2581\u2581")
@example("</s><unk><0x41>")
def test_sentencepiece_round_trip(trained: SentencePieceTokenizer, content: str) -> None:
    ids = trained.encode(content)
    assert trained.decode(ids) == content
    assert trained.eos_id not in ids
    assert trained.decode(np.append(ids, trained.eos_id)) == content
    assert not len(ids) or ids.max() < trained.vocab_size == 320


def _library(text: str, **how: Any) -> bytes:
    """A model as others train them: SentencePiece's own defaults but for `how`."""
    import sentencepiece

    model = io.BytesIO()
    options = {"vocab_size": 500, "model_type": "bpe", "byte_fallback": True, "minloglevel": 4} | how
    lines = iter(text.splitlines())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options)
    return model.getvalue()


LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
MODELS = {
    "own": lambda text: train_sentencepiece([text], 500, "bpe"),
    "llama": lambda text: _library(text, **LLAMA),
    "defaults": lambda text: _library(text),
    "suffix": lambda text: _library(text, **LLAMA, treat_whitespace_as_suffix=True),
    "across words": lambda text: _library(text, **LLAMA, split_by_whitespace=False),
    "unigram": lambda text: train_sentencepiece([text], 500, "unigram"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_sentencepiece_in_chunks_is_the_library_on_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sentencepiece

    sample = Path(__file__).read_text()
    model = MODELS[kind](sample)
    monkeypatch.setattr(sentence, "CHUNK", 7)
    ours, library = SentencePieceTokenizer(model), sentencepiece.SentencePieceProcessor(model_proto=model)
    assert ours._cuts == (kind in ("own", "llama"))
    rng = np.random.default_rng(0)
    pieces = [*sample.split(" ")[:200], "  ", "    ", "\n\t", "é", "\u0301 ", "日本", "x" * 30]
    for _ in range(50):
        text = " ".join(rng.choice(pieces, 40))
        assert ours.encode(text).tolist() == library.encode(text)
    assert ours.encode(sample).tolist() == library.encode(sample)


def test_sentencepiece_training_is_deterministic_and_compresses() -> None:
    chunks = [text(i, 300) for i in range(20)]
    for kind in ("bpe", "unigram"):
        model = train_sentencepiece(chunks, 320, kind)
        assert model == train_sentencepiece(chunks, 320, kind)
        assert len(SentencePieceTokenizer(model).encode(chunks[0])) < 0.75 * len(chunks[0].encode())


def test_sentencepiece_training_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    train_sentencepiece([text(1, 600)], 300, "bpe")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [100, 100_000])
def test_sentencepiece_size_the_text_does_not_support(size: int) -> None:
    with pytest.raises(UserError, match=rf"tokenizer.vocab_size={size}: "):
        train_sentencepiece([text(1)], size, "bpe")


def test_spec_reloads(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    for name, data in trained.files().items():
        (tmp_path / name).write_bytes(data)
    again = load_tokenizer(json.loads(json.dumps(trained.spec())), tmp_path)
    assert again.encode(text(3)).tolist() == trained.encode(text(3)).tolist()
    assert (again.vocab_size, again.eos_id) == (trained.vocab_size, trained.eos_id)
    assert load_tokenizer(ByteTokenizer().spec()).vocab_size == 256
    by_path = load_tokenizer(SentencePiece(path=str(tmp_path / "tokenizer.model")))
    assert by_path.encode("def x").tolist() == trained.encode("def x").tolist()


def hugging_face(folder: Path, eos: str) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[eos],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text(i, 300) for i in range(10)], trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_hugging_face_round_trips_and_leaves_special_tokens_in_text_alone(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(HuggingFace(path=str(hugging_face(tmp_path, "</s>"))))
    for content in (text(50), "a</s>b", "  é🙂\r\n"):
        ids = tokenizer.encode(content)
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(np.append(ids, tokenizer.eos_id)) == content
    for name, data in tokenizer.files().items():
        (tmp_path / f"copy-{name}").write_bytes(data)
    again = load_tokenizer({**tokenizer.spec(), "file": "copy-tokenizer.json"}, tmp_path)
    assert again.eos_id == tokenizer.eos_id


def test_hugging_face_end_of_text(tmp_path: Path) -> None:
    path = hugging_face(tmp_path, "<fin>")
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(HuggingFace(path=str(path)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<fin>"}}))
    assert load_tokenizer(HuggingFace(path=str(path))).eos_id == 0


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_files_that_are_missing_or_something_else(tmp_path: Path, kind: str) -> None:
    config = {"sentencepiece": SentencePiece, "huggingface": HuggingFace}[kind](path=str(tmp_path / "t"))
    with pytest.raises(UserError, match=r"/t: No such file"):
        load_tokenizer(config)
    (tmp_path / "t").write_bytes(b"not a tokenizer")
    with pytest.raises(UserError, match=r"/t: not a "):
        load_tokenizer(config)


def test_sentencepiece_without_a_path_is_trained_with_the_store() -> None:
    with pytest.raises(UserError, match=r"tokenizer.path is null"):
        load_tokenizer(SentencePiece())


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"llamax\[tokenizers\]"):
        load_tokenizer(HuggingFace(path=str(tmp_path / "tokenizer.json")))
