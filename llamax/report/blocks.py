"""What a report is made of: sections of a few kinds of block, neither HTML nor Markdown yet."""

from __future__ import annotations

from dataclasses import dataclass

from llamax.report.style import Picture


@dataclass(frozen=True)
class Words:
    """A paragraph; `small` for notes under a figure or table."""

    text: str
    small: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list; `alarm` when its items are warnings."""

    items: tuple[str, ...]
    alarm: bool = False


@dataclass(frozen=True)
class Tile:
    """One number to see from afar. mood: "good", "bad" or "" (neither)."""

    label: str
    value: str
    note: str
    mood: str = ""


@dataclass(frozen=True)
class Tiles:
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Grid:
    """A table; columns from `text` on are numbers, set to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: int = 1


@dataclass(frozen=True)
class Figures:
    """Figures of one row, as many beside each other as fit."""

    pictures: tuple[Picture, ...]


Block = Words | Bullets | Tiles | Grid | Figures


@dataclass(frozen=True)
class Section:
    """A heading with its blocks; `key` is its anchor."""

    key: str
    title: str
    blocks: tuple[Block, ...]
