"""Every dialect by its transformers model_type, and the way from a config.json to a model's config and back."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from typing import Any

from llamax.config.files import unknown
from llamax.config.load import diff, validate
from llamax.config.model import ModelConfig
from llamax.errors import UserError
from llamax.hub.dialects import deepseek, gemma, llama, others, phi
from llamax.hub.dialects.base import Dialect
from llamax.hub.dialects.reader import Hf

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for module in (llama, gemma, phi, deepseek, others)
    for dialect in module.DIALECTS
}  # fmt: skip


@dataclass(frozen=True)
class Wrapper:
    """A model of several parts whose text part is a dialect: its config, and where its tensors are.

    A tensor's name is the text model's after one of `prefixes` is replaced; every other tensor is left out.
    """

    text: str
    prefixes: dict[str, str] = field(
        default_factory=lambda: {
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
            "model.language_model.": "model.",
            "lm_head.": "lm_head.",
        }
    )

    def rename(self, name: str) -> str | None:
        """The text model's name of a tensor, None for one of another part."""
        for theirs, ours in self.prefixes.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return None


WRAPPERS = {"gemma3": Wrapper("gemma3_text"), "llama4": Wrapper("llama4_text")}
REFUSED = {
    "mllama": "its text model reads images through cross-attention layers that llamax does not have; take a text-only "
    "Llama 3.2 or the 3.1 model of the same size",
    "phi3small": "its block-sparse attention and GEGELU are not among llamax's components",
}


def read_config(data: Any, where: str) -> tuple[ModelConfig, Dialect, Wrapper | None]:
    """The model that a config.json describes, the dialect it is written in, and what wraps it if anything.

    Raises:
        UserError: no object, an unknown model_type, or a field llamax cannot express.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a JSON object; give the config.json of a transformers model")
    kind = data.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{where}: model_type is {kind!r}; give the config.json of a transformers model")
    if kind in REFUSED:
        raise UserError(f"{where}: model_type {kind!r}: {REFUSED[kind]}")
    wrapper = WRAPPERS.get(kind)
    if wrapper is not None:
        inner = data.get("text_config")
        if not isinstance(inner, dict):
            raise UserError(f"{where}: text_config is {str(inner)[:40]!r}; a {kind} model needs its text part there")
        outer = {name: data[name] for name in ("tie_word_embeddings",) if name in data}
        data, kind = {**outer, **inner}, wrapper.text
    if kind not in DIALECTS:
        raise UserError(f"{where}: {unknown('model_type', kind, [*DIALECTS, *WRAPPERS])}")
    dialect = DIALECTS[kind]
    hf = Hf(data, where, dialect.defaults)
    for name, allowed in dialect.fixed.items():
        value = hf.get(name)
        if not isinstance(value, bool | int | str | None) or value not in allowed:
            raise hf.refuse(name, value, f"llamax has only {' or '.join(map(repr, allowed))} here")
    _check_quantization(hf)
    return validate(ModelConfig, dialect.to_model(hf), where), dialect, wrapper


def _check_quantization(hf: Hf) -> None:
    found = hf.mapping("quantization_config")
    if found and (found.get("quant_method") != "fp8" or found.get("weight_block_size") is None):
        raise hf.refuse("quantization_config", found, "only fp8 with weight_block_size is read; take the bf16 weights")


def write_config(config: ModelConfig, where: str) -> tuple[dict[str, Any], Dialect]:
    """config.json data of a model, in its own dialect or the first that describes the same model.

    Raises:
        UserError: no dialect does; the message names what the nearest one could not say.
    """
    if config.dialect is not None and config.dialect not in DIALECTS:
        raise UserError(f"{where}: {unknown('model.dialect', config.dialect, list(DIALECTS))}")
    tried: list[tuple[int, str, list[str]]] = []
    for name in [config.dialect] if config.dialect else DIALECTS:
        dialect = DIALECTS[name]
        lost = inexpressible(config, dialect)
        if not lost:
            head = {"architectures": [dialect.architecture], "model_type": name}
            return head | _without_none(dialect.to_hf(config)), dialect
        tried.append((len(lost), name, lost))
    _, name, lost = min(tried)
    shown = "; ".join(lost[:4]) + (f"; and {len(lost) - 4} more" if len(lost) > 4 else "")
    if config.dialect:
        raise UserError(f"{where}: model.dialect={name} cannot express {shown}; set it to null or change the model")
    raise UserError(f"{where}: no transformers model_type expresses this model; the nearest, {name}, lacks {shown}")


def inexpressible(config: ModelConfig, dialect: Dialect) -> list[str]:
    """What of a model its config.json in `dialect` would not say: `layers.3.attention.window = 8`, ..."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = _without_none(dialect.to_hf(config)) | {"model_type": dialect.name}
            again = read_config(data, dialect.name)[0]
    except UserError as error:
        return [str(error)]
    return [f"{path} = {value!r}" for path, value, other in diff(_meaning(config), _meaning(again))
            if not _close(value, other)]  # fmt: skip


def _close(a: Any, b: Any) -> bool:
    """Floats that differ by the rounding of a formula and its inverse."""
    return isinstance(a, float) and isinstance(b, float) and abs(a - b) <= 1e-12 * abs(a)


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """What a model computes, whatever its segments are cut into."""
    layers = [layer.as_dict() for layer in config.layers]
    for layer in layers:
        attention, position = layer["attention"], layer["position"]
        if attention["kind"] != "gqa":
            continue
        if attention["qk_norm"] is None:
            attention["qk_norm_weights"], attention["qk_norm_place"] = "shared", "before"
        yarn = (position.get("scaling") or {}).get("mscale_all_dim") is not None
        if attention["scale"] == attention["head_dim"] ** -0.5 and not yarn:
            attention["scale"] = None  # the default, said aloud
    whole = {name: getattr(config, name) for name in ("vocab_size", "d_model", "max_seq_len", "mtp")}
    parts = {name: getattr(config, name).as_dict() for name in ("norm", "embedding", "head")}
    if parts["head"]["scale"] == 1.0:
        parts["head"]["scale"] = None
    kept = {"position": config.position.kind} if config.position.kind in ("learned", "sinusoidal") else {}
    return whole | parts | kept | {"layers": {str(i): layer for i, layer in enumerate(layers)}}


def _without_none(data: dict[str, Any]) -> dict[str, Any]:
    """Fields without a value, except where null says something: that a window or a cap is off."""
    off = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "q_lora_rank", "pad_token_id",
           "attention_chunk_size"}  # fmt: skip
    return {key: value for key, value in data.items() if value is not None or key in off}


def ignored(dialect: Dialect, name: str, tied: bool) -> bool:
    """Whether a tensor of a file holds nothing of the model's: a tied head's copy, a table that is computed."""
    return (tied and name == "lm_head.weight") or any(re.fullmatch(p, name) for p in dialect.ignored)
