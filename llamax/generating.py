"""`llamax generate`: from a folder and prompts to text on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamax.console import AtHand, Json, lines, print_json
from llamax.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Mesh

    from llamax.text.tokenizers import Tokenizer

HOLE = "<FILL_ME>"  # where an infilling prompt is to be filled, as transformers spells it


def generate(
    folder: Annotated[Path, AtHand(metavar="RUN", help="A run directory or a Hugging Face folder.")],
    prompt: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="One or more prompts.")] = None,
    prompt_file: Annotated[list[Path] | None, typer.Option(help="A file that is a prompt; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to draw at most, for every prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this probability.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens under this share of the likeliest one's probability.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the first prompt; the next has the next.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are what a user says, or JSON lists of messages.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="The system message of --chat.")] = None,
    infill: Annotated[str | None, typer.Option(help=f"Fill the {HOLE} in the prompt: psm or spm (Code Llama).")] = None,
    compute: Annotated[str, typer.Option(help="Number format of products and cache: float32 or bfloat16.")] = "float32",
    mesh: Annotated[list[str] | None, typer.Option(help="Devices along an axis, as tensor=2; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Continue text with a trained model; text on stdout as it comes, speed on stderr."""
    texts = [_text(part) for part in prompt or []]
    alone = len(texts) + len(prompt_file or []) == 1
    result = generate_from_cli(
        folder,
        texts,
        prompt_file or [],
        max_new_tokens=max_new_tokens,
        sampling={"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p},
        seed=seed,
        stops=stop or [],
        chat=chat,
        system=system,
        infill=infill,
        compute=compute,
        mesh=mesh or [],
        on_text=print_text if alone and not as_json else None,
    )
    if as_json:
        print_json(result)
        return
    for number, output in enumerate(result["outputs"]):
        print("" if alone else f"--- {number}\n{output['text']}")
    for line in lines(result["timings"]):
        print(line, file=sys.stderr)


def generate_from_cli(
    folder: Path,
    prompts: list[str],
    files: list[Path],
    *,
    max_new_tokens: int,
    sampling: dict[str, Any],
    seed: int,
    stops: list[str],
    chat: bool,
    system: str | None,
    infill: str | None,
    compute: str,
    mesh: list[str],
    on_text: Callable[[int, str], None] | None = None,
) -> dict[str, Any]:
    """The outputs of a run directory's or a Hugging Face folder's model, with speeds.

    Raises:
        UserError: options that contradict each other, no prompt, or a folder without model or tokenizer.
    """
    texts = [*prompts, *(_read(path) for path in files)]
    if not texts:
        raise UserError("no prompt; give one as an argument or with --prompt-file")
    if chat and infill:
        raise UserError("--chat and --infill: a prompt is one or the other; drop one")
    if infill not in (None, "psm", "spm"):
        raise UserError(f"--infill {infill}: give psm (prefix first) or spm (suffix first)")
    if compute not in ("float32", "bfloat16"):
        raise UserError(f"--compute {compute}: give float32 or bfloat16")
    import llamax
    from llamax.generate.engine import Engine
    from llamax.generate.sampling import Sampling
    from llamax.generate.text import generate_text, speed
    from llamax.mesh.start import start
    from llamax.model.execution import Execution
    from llamax.text.open import stop_ids
    from llamax.text.tokenizers import check_vocabulary

    wanted = Sampling(**sampling).check()
    start()
    model, config = llamax.load(folder)
    tokenizer, place = tokenizer_of(folder, config), text_folder(folder) or folder
    check_vocabulary(tokenizer, model.config.vocab_size, str(folder))
    ids = [_prompt(place, tokenizer, text, chat, system, infill) for text in texts]
    ends = set(stop_ids(place, tokenizer))
    if infill:
        from llamax.text.infill import infill_end

        ends.add(infill_end(tokenizer))
    execution = Execution(compute, compute)  # type: ignore[arg-type]
    engine = Engine(model, _mesh(mesh), execution=execution)
    seeds = [seed + number for number in range(len(ids))]
    outputs, timings = generate_text(
        engine,
        tokenizer,
        ids,
        [wanted] * len(ids),
        seeds,
        max_new_tokens,
        stop_ids=sorted(ends),
        stops=stops,
        on_text=on_text,
    )
    listed = [output._asdict() for output in outputs]
    return {
        "text": outputs[0].text,
        "ids": outputs[0].ids,
        "outputs": listed,
        "sampling": wanted._asdict(),
        "seeds": seeds,
        "timings": speed(outputs, timings),
    }


def text_folder(folder: Path) -> Path | None:
    """Where a model's tokenizer files are: beside its weights, or in the `tokenizer` folder an import makes."""
    from llamax.text.open import FILES
    from llamax.train.run_dir import TOKENIZER

    places = (folder, folder / TOKENIZER)
    return next((place for place in places if any((place / name).exists() for name in FILES[:3])), None)


def tokenizer_of(folder: Path, config: Any) -> Tokenizer:
    """The tokenizer of a model's folder; a trained run has that of its data.

    Raises:
        UserError: there is none, or a damaged one.
    """
    from llamax.text.open import open_tokenizer
    from llamax.text.tokenizers import ByteTokenizer
    from llamax.train.run_dir import is_run

    if (place := text_folder(folder)) is not None:
        return open_tokenizer(place)
    if not is_run(folder):
        return open_tokenizer(folder)  # which says what is missing
    if config.data.store is None and config.data.tokenizer.kind == "bytes":
        return ByteTokenizer()
    from llamax.data.open import open_data

    return open_data(config.data).tokenizer


def _prompt(
    folder: Path, tokenizer: Tokenizer, text: str, chat: bool, system: str | None, infill: str | None
) -> np.ndarray:
    """The ids of one prompt."""
    if chat:
        from llamax.text.chat import open_chat_template

        rendered = open_chat_template(folder).render(_messages(text, system))
        return tokenizer.encode(rendered, specials=True)
    if infill:
        from llamax.text.infill import infill_ids

        prefix, hole, suffix = text.partition(HOLE)
        if not hole or HOLE in suffix:
            raise UserError(f"--infill: the prompt has {text.count(HOLE)} {HOLE}; put one where the text is missing")
        return infill_ids(tokenizer, prefix, suffix, infill)  # type: ignore[arg-type]
    import numpy as np

    ids = tokenizer.encode(text, bos=True)
    # Without a begin-of-text token a text starts where the document before it ended.
    return ids if len(ids) else np.array([tokenizer.eos_id], np.int32)


def _messages(text: str, system: str | None) -> Sequence[dict[str, Any]]:
    """A conversation: a JSON list of messages as it is, other text as what a user says."""
    messages: Any = None
    if text.lstrip().startswith("["):
        try:
            messages = json.loads(text)
        except ValueError:
            messages = None
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)):
        messages = [{"role": "user", "content": text}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _mesh(settings: list[str]) -> Mesh | None:
    """The mesh of `tensor=2` and the like; None where none is asked for."""
    if not settings:
        return None
    from llamax.config.load import validate
    from llamax.config.mesh import MeshConfig
    from llamax.mesh.rules import make_mesh

    sizes: dict[str, Any] = {"data": 1}
    for setting in settings:
        axis, _, size = setting.partition("=")
        if not size.lstrip("-").isdigit():
            raise UserError(f"--mesh {setting}: give an axis and its size, as tensor=2")
        sizes[axis] = int(size)
    if wrong := [f"{axis}={size}" for axis, size in sizes.items() if axis in ("context", "stage") and size != 1]:
        raise UserError(f"--mesh {wrong[0]}: sequences and layers are cut for training alone; use tensor, data or fsdp")
    return make_mesh(validate(MeshConfig, sizes, "--mesh"))


def _text(argument: str) -> str:
    """An argument of the command line as text: bytes that are none become U+FFFD."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file {path}: not UTF-8 text; save it as UTF-8") from None


def print_text(row: int, text: str) -> None:
    """Text on the terminal as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()
