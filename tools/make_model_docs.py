"""Writes docs/models.md from the cards under configs/models/ and tools/checked.yaml.

    python tools/make_model_docs.py     after a change of a card, of a count or of what the tests check

A test compares the file with what this script makes of the cards now.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from llamax.accounting import list_models
from llamax.config.cards import card_of, read_card
from llamax.config.files import read_yaml, shipped
from llamax.config.load import load_model

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "models.md"
CHECKED = ROOT / "tools" / "checked.yaml"

INTRO = """# Models

Made by `python tools/make_model_docs.py` from the cards under `configs/models/`; do not edit it here.
`llamax model list` prints the counts, `llamax model show NAME` everything known of one model, where NAME is the name or
the hub id in any case.

- *total*: every stored parameter, a tied table once, the vision side of a multimodal checkpoint included; what llamax
  builds of those is the text stack. Router biases and multi-token prediction modules are not in it.
- *active*: what one token passes through. *N*: the same without an input table that is only looked up.
- *KV*: bytes a token appends to the cache in bfloat16, all layers, while no window is full; index keys apart.
- *open*: open-source under a licence the OSI approves; open-weight under other terms, in a line under the family.

What was checked:

- `count`: equal to the exact total in the hub's metadata, less what that counts twice or beside the weights (buffers,
  fp8 scales, a tied head, the prediction module); `count (recalled)`: to an exact total remembered before counting;
  `count (rounded)`: to a published figure of two or three digits; `count (own)`: compared with nothing published.
- `config`: equal, layer by layer, to what `llamax model import` reads from the published config.
"""
FIXTURE_NOTE = "- {names}: on a tiny random checkpoint of the same architecture, not on the released weights.\n"
FIELDS = {
    "restrictions": "Restrictions",
    "new": "New",
    "tokenizer": "Tokenizer",
    "not_built": "Not built",
    "disagreement": "Sources disagree",
    "unverified": "Unverified",
}


def model_docs() -> str:
    """The whole page."""
    checked = read_yaml(CHECKED)
    rows = [row | {"checked": _checked(row, checked)} for row in list_models() if row["name"].split("/")[0] in FAMILIES]
    names = [check["name"] for check in checked["checks"]]
    note = FIXTURE_NOTE.format(names=", ".join(f"`{name}`" for name in names)) if names else ""
    parts = [INTRO + note, _summary(rows)]
    parts += [_family(family, [row for row in rows if row["family"] == family]) for family in FAMILIES]
    return "\n".join(parts)


def _summary(rows: list[dict[str, Any]]) -> str:
    lines = ["## Families", "", *_head("family", "licence", "open", "date", "sizes", "parameters", "checked")]
    for family in FAMILIES:
        own = [row for row in rows if row["family"] == family]
        released = [row for row in own if row["open"] != "unreleased"]
        cells = [
            f"[{family}](#{_anchor(family)})",
            "; ".join(dict.fromkeys(row["licence"] for row in released)),
            "; ".join(dict.fromkeys(row["open"] for row in released)),
            min(row["date"] for row in own),
            ", ".join(row["name"].split("/")[1] for row in own),
            _span([row["params_total"] for row in own if row["params_total"]]),
            "; ".join(dict.fromkeys(row["checked"] for row in own)),
        ]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _family(family: str, rows: list[dict[str, Any]]) -> str:
    card = read_card(family)["card"]
    paper = card["paper"]
    link = f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})" if paper else "no paper"
    lines = [f"## {family}", "", f"{card['title']}. {card['licence']} ({card['open']}), {card['date']}, {link}.", ""]
    lines += [f"- {title}: {card[key]}." for key, title in FIELDS.items() if card.get(key)]
    for row in rows:
        own = read_card(family)["sizes"][row["name"].split("/")[1]].get("card", {})
        said = [f"{key}: {own[key]}" for key in ("title", "licence", "open", "paper") if own.get(key)]
        said += [f"{title.lower()}: {own[key]}" for key, title in FIELDS.items() if own.get(key)]
        if said:
            lines.append(f"- `{row['name']}`: {'; '.join(said)}.")
        if announced := card_of(family, row["name"].split("/")[1])["announced"]:
            lines.append(f"- `{row['name']}`: {announced}.")
    head = ("name", "hub id", "total", "active", "N", "KV", "context", "checked")
    lines += ["", *_head(*head, right=range(2, 7))]
    lines += [_row(_size_cells(row)) for row in rows]
    return "\n".join(lines) + "\n"


def _size_cells(row: dict[str, Any]) -> list[str]:
    numbers = [row[key] for key in ("params_total", "params_active", "params_active_excl_embed", "kv_bytes_per_token")]
    numbers.append(load_model(row["name"]).max_seq_len if row["params_total"] else None)
    hub = f"[{row['hub_id']}](https://huggingface.co/{row['hub_id']})" if row["hub_id"] else "none"
    counts = ["-" if number is None else f"{number:,}" for number in numbers]
    return [f"`{row['name']}`", hub, *counts, row["checked"]]


def _checked(row: dict[str, Any], checked: dict[str, Any]) -> str:
    """The checks of one size, in words."""
    name = row["name"]
    if row["params_total"] is None:
        return "nothing to check"
    known = [how for how, names in checked["counts"].items() if name in names]
    found = [f"count ({known[0]})" if known else "count"]
    found += [] if name in checked["no_config"] else ["config"]
    dialect = load_model(name).dialect
    folder = ROOT / checked["fixtures"] / str(dialect)
    for check in checked["checks"]:
        _must_exist(check["test"])
        if dialect and folder.is_dir() and dialect not in check.get("not", []):
            found.append(check["name"])
    return ", ".join(found)


def _must_exist(test: str) -> None:
    file, _, function = test.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    if function not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
        raise SystemExit(f"{CHECKED}: {test} does not exist; name a test that does")


def _head(*names: str, right: range = range(0)) -> list[str]:
    return [_row(list(names)), "|" + "|".join("---:" if i in right else "---" for i in range(len(names))) + "|"]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _span(counts: list[int]) -> str:
    ends = [f"{count / 1e9:.3g}B" for count in (min(counts), max(counts))]
    return " to ".join(dict.fromkeys(ends))


def _anchor(heading: str) -> str:
    return "".join(c for c in heading.lower() if c.isalnum() or c in "-_")


FAMILIES = list(shipped("models"))


def main() -> None:
    """Replaces the page."""
    DOCS.write_text(model_docs(), encoding="utf-8")
    print(f"wrote {DOCS}")


if __name__ == "__main__":
    main()
