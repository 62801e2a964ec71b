"""What rank files leave out: the pattern that cuts text and the special tokens, as tables with their sources."""

from __future__ import annotations

from typing import NamedTuple


class Scheme(NamedTuple):
    """How a file of `ranks` byte sequences is used. Special tokens take the ids behind them, in order; `stops` end a
    turn or a text."""

    name: str
    ranks: int
    pattern: str
    specials: tuple[str, ...]
    bos: str
    eos: str
    stops: tuple[str, ...]


def _numbered(name: str, count: int, first: int = 0) -> tuple[str, ...]:
    return tuple(f"<|{name}_{i}|>" for i in range(first, first + count))


# Source: meta-llama/llama-models, models/llama3/tokenizer.py (Llama 3 to 3.3; one file for all).
LLAMA3 = Scheme(
    name="llama3",
    ranks=128_000,
    pattern=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    specials=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *_numbered("reserved_special_token", 2),
        "<|finetune_right_pad_id|>",
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|image|>",
        *_numbered("reserved_special_token", 244, first=2),
    ),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
    stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
)

# Source: meta-llama/llama-models, models/llama4/tokenizer.py.
LLAMA4 = Scheme(
    name="llama4",
    ranks=200_000,
    pattern=(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    specials=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
        "<|header_start|>",
        "<|header_end|>",
        "<|eom|>",
        "<|eot|>",
        "<|step|>",
        *_numbered("text_post_train_reserved_special_token", 6),
        "<|python_start|>",
        "<|python_end|>",
        "<|finetune_right_pad|>",
        *_numbered("text_post_train_reserved_special_token", 61, first=8),
        "<|image_start|>",
        "<|image_end|>",
        *_numbered("vision_reserved_special_token", 2),
        "<|tile_x_separator|>",
        "<|tile_y_separator|>",
        *_numbered("vision_reserved_special_token", 4, first=2),
        "<|image|>",
        "<|vision_reserved_special_token_6|>",
        "<|patch|>",
        *_numbered("vision_reserved_special_token", 1041, first=7),
        *_numbered("reasoning_reserved_special_token", 8),
        "<|reasoning_thinking_start|>",
        "<|reasoning_thinking_end|>",
        *_numbered("reserved_special_token", 904),
    ),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
    stops=("<|end_of_text|>", "<|eom|>", "<|eot|>"),
)

SCHEMES = (LLAMA3, LLAMA4)

# Tekken files up to version 7 name no special tokens; these come first, then <SPECIAL_20> and so on.
# Source: mistralai/mistral-common, tokens/tokenizers/tekken.py.
TEKKEN_SPECIALS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
