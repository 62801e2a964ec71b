"""How every figure looks: sizes, axes, a palette that survives colour blindness, and SVG that follows the page's theme.

Figures are drawn in placeholder colours, one for each role. `Picture.inline` turns them into CSS variables, so that one
drawing serves a light page, a dark page and paper; `Picture.standalone` writes the light colours in.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, ACCENT, SURFACE = "#010001", "#010002", "#010003", "#010004", "#010005"
# The sequence runs from small to large; viridis without the ends that vanish on the page, so large is the more
# prominent one on either background. It stays ordered in grey and under every common colour blindness.
LIGHT_SEQUENCE = [
    "#5ec962",
    "#3fbc73",
    "#28ae80",
    "#1fa088",
    "#21918c",
    "#26828e",
    "#2c728e",
    "#33638d",
    "#3b528b",
    "#424086",
    "#472d7b",
    "#440154",
]
DARK_SEQUENCE = [
    "#6a5acd",
    "#5b6bd0",
    "#4a7bc8",
    "#3d8bc0",
    "#3499b5",
    "#2fa8a6",
    "#37b693",
    "#4fc37d",
    "#70cf63",
    "#96d84b",
    "#bddf36",
    "#fde725",
]
LIGHT = {"ink": "#1b1f24", "muted": "#5b6470", "grid": "#e4e7eb", "accent": "#c2410c", "surface": "#ffffff"}
DARK = {"ink": "#e8eaed", "muted": "#a0a8b4", "grid": "#31363e", "accent": "#fb7185", "surface": "#15181c"}
_ROLES = {INK: "ink", MUTED: "muted", GRID: "grid", ACCENT: "accent", SURFACE: "surface"}
_STEPS = {f"#0200{i:02x}": i for i in range(len(LIGHT_SEQUENCE))}
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Picture:
    """One figure: SVG in placeholder colours, what it shows for those who cannot see it, and its caption."""

    name: str
    svg: str
    alt: str
    caption: str

    def inline(self) -> str:
        """SVG for the page: colours are CSS variables, hover titles kept, no address of any kind inside."""
        svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", self.svg).replace("xlink:href", "href")
        svg = re.sub(r"#0[12]00[0-9a-f]{2}", lambda m: f"var(--{_variable(m[0])})", svg)
        return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(self.alt)}" ', 1)

    def standalone(self) -> str:
        """SVG as a file of its own, in the light colours on white."""
        table = theme_variables(LIGHT, LIGHT_SEQUENCE)
        svg = re.sub(r"#0[12]00[0-9a-f]{2}", lambda m: table[_variable(m[0])], self.svg)
        return re.sub(r"(<svg [^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', svg, count=1)


def theme_variables(roles: dict[str, str], sequence: Sequence[str]) -> dict[str, str]:
    """CSS variable names (without dashes) and colours of one theme."""
    return roles | {f"step{i}": colour for i, colour in enumerate(sequence)}


def _variable(placeholder: str) -> str:
    return _ROLES.get(placeholder) or f"step{_STEPS[placeholder]}"


def sequence(n: int) -> list[str]:
    """`n` colours in order, as far apart as the palette allows."""
    last = len(_STEPS) - 1
    places = [round(i * last / (n - 1)) for i in range(n)] if n > 1 else [round(0.6 * last)] * n
    return [f"#0200{place:02x}" for place in places]


# ---------------------------------------------------------------- figures
def panel(width: float = 6.6, height: float = 4.4) -> tuple[Figure, Axes]:
    """An empty figure with one set of axes, sizes in inches of 72 points (a point is 4/3 of a pixel on the page)."""
    figure, (axes,) = panels(1, width, height)
    return figure, axes


def panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """`count` axes side by side with one vertical scale; the first alone has its labels."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        row = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set(color=MUTED, linewidth=0.6)
        axes.grid(True, which="major", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0, labelcolor=MUTED, labelsize=9, pad=4)
    return figure, row


_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
}


def finish(figure: Figure, name: str, alt: str, caption: str) -> Picture:
    """The figure as SVG: text stays text, no date, no metadata, ids that no other figure of the page has."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context(_RC | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<g id="title-([0-9a-f]*)">', lambda m: f"<g><title>{escape(bytes.fromhex(m[1]).decode())}</title>", svg
    )
    used = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", FONT, svg)
    svg = re.sub(r"\^([-\d.]+)(?=</text>)", r'<tspan dy="-0.4em" font-size="75%">\1</tspan>', svg)
    rim = (
        f"paint-order: stroke; stroke: {SURFACE}; stroke-width: 2.5px; stroke-linejoin: round; "  # readable over lines
    )
    svg = svg.replace('<text style="', f'<text style="{rim}')
    return Picture(name, svg, alt, caption)


def hover(text: str) -> str:
    """A `gid` for an artist that `finish` turns into a title shown on hovering."""
    return f"title-{text.encode().hex()}"


# ---------------------------------------------------------------- axes
def log_axis(axes: Axes, which: str, words: Callable[[float], str], *, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Log scale on the `which` ("x" or "y") axis with few ticks, written by `words`."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    decades = math.log10(high / low)
    chosen = (1,) if decades > 3.5 else (1, 3) if decades > 1.7 else subs
    axis.set_major_locator(LogLocator(base=10, subs=chosen, numticks=50))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions as near to `wanted` as possible, in the same order and at least `gap` apart."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[
        list[float]
    ] = []  # [sum of (wanted - own offset), members]: each group sits as a stack around its mean
    for i in order:
        groups.append([wanted[i], 1])
        while len(groups) > 1 and _start(groups[-2]) + groups[-2][1] * gap > _start(groups[-1]):
            total, members = groups.pop()
            groups[-1] = [groups[-1][0] + total - members * groups[-1][1] * gap, groups[-1][1] + members]
    placed = [_start(group) + k * gap for group in groups for k in range(int(group[1]))]
    result = [0.0] * len(wanted)
    for i, place in zip(order, placed, strict=True):
        result[i] = place
    return result


def _start(group: list[float]) -> float:
    return group[0] / group[1]


def label_ends(
    axes: Axes, labels: Sequence[tuple[float, float, str]], *, gap_points: float = 12, offset: float = 9
) -> None:
    """Direct labels (x, y, text) to the right of their points, pushed apart where they would collide."""
    if not labels:
        return
    figure: Any = axes.figure
    figure.draw_without_rendering()  # settles limits and layout, so that data can be turned into points
    to_points = 72 / figure.dpi
    heights = [axes.transData.transform((x, y))[1] * to_points for x, y, _ in labels]
    for (x, y, text), height, at in zip(labels, heights, spread(heights, gap_points), strict=True):
        axes.annotate(
            text, (x, y), xytext=(offset, at - height), textcoords="offset points", va="center", fontsize=9, color=INK,
            annotation_clip=False,
        )  # fmt: skip


def key(axes: Axes, title: str, entries: Sequence[tuple[str, str]]) -> None:
    """A key of (text, colour) down the right margin: a coloured dot, then words in ink, so that both are readable."""
    if not entries:
        return
    axes.annotate(
        title, (1, 1), xytext=(10, -4), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=MUTED
    )
    for i, (text, colour) in enumerate(entries, 1):
        for piece, right, ink in (("\u25cf", 10, colour), (text, 21, INK)):
            axes.annotate(
                piece,
                (1, 1),
                xytext=(right, -4 - 14 * i),
                xycoords="axes fraction",
                textcoords="offset points",
                fontsize=9,
                color=ink,
            )
