"""Chat templates: a conversation as the text its model was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamax.errors import UserError
from llamax.text.open import read_json, token_name

Message = Mapping[str, Any]
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """A jinja2 template with the special tokens it may name.

    Raises:
        UserError: not a template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None, where: str = "chat template"):
        import jinja2

        from llamax.text.sandbox import Sandbox

        self.where, self.tokens = where, dict(tokens or {})
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise UserError(f"{where}: not a jinja2 template ({_short(error)}); fetch it again") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **fields: Any,
    ) -> str:
        """The conversation as text, special tokens spelled out; `add_generation_prompt` ends it where an answer begins.

        `tools` are JSON schemas; `fields` are what else the template reads (`enable_thinking=False`).

        Raises:
            UserError: the template refuses the messages, fails, or tries what it may not.
        """
        import jinja2

        self._sandbox.begin()
        # Copies of plain data: nothing of the caller's is within a template's reach.
        given = {"messages": _plain(messages), "tools": _plain(tools), **self.tokens, **_plain(fields)}
        given |= {"documents": given.get("documents"), "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(**given)
        except jinja2.exceptions.SecurityError as error:
            raise UserError(
                f"{self.where}: the chat template tries what it may not ({_short(error)}); do not use it"
            ) from None
        except (RecursionError, MemoryError, OverflowError) as error:
            raise UserError(
                f"{self.where}: the chat template does not end ({type(error).__name__}); do not use it"
            ) from None
        except Exception as error:  # a template's expressions raise whatever Python raises
            raise UserError(f"{self.where}: the chat template refuses these messages ({_short(error)})") from None


def open_chat_template(folder: Path | str, *, tools: bool = False) -> ChatTemplate:
    """The chat template of a model's folder: `chat_template.jinja`, else that of `tokenizer_config.json` or
    `chat_template.json`. Of several by name it is `tool_use` where `tools` are given and it exists, else `default`.

    Raises:
        UserError: the folder has none, as base models do.
    """
    folder = Path(folder)
    config = read_json(folder / "tokenizer_config.json")
    where = folder / "chat_template.jinja"
    try:
        source: Any = where.read_text(encoding="utf-8")
    except FileNotFoundError:
        where = folder / ("tokenizer_config.json" if "chat_template" in config else "chat_template.json")
        source = read_json(where).get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {error}; make it readable UTF-8 text") from None
    if isinstance(source, list):
        source = _named(source, tools, where)
    if not isinstance(source, str):
        raise UserError(
            f"{folder}: no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
            "a base model has none: leave --chat away, or use the instruction-tuned model's folder"
        )
    names = {**read_json(folder / "special_tokens_map.json"), **config}
    tokens = {name: text for name in TOKENS if (text := token_name(names.get(name))) is not None}
    return ChatTemplate(source, tokens, str(where))


def _named(listed: list[Any], tools: bool, where: Path) -> Any:
    named = {t["name"]: t["template"] for t in listed if isinstance(t, dict) and {"name", "template"} <= set(t)}
    if tools and "tool_use" in named:
        return named["tool_use"]
    if "default" not in named:
        raise UserError(f"{where}: chat templates {', '.join(named) or 'without names'}, none of them `default`")
    return named["default"]


def _plain(value: Any) -> Any:
    """JSON data, copied; anything else is an error of the caller."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    raise TypeError(f"a chat holds JSON data, not {type(value).__name__}")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
