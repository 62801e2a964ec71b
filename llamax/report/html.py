"""report.html: one file, no script, nothing fetched; light, dark, narrow and on paper."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from llamax.report.blocks import Block, Bullets, Figures, Grid, Section, Tiles, Words
from llamax.report.content import sections
from llamax.report.markdown import to_markdown
from llamax.report.study import load_study
from llamax.report.style import DARK, DARK_SEQUENCE, FONT, LIGHT, LIGHT_SEQUENCE, theme_variables
from llamax.storage.files import write_atomic


def write_report(
    study_dir: str | Path,
    fits: Mapping[str, Any] | None = None,
    prediction: Mapping[str, Any] | None = None,
    timings: Mapping[str, Any] | None = None,
) -> Path:
    """Write report.html and report.md into `study_dir` (a study, a folder of runs or one run); returns the HTML's path.

    fits: `{"approach2": ..., "approach3": ..., "cost": ...}` as ScalingFit.as_dict(); prediction: Prediction.as_dict()
    joined with Score.as_dict(); timings: seconds by stage. What is not given is read from fits.json,
    predictions.jsonl and timings.json in `study_dir`; what is not there is reported as missing. Only the newest
    prediction's score is computed anew.

    Raises:
        UserError: `study_dir` is not a folder.
    """
    study = load_study(study_dir, fits, prediction, timings)
    parts = sections(study)
    page = to_html(study.name, parts)
    _write(study.path / "report.md", to_markdown(study.name, parts))
    return _write(study.path / "report.html", page)


def to_html(name: str, parts: tuple[Section, ...], kind: str = "Scaling study") -> str:
    """The page, titled "kind: name". Every text that comes from data is escaped."""
    title = f"{kind}: {escape(name)}"
    links = "".join(f'<a href="#{part.key}">{escape(part.title.partition(":")[0])}</a>' for part in parts)
    body = "\n".join(
        f'<section id="{part.key}"><h2>{_text(part.title)}</h2>{"".join(map(_block, part.blocks))}</section>'
        for part in parts
    )
    return _PAGE.format(title=title, css=_css(), links=links, body=body)


def _block(block: Block) -> str:
    if isinstance(block, Words):
        return f"<p{' class=small' if block.small else ''}>{_text(block.text)}</p>"
    if isinstance(block, Bullets):
        items = "".join(f"<li>{_text(item)}</li>" for item in block.items)
        return f"<ul{' class=alarm' if block.alarm else ''}>{items}</ul>"
    if isinstance(block, Tiles):
        tiles = "".join(
            f'<div class="tile {t.mood}"><div class="label">{escape(t.label)}</div>'
            f'<div class="value">{escape(t.value)}</div><div class="note">{escape(t.note)}</div></div>'
            for t in block.tiles
        )
        return f'<div class="tiles">{tiles}</div>'
    if isinstance(block, Figures):
        kind = "figures one" if len(block.pictures) == 1 else "figures"
        figures = "".join(
            f"<figure>{p.inline()}<figcaption>{_text(p.caption)}</figcaption></figure>" for p in block.pictures
        )
        return f'<div class="{kind}">{figures}</div>'
    return _table(block)


def _table(grid: Grid) -> str:
    def cells(tag: str, values: tuple[str, ...]) -> str:
        return "".join(f"<{tag}{'' if i < grid.text else ' class=n'}>{_text(v)}</{tag}>" for i, v in enumerate(values))

    head = f"<thead><tr>{cells('th', grid.columns)}</tr></thead>" if any(grid.columns) else ""
    rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in grid.rows)
    return f'<div class="table" tabindex="0"><table>{head}<tbody>{rows}</tbody></table></div>'


def _text(text: str) -> str:
    """Escaped, with C^0.51 and N^α as raised exponents and units kept with their numbers."""
    raised = re.sub(r"\^(-?[\d.]*\d|[αβ])", r"<sup>\1</sup>", escape(text))
    return re.sub(r"(?<=\d) (?=%|FLOPs|s\b|min\b|nats)", "\u00a0", raised)


def _css() -> str:
    def variables(roles: dict[str, str], sequence: list[str], more: str) -> str:
        return "".join(f"--{k}:{v};" for k, v in theme_variables(roles, sequence).items()) + more

    light = variables(
        LIGHT, LIGHT_SEQUENCE, "--page:#f6f7f9;--good:#15803d;--bad:#b91c1c;--alarm:#fff7ed;--rule:#d5d9df"
    )
    dark = variables(DARK, DARK_SEQUENCE, "--page:#0d0f12;--good:#4ade80;--bad:#f87171;--alarm:#2a1c10;--rule:#31363e")
    return (
        f":root{{color-scheme:light dark;{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        + _CSS.replace("FONT", FONT)
    )


def _write(path: Path, text: str) -> Path:
    write_atomic(path, text, durable=False)
    return path


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{css}
</style>
</head>
<body>
<main>
<header><h1>{title}</h1><nav>{links}</nav></header>
{body}
</main>
</body>
</html>
"""

