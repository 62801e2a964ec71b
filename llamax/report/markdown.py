"""report.md: the report in words and tables, for a terminal or a pull request. The figures are in report.html."""

from __future__ import annotations

import re

from llamax.report.blocks import Block, Bullets, Figures, Grid, Section, Tiles, Words


def to_markdown(name: str, parts: tuple[Section, ...]) -> str:
    """GitHub-flavoured Markdown; text that comes from data can neither start markup nor break a table."""
    lines = [f"# Scaling study: {_plain(name)}"]
    for part in parts:
        lines += ["", f"## {_plain(part.title)}", ""]
        for block in part.blocks:
            lines += [*_block(block), ""]
        lines.pop()
    return "\n".join(lines) + "\n"


def _block(block: Block) -> list[str]:
    if isinstance(block, Words):
        return [_plain(block.text)]
    if isinstance(block, Bullets):
        return [f"- {_plain(item)}" for item in block.items]
    if isinstance(block, Tiles):
        return _rows(("", "", ""), [(t.label, t.value, t.note) for t in block.tiles], 3)
    if isinstance(block, Figures):
        return [f"- Figure (in report.html): {_plain(picture.caption)}" for picture in block.pictures]
    return _grid(block)


def _grid(grid: Grid) -> list[str]:
    return _rows(grid.columns, list(grid.rows), grid.text)


def _rows(columns: tuple[str, ...], rows: list[tuple[str, ...]], text: int) -> list[str]:
    def line(values: tuple[str, ...]) -> str:
        return "| " + " | ".join(_plain(value) for value in values) + " |"

    rule = "|" + "|".join(" --- " if i < text else " ---: " for i in range(len(columns))) + "|"
    return [line(columns), rule, *(line(row) for row in rows)]


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
