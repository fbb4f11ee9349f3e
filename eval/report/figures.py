"""What a page is made of: sections of tables and pictures. Pictures are SVG in the page's own text colour."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#f58518", "#b279a2", "#72b7b2", "#9d755d")
MARKERS = "osD^vP"
VLA_COLOUR, GENERATOR_COLOUR, HELD_COLOUR = "#4c78a8", "#f58518", "#999999"
HEIGHT = 3.6  # of a picture, inches


@dataclass(frozen=True)
class Picture:
    """Inline SVG and what it shows."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Table:
    """Cells as text; the row ``best`` stands out. The first table of a section needs no title."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int | None = None
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Film:
    """One episode of a cell: a strip of frames and a video, both base64; the video may be empty."""

    name: str
    strip: str
    video: str
    open: bool


Headed = list[tuple[str, list[Picture]]]  # pictures below headings


@dataclass
class Section:
    """One evaluation on the page, its parts in the order in which they appear there."""

    title: str
    sentences: Sequence[str] = ()
    best_cell: str = ""
    headline: Sequence[tuple[str, str]] = ()
    lead: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    advice: tuple[str, str] | None = None
    pictures: Sequence[Picture] = ()
    more: Headed = field(default_factory=list)
    films: Sequence[Film] = ()
    traces: Headed = field(default_factory=list)
    source: str = ""


def percent(value: float | None, signed: bool = False) -> str:
    """A fraction as a percentage."""
    return "–" if value is None else f"{100 * value:{'+' if signed else ''}.1f}"


def picture(draw: Callable[[Any], None], caption: str, width: float = 6.0, height: float = HEIGHT) -> Picture:
    """What ``draw`` draws on a matplotlib figure of ``width`` x ``height`` inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink = "#010203"  # a colour nothing else uses, replaced by currentColor below
    style: dict[str, Any] = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.15,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        "svg.hashsalt": "spvla",
    }
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), ink)
    with plt.rc_context(style):  # type: ignore[arg-type]
        figure = plt.figure(figsize=(width, height))
        draw(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(ink, "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[\d.]+pt"', r"\1", text, count=2)
    return Picture(Markup(text), caption)  # our own drawing: matplotlib has escaped its labels


def legend(f: Any) -> None:
    """What is drawn, below the axes, where it hides nothing."""
    handles, labels = f.axes[0].get_legend_handles_labels()
    f.legend(handles, labels, loc="outside lower center", ncols=2 if max(map(len, labels)) > 20 else 3, fontsize=8)
