"""Text in, text out: the engine with a tokenizer and streams around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from llamax.generate.engine import NOTHING, Engine, Timings
from llamax.generate.sampling import Sampling
from llamax.text.stream import TextStream
from llamax.text.tokenizers import Tokenizer


class Output(NamedTuple):
    """One continuation. `ids` end with the token that ended it; `finish` says what did: an end-of-text token, a stop
    string (which `text` is cut before), or the number of tokens."""

    text: str
    ids: list[int]
    finish: Literal["end", "stop", "length"]
    prompt_tokens: int


def generate_text(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    samplings: Sequence[Sampling],
    seeds: Sequence[int],
    max_new_tokens: int,
    *,
    stop_ids: Sequence[int] = (),
    stops: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> tuple[list[Output], Timings]:
    """The continuation of every prompt (ids), in the order given; `on_text(prompt, text)` gets text as it is certain.

    A stop string is found wherever it appears in the text, across tokens.

    Raises:
        UserError: as `Engine.run`.
    """
    streams = [TextStream(tokenizer, prompt, stops) for prompt in prompts]
    ids: list[list[int]] = [[] for _ in prompts]

    def told(row: int, text: str) -> None:
        if text and on_text is not None:
            on_text(row, text)

    def watch(tokens: np.ndarray) -> np.ndarray:
        for row, stream in enumerate(streams):
            for i in tokens[row][tokens[row] != NOTHING].tolist():
                if stream.stopped:
                    break
                ids[row].append(i)
                if i not in stop_ids:
                    told(row, stream.push(i))
        return np.array([stream.stopped for stream in streams])

    _, timings = engine.run(prompts, samplings, seeds, max_new_tokens, stop_ids, watch)
    outputs = []
    for row, (stream, own) in enumerate(zip(streams, ids, strict=True)):
        told(row, stream.finish())
        finish: Literal["end", "stop", "length"] = "length"
        if stream.stopped:
            finish = "stop"
        elif own and own[-1] in stop_ids:
            finish = "end"
        outputs.append(Output(stream.text, own, finish, len(prompts[row])))
    return outputs, timings


def speed(outputs: Sequence[Output], timings: Timings) -> dict[str, float | int | str]:
    """Speeds with the rule behind them."""
    prompt, new = sum(o.prompt_tokens for o in outputs), sum(len(o.ids) for o in outputs)
    later = new - len(outputs)
    return {
        "prompt_tokens": prompt,
        "new_tokens": new,
        "compile_seconds": timings.compile,
        "prefill_seconds": timings.prefill,
        "prefill_tokens_per_second": prompt / timings.prefill,
        "decode_seconds": timings.decode,
        "seconds_per_token": timings.decode / timings.steps if timings.steps else 0.0,
        "tokens_per_second": later / timings.decode if later and timings.decode else 0.0,
        "rule": (
            "prefill: until every row has its first token; seconds_per_token: decode seconds / steps of the batch; "
            "tokens_per_second: tokens after the first of every row / decode seconds; compilation apart"
        ),
    }
