"""Every dialect by its transformers model_type, and the way from a config.json to a model's config and back."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
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


PREFIXES = {  # of the text model's tensors in the files of a wrapper, old and new, and what ours have in their place
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}


@dataclass(frozen=True)
class Wrapper:
    """A model of several parts whose text part is a dialect: where in its config and its tensors that part is.

    adapters: the field of the text config that lists the layers which read another part, and which text alone passes
    by: without them it is the dialect's model. spare_rows: how many rows follow the vocabulary's in the embedding.
    defaults: of fields that text_config leaves out, where they are not the dialect's.
    """

    text: str
    adapters: str | None = None
    spare_rows: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def text_config(self, data: dict[str, Any], where: str) -> tuple[dict[str, Any], TextPart]:
        """The config.json data of the text model alone, and where its tensors are.

        Raises:
            UserError: no text_config, or layers to leave out that are none.
        """
        inner = data.get("text_config")
        if not isinstance(inner, dict):
            raise UserError(f"{where}: text_config is {str(inner)[:40]!r}; a {data['model_type']} model needs its text "
                            "part there")  # fmt: skip
        outer = {name: data[name] for name in ("tie_word_embeddings",) if name in data}
        text = {**self.defaults, **outer, **inner}
        if self.adapters is None:
            return text, TextPart()
        out, count = text.pop(self.adapters, []), text.get("num_hidden_layers")
        count = count if type(count) is int else 0
        known = isinstance(out, list) and all(type(i) is int and 0 <= i < count for i in out)
        if not known or len(set(out)) != len(out) or len(out) >= count:
            raise UserError(
                f"{where}: text_config.{self.adapters} = {str(out)[:80]}: give the numbers, from 0, of some of the "
                f"num_hidden_layers = {text.get('num_hidden_layers')!r} layers"
            )
        spare = {"model.embed_tokens.weight": self.spare_rows} if self.spare_rows else {}
        return {**text, "num_hidden_layers": count - len(out)}, TextPart(frozenset(out), spare)


@dataclass(frozen=True)
class TextPart:
    """The text model's tensors among those of a wrapper.

    left_out: layers of the file that the text model has not; the others close ranks. spare: how many rows at the end of
    a tensor are not its own.
    """

    left_out: frozenset[int] = frozenset()
    spare: Mapping[str, int] = field(default_factory=dict)

    def rename(self, name: str) -> str | None:
        """The text model's name of a tensor, None for one of another part."""
        start = next((start for start in PREFIXES if name.startswith(start)), None)
        if start is None:
            return None
        ours = PREFIXES[start] + name.removeprefix(start)
        layer = re.fullmatch(r"(model\.layers\.)(\d{1,6})(\..*)", ours)
        if layer is None or not self.left_out:
            return ours
        number = int(layer[2])
        if number in self.left_out:
            return None
        return f"{layer[1]}{number - sum(i < number for i in self.left_out)}{layer[3]}"


_MLLAMA = {  # transformers' MllamaTextConfig
    "vocab_size": 128256, "num_hidden_layers": 40, "intermediate_size": 14336, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
}  # fmt: skip
WRAPPERS = {
    "gemma3": Wrapper("gemma3_text"),
    "llama4": Wrapper("llama4_text"),
    "mllama": Wrapper("llama", adapters="cross_attention_layers", spare_rows=8, defaults=_MLLAMA),
}


def read_config(data: Any, where: str) -> tuple[ModelConfig, Dialect, TextPart | None]:
    """The model that a config.json describes, the dialect it is written in, and its part of a wrapper if it is one.

    Raises:
        UserError: no object, an unknown model_type, or a field llamax cannot express.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a JSON object; give the config.json of a transformers model")
    kind = data.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{where}: model_type is {kind!r}; give the config.json of a transformers model")
    part = None
    if kind in WRAPPERS:
        data, part = WRAPPERS[kind].text_config(data, where)
        kind = WRAPPERS[kind].text
    if kind not in DIALECTS:
        raise UserError(f"{where}: {unknown('model_type', kind, [*DIALECTS, *WRAPPERS])}")
    dialect = DIALECTS[kind]
    hf = Hf(data, where, dialect.defaults)
    for name, allowed in dialect.fixed.items():
        value = hf.get(name)
        if not isinstance(value, bool | int | str | None) or value not in allowed:
            raise hf.refuse(name, value, f"llamax has only {' or '.join(map(repr, allowed))} here")
    _check_quantization(hf)
    return validate(ModelConfig, dialect.to_model(hf), where), dialect, part


def _check_quantization(hf: Hf) -> None:
    found = hf.mapping("quantization_config")
    if found and (found.get("quant_method") != "fp8" or found.get("weight_block_size") is None):
        raise hf.refuse("quantization_config", found, "only fp8 with weight_block_size is read; take the bf16 weights")


def write_config(config: ModelConfig, where: str) -> tuple[dict[str, Any], Dialect]:
    """config.json data of a model, in its own dialect or the first that describes the same model.

    Raises:
        UserError: no dialect does; the message names what the nearest one could not say.
    """
    if (kind := config.parametrization.kind) != "standard":
        raise UserError(f"{where}: no transformers model_type has the multipliers of model.parametrization.kind={kind}")
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
    """Fields without a value, except where null says something: that a window, a cap or a factor is off."""
    off = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "q_lora_rank", "pad_token_id",
           "attention_chunk_size", "dense_attention_every_n_layers", "gegelu_limit", "mup_embedding_multiplier",
           "mup_width_multiplier"}  # fmt: skip
    return {key: value for key, value in data.items() if value is not None or key in off}


def ignored(dialect: Dialect, name: str, tied: bool) -> bool:
    """Whether a tensor of a file holds nothing of the model's: a tied head's copy, a table that is computed."""
    return (tied and name == "lm_head.weight") or any(re.fullmatch(p, name) for p in dialect.ignored)
