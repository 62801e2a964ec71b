"""Chat templates render as their authors expect, and cannot do anything else."""

from __future__ import annotations

import itertools
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from llamax.errors import UserError
from llamax.text.chat import ChatTemplate, open_chat_template
from tests.text import made
from tests.text.templates import CHATS, TEMPLATES, TOKENS, TOOLS

EXPECTED = {
    ("llama3", "system"): (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    ("mistral", "turns"): (
        "<s>[INST]Wie heißt du? 🙂[/INST]<think>\nhm\n</think>\n\nLlama.</s>[INST]Be brief.\n\nWhy {{ 1 + 1 }}?[/INST]"
    ),
    ("qwen", "turns"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWie heißt du? 🙂<|im_end|>\n"
        "<|im_start|>assistant\nLlama.<|im_end|>\n<|im_start|>user\nWhy {{ 1 + 1 }}?<|im_end|>\n<|im_start|>assistant\n"
    ),
    ("gemma", "system"): "<s><start_of_turn>user\n Be brief. \n\n2+2?<end_of_turn>\n<start_of_turn>model\n",
    ("deepseek", "one"): "<s><｜User｜>Hi<｜Assistant｜>",
}


@pytest.mark.parametrize(("style", "chat"), EXPECTED, ids=str)
def test_rendered(style: str, chat: str) -> None:
    assert ChatTemplate(TEMPLATES[style], TOKENS).render(CHATS[chat]) == EXPECTED[style, chat]


def test_what_a_template_is_given() -> None:
    def render(source: str, **fields: Any) -> str:
        return ChatTemplate(source, TOKENS).render(CHATS["one"], **fields)

    assert render("{{ tools is none }} {{ documents is none }}") == "True True"
    assert render("{{ tools[0].function.name }}", tools=TOOLS) == "weather"
    assert render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert render("{{ thinking }}", thinking=True) == "True"
    assert render("{{ x | tojson }}", x={"a": "<é>"}) == '{"a": "<é>"}'
    assert render("{% for m in range(9) %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}") == "01"
    # trim_blocks and lstrip_blocks, as templates are written for.
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc\n") == "a\nb\nc"
    with pytest.raises(UserError, match="refuses these messages \\(roles must alternate\\)"):
        render("{{ raise_exception('roles must\\nalternate') }}")
    with pytest.raises(UserError, match="chat template refuses"):
        ChatTemplate(TEMPLATES["mistral"], TOKENS).render(CHATS["wrong"])


def test_where_a_template_is_found(tmp_path: Path) -> None:
    def rendered(**options: Any) -> str:
        return open_chat_template(tmp_path, **options).render(CHATS["one"])

    with pytest.raises(UserError, match="no chat template"):
        rendered()
    made.folder_of(tmp_path, chat_template_json={"chat_template": "C{{ bos_token }}"})
    assert rendered() == "C"
    made.folder_of(tmp_path, special_tokens_map_json={"bos_token": "<m>"})
    assert rendered() == "C<m>"
    several = [{"name": "default", "template": "D{{ bos_token }}"}, {"name": "tool_use", "template": "T"}]
    config = {"chat_template": several, "bos_token": {"content": "<b>"}, "eos_token": None}
    made.folder_of(tmp_path, tokenizer_config_json=config)
    assert (rendered(), rendered(tools=True)) == ("D<b>", "T")
    made.folder_of(tmp_path, chat_template_jinja="J{{ bos_token }}{{ messages[0].content }}")
    assert rendered() == "J<b>Hi"
    made.folder_of(tmp_path, chat_template_jinja=b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja"):
        rendered()


ESCAPES = [
    "{{ ''.__class__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__globals__ }}{{ strftime_now.__builtins__.eval('1') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set n = namespace() %}{% set n._x = 1 %}{{ n.__class__.__mro__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ dict.__base__ }}{{ dict.__call__.__globals__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages.clear() }}",
    "{{ ('%c' * 3 % (95, 95, 99)) | attr('x') }}{{ (messages|map(attribute='__class__')|list)[0].mro() }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_has_no_way_out(source: str) -> None:
    chat = [dict(message) for message in CHATS["one"]]
    try:
        out = ChatTemplate(source, TOKENS).render(chat)
    except UserError:
        out = ""
    assert "<class" not in out
    assert "function" not in out
    assert "builtins" not in out
    assert chat == CHATS["one"]


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{{ range(10 ** 9) }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ [1] * 1000000000 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x | replace('a', 'aa') %}{% endfor %}",
    "{% set n = namespace(x=['a', 'a']) %}{% for i in range(99) %}{% set n.x = [n.x|join('a' * 999999)] %}{% endfor %}",
    "{{ 'a'.ljust(10000000000) }}",
    "{{ 'a' | center(10000000000) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:10000000000d}'.format(1) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ messages | tojson(indent=10000000000) }}",
    "{{ lipsum(100000000) }}",
    "{{ 'a' | indent(10000000000) }}",
    "{% set n = namespace(x=[]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "{% set n = namespace(x=['a']) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "{% set n = namespace(x={}) %}{% for i in range(99) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x }}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_ends(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamax.text.sandbox.MAX_STEPS", 30_000)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"may not|does not end|refuses"):
        ChatTemplate(source).render(CHATS["one"])
    assert time.monotonic() - start < 10


def test_a_long_chat_is_not_endless() -> None:
    chat = [{"role": role, "content": "word " * 200} for _ in range(500) for role in ("user", "assistant")]
    for source in TEMPLATES.values():
        assert len(ChatTemplate(source, TOKENS).render(chat)) > 900_000


@pytest.mark.parametrize("source", ["{% if %}", "{{ 1 +", "{% nothing %}", "{{" * 5000])
def test_not_a_template(source: str) -> None:
    with pytest.raises(UserError, match="not a jinja2 template") as caught:
        ChatTemplate(source, where="x/chat_template.jinja")
    assert str(caught.value).startswith("x/chat_template.jinja: ")


@pytest.mark.parity
def test_equals_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made.folder_of(tmp_path, tokenizer_json=made.byte_level_json())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **TOKENS)
    compared = 0
    for (style, source), (_, chat) in itertools.product(TEMPLATES.items(), CHATS.items()):
        for tools, prompt, fields in ((None, True, {}), (TOOLS, False, {"enable_thinking": False})):
            options = {"tools": tools, "add_generation_prompt": prompt, **fields}
            try:
                expected = theirs.apply_chat_template(chat, chat_template=source, tokenize=False, **options)
            except Exception:
                expected = None
            try:
                ours = ChatTemplate(source, TOKENS).render(chat, **options)
            except UserError:
                ours = None
            assert ours == expected, (style, json.dumps(chat))
            compared += expected is not None
    assert compared >= 50