_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 FONT}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:27px;line-height:1.2;margin:0 0 10px;letter-spacing:-.01em}
h2{font-size:18px;margin:0 0 10px}
p,li{max-width:100ch}
sup{font-size:.75em;line-height:0}
.small{font-size:13px;color:var(--muted)}
p{margin:0 0 10px}
ul{margin:0 0 4px;padding-left:20px}
li{margin:3px 0}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin-bottom:18px}
nav a{color:var(--muted);text-decoration:none;border-bottom:1px solid var(--rule)}
nav a:hover{color:var(--ink)}
section{background:var(--surface);border:1px solid var(--rule);border-radius:8px;padding:18px 20px;margin:0 0 16px}
#summary>p{font-size:17px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:10px;margin:4px 0 14px}
.tile{border:1px solid var(--rule);border-radius:6px;padding:10px 12px}
.tile .label,.tile .note{font-size:12.5px;color:var(--muted)}
.tile .value{font-size:25px;line-height:1.3;font-weight:600;white-space:nowrap}
.tile.good .value,.tile.good .note{color:var(--good)}
.tile.bad .value,.tile.bad .note{color:var(--bad)}
ul.alarm{list-style:none;padding:0}
ul.alarm li{background:var(--alarm);border-left:3px solid var(--accent);padding:6px 12px;margin:6px 0;
max-width:none;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));
gap:8px 28px;margin-bottom:12px}
.figures.one{grid-template-columns:1fr}
figure{margin:0;min-width:0;overflow-x:auto}
figure svg{display:block;width:100%;height:auto;min-width:340px}
.figures.one svg{max-width:880px;min-width:480px;margin:0 auto}
figcaption{font-size:13px;line-height:1.45;color:var(--muted);margin-top:4px;max-width:84ch}
.table{overflow-x:auto;margin:6px 0 10px}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th{font-weight:600;text-align:left;border-bottom:1px solid var(--rule);vertical-align:bottom}
td,th{padding:4px 14px 4px 0;vertical-align:top}
tbody tr+tr td{border-top:1px solid var(--grid)}
#runs table{font-size:12.5px}
#runs td,#runs th{padding-right:11px}
td:first-child{white-space:nowrap}
.n{text-align:right;white-space:nowrap}
th.n{white-space:normal}
#prediction td+td,#method td+td,#plan td+td{overflow-wrap:anywhere}
@media(max-width:560px){main{padding:16px 8px 40px}section{padding:14px 12px}h1{font-size:22px}}
@media print{.figures{grid-template-columns:1fr 1fr;gap:4pt 14pt}.tiles{grid-template-columns:repeat(5,1fr)}
figure svg,.figures.one svg{min-width:0}.tile .value{font-size:15pt}#summary>p{font-size:12pt}
body{background:#fff;font-size:10.5pt}main{max-width:none;padding:0}nav{display:none}
section{border:0;border-radius:0;padding:0;margin:0 0 14pt}figure,.tiles,tr,li{break-inside:avoid}h2{break-after:avoid}
.table,figure{overflow:visible}#runs table{font-size:7pt}#runs td,#runs th{padding-right:5pt}}
"""
