"""Draws charts as inline SVG: matplotlib does the layout, the page's CSS fonts and colours.

Charts are drawn in the light colours; in the SVG each colour becomes a CSS variable of its name,
so the page can switch to the dark ones. Blue and vermilion stay distinct under every common colour
vision deficiency.
"""

import hashlib
import io
import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.report.data import FloatArray, Histogram
from pipeline.report.text import MINUS, count, number, plain

STEP_LABEL = "optimizer step"
Dash = Literal["solid", "dashed", "dotted", "dashdot"]

_FONT_SIZE = 12
"""In SVG units; a chart is 360 units wide, so these are pixels on a phone."""
_WIDTH_INCHES = 5.0
_HEIGHT_INCHES = 2.95
_ROUND_STEPS = [1, 2, 2.5, 5, 10]
"""Ticks are at multiples of these times a power of ten."""
_MAX_POINTS = 400
"""Points per line; more cannot be distinguished on a screen."""

_SMALLEST_DOT, _PAIR_DOT, _LARGEST_DOT = 12.0, 26.0, 500.0
"""Areas in square points. One pair gets the middle one, less if a dot would exceed the largest."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "charts",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.size": _FONT_SIZE,
    "axes.labelsize": _FONT_SIZE,
    "xtick.labelsize": _FONT_SIZE,
    "ytick.labelsize": _FONT_SIZE,
    "path.simplify": True,
    "path.simplify_threshold": 0.2,
}


class Colour(NamedTuple):
    light: str
    dark: str


PALETTE: dict[str, Colour] = {
    "paper": Colour("#fefdfb", "#15191c"),
    "raised": Colour("#f5f4f0", "#1d2327"),
    "ink": Colour("#1c2226", "#e4e8ea"),
    "soft": Colour("#59646d", "#9ba7b0"),
    "rule": Colour("#d8dbdc", "#384148"),
    "grid": Colour("#e9eae9", "#283036"),
    "chosen": Colour("#0b62a4", "#62b1ea"),
    "rejected": Colour("#c44e16", "#f2905c"),
    "neutral": Colour("#66737d", "#8f9ca6"),
    "held-out": Colour("#7d3c98", "#cb9ee4"),
    "noise": Colour("#dcd4bd", "#4d4832"),
    "run-1": Colour("#0b61a3", "#63b2eb"),
    "run-2": Colour("#c44f17", "#f3915d"),
    "run-3": Colour("#13795b", "#4fc39e"),
    "run-4": Colour("#a03c78", "#e58bc0"),
    "run-5": Colour("#7c6a00", "#d3bd49"),
    "run-6": Colour("#4d545a", "#b4bcc2"),
}

NUM_RUN_COLOURS = sum(name.startswith("run-") for name in PALETTE)

_NAME_BY_LIGHT = {colour.light: name for name, colour in PALETTE.items()}
assert len(_NAME_BY_LIGHT) == len(PALETTE), (
    "light colours must be distinct: css_reference looks them up"
)


def css_reference(hex_colour: str) -> str:
    """Return the CSS variable of a light colour."""
    return f"var(--{_NAME_BY_LIGHT[hex_colour.lower()]})"


def css_variables(*, is_dark: bool) -> str:
    """Return declarations of all colours for the page's style sheet."""
    shades = ((name, c.dark if is_dark else c.light) for name, c in PALETTE.items())
    return " ".join(f"--{name}: {shade};" for name, shade in shades)


@dataclass(frozen=True, kw_only=True)
class Key:
    """A legend entry."""

    label: str
    colour: str
    """A name of the palette."""
    mark: Dash | Literal["area", "block", "dot"] = "solid"


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The values that a chart shows, as a table."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing with its title, legend, caption and values."""

    title: str
    """What the chart shows, as a sentence with a number."""
    drawing: Markup
    """Inline SVG."""
    reading: str = ""
    """The caption: how to read it."""
    keys: tuple[Key, ...] = ()
    numbers: Numbers | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series of points, sorted by x."""

    x: FloatArray
    y: FloatArray
    colour: str
    """A name of the palette."""
    width: float = 1.8
    opacity: float = 1.0
    dash: Dash = "solid"
    has_dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Level:
    """A labelled horizontal line to compare with."""

    y: float
    label: str


def draw_histogram(
    histogram: Histogram,
    colours: dict[str, str],
    *,
    x_label: str,
    splits_at_zero: bool = False,
    noise: float | None = None,
    is_share: bool = False,
    dashes: dict[str, Dash] | None = None,
) -> Markup:
    """Draw counts as filled outlines.

    Args:
        histogram: counts by column.
        colours: palette name by column.
        x_label: with its unit.
        splits_at_zero: whether bars right of zero are coloured as chosen, left of it as rejected.
        noise: half the width of a band around zero, in the unit of x.
        is_share: whether to draw each column's share of values instead of counts.
        dashes: line style of a column's outline; solid by default.
    """
    with _open_chart(x_label, "share of pairs" if is_share else "pairs") as (figure, axes):
        edges = histogram.edges
        for column, colour in colours.items():
            heights = histogram.counts[column].astype(np.float64)
            if is_share:
                heights = heights / max(1.0, float(heights.sum()))
            if splits_at_zero:
                _fill_sides(axes, heights, edges)
                continue
            shade = PALETTE[colour].light
            if not is_share:
                axes.stairs(heights, edges, fill=True, color=shade, alpha=0.16, linewidth=0)
            dash = (dashes or {}).get(column, "solid")
            axes.stairs(heights, edges, color=shade, linewidth=1.6, linestyle=dash)
        if noise is not None and noise > 0:
            axes.axvspan(-noise, noise, color=PALETTE["noise"].light, linewidth=0, zorder=0)
        if edges[0] < 0 < edges[-1]:
            axes.axvline(0, color=PALETTE["soft"].light, linewidth=1)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        if not is_share:
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=_ROUND_STEPS, integer=True))
        return _to_inline_svg(figure)


def draw_lines(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    level: Level | None = None,
    noise: float | None = None,
    y_range: tuple[float, float] | None = None,
    starts_at_zero: bool = False,
) -> Markup:
    """Draw values over steps.

    Args:
        lines: drawn in order, the last on top.
        x_label: with its unit.
        y_label: with its unit.
        level: a horizontal line to compare with.
        noise: half the width of a band around zero, in the unit of y.
        y_range: limits of the y axis; by default from the data.
        starts_at_zero: whether the y axis starts at zero.
    """
    with _open_chart(x_label, y_label) as (figure, axes):
        if noise is not None and noise > 0:
            axes.axhspan(-noise, noise, color=PALETTE["noise"].light, linewidth=0, zorder=0)
        for line in lines:
            x, y = _thin_out(line.x, line.y)
            axes.plot(
                x,
                y,
                color=PALETTE[line.colour].light,
                linewidth=line.width,
                alpha=line.opacity,
                linestyle=line.dash,
                marker="o" if line.has_dots or len(x) == 1 else "",
                markersize=5,
            )
        if y_range is not None:
            axes.set_ylim(*y_range)
        if starts_at_zero:
            axes.set_ylim(bottom=0)
        if level is not None:
            _draw_level(axes, level)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=_ROUND_STEPS, integer=True))
        return _to_inline_svg(figure)


def draw_scatter(
    places: FloatArray, amounts: FloatArray, *, x_label: str, y_label: str, colour: str
) -> Markup:
    """Draw dots with areas proportional to their number of pairs, and the lines x=0, y=0 and x=y.

    Args:
        places: [dots, 2], x and y.
        amounts: [dots], pairs.
        x_label: with its unit.
        y_label: with its unit.
        colour: palette name.
    """
    with _open_chart(x_label, y_label) as (figure, axes):
        soft = PALETTE["soft"].light
        axes.axhline(0, color=soft, linewidth=1)
        axes.axvline(0, color=soft, linewidth=1)
        areas = np.maximum(_SMALLEST_DOT, amounts * min(_PAIR_DOT, _LARGEST_DOT / amounts.max()))
        axes.scatter(
            places[:, 0],
            places[:, 1],
            s=areas,
            color=PALETTE[colour].light,
            alpha=0.6,
            linewidth=0,
        )
        axes.autoscale_view()
        axes.autoscale(enable=False)
        reach = [*axes.get_xlim(), *axes.get_ylim()]
        diagonal = [min(reach), max(reach)]
        axes.plot(diagonal, diagonal, color=soft, linewidth=1, linestyle="dashed")
        return _to_inline_svg(figure)


def list_bins(histogram: Histogram, names: dict[str, str]) -> Numbers:
    """List the counts of a histogram's bins that are not empty.

    Args:
        histogram: counts by column.
        names: heading by column.
    """
    edges = histogram.edges
    rows = []
    for place, (left, right) in enumerate(itertools.pairwise(edges)):
        amounts = [int(histogram.counts[column][place]) for column in names]
        if any(amounts):
            low = "below" if place == 0 and histogram.holds_lower else number(left)
            is_last = place == len(edges) - 2
            high = "above" if is_last and histogram.holds_higher else number(right)
            rows.append((f"{low} to {high}", *map(count, amounts)))
    return Numbers(header=("bin [from, to)", *names.values()), rows=rows)


def describe_tails(histogram: Histogram) -> str:
    """Describe which outer bins count values beyond their edge; empty if none does."""
    ends = ["first"] * histogram.holds_lower + ["last"] * histogram.holds_higher
    if not ends:
        return ""
    verb = "bin also counts" if len(ends) == 1 else "bins also count"
    return f" The {' and '.join(ends)} {verb} all values beyond."


@contextmanager
def _open_chart(x_label: str, y_label: str) -> Iterator[tuple[Figure, Axes]]:
    """Yield empty axes without a frame, with faint horizontal lines and y's label above."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(PALETTE["rule"].light)
        axes.tick_params(length=0, labelcolor=PALETTE["soft"].light, pad=5)
        axes.grid(axis="y", color=PALETTE["grid"].light, linewidth=1)
        axes.set_axisbelow(True)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=_ROUND_STEPS))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=_ROUND_STEPS))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axes.set_xlabel(x_label, color=PALETTE["soft"].light, loc="right")
        axes.set_title(y_label, color=PALETTE["soft"].light, loc="left", fontsize=_FONT_SIZE)
        yield figure, axes


def _fill_sides(axes: Axes, heights: FloatArray, edges: FloatArray) -> None:
    is_right = edges[:-1] >= -1e-12
    for colour, side in (("rejected", ~is_right), ("chosen", is_right)):
        shade = PALETTE[colour].light
        axes.stairs(heights * side, edges, fill=True, color=shade, alpha=0.75, linewidth=0)


def _draw_level(axes: Axes, level: Level) -> None:
    soft = PALETTE["soft"].light
    axes.axhline(level.y, color=soft, linewidth=1, linestyle="dotted")
    axes.annotate(
        level.label,
        (1, level.y),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=soft,
    )


def _tick(value: float) -> str:
    """Format a tick label without trailing zeros."""
    value = round(value, 12)
    if value != 0 and abs(value) < 1e-3:
        return plain(value)
    return f"{value:,.10f}".rstrip("0").rstrip(".").replace("-", MINUS)


def _thin_out(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Average neighbouring points if there are more than _MAX_POINTS."""
    if len(x) <= _MAX_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), _MAX_POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")
_FONT = re.compile(r"font-(?:size|family): [^;]*;? ?")
_LONG_FRACTION = re.compile(r"(\d+\.\d)\d+")
_REFERENCE = re.compile(r'(?:url\(|href=")#([\w-]+)')
_NO_ROTATION = re.compile(r"rotate\(-?0 [^)]*\)")


def _to_inline_svg(figure: Figure) -> Markup:
    """Turn a figure into an SVG element that takes colours and fonts from the page.

    Everything that only a standalone file needs is dropped: namespaces, metadata, sizes, fonts and
    unused ids. The remaining ids get a prefix hashed from the content, so ids of charts differ.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    source = buffer.getvalue()
    prefix = f"c{hashlib.sha256(source.encode()).hexdigest()[:8]}-"
    referred = set(_REFERENCE.findall(source))
    root = ET.fromstring(source)
    for element in root.iter():
        element.tag = _local(element.tag)
        for child in list(element):
            if _local(child.tag) in ("metadata", "style"):
                element.remove(child)
        kept = {_local(name): value for name, value in element.attrib.items()}
        if kept.get("id") not in referred:
            kept.pop("id", None)
        restyled = {name: _restyle(name, value, prefix) for name, value in kept.items()}
        element.attrib = {name: value for name, value in restyled.items() if value}
        element.text = (element.text or "").strip()
        element.tail = None
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": "plot", "aria-hidden": "true"}
    return Markup(ET.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _restyle(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if name == "href":
        return f"#{prefix}{value[1:]}"
    if name in ("d", "x", "y", "width", "height"):
        return _LONG_FRACTION.sub(r"\1", value).strip()
    value = value.replace("url(#", f"url(#{prefix}")
    value = _NO_ROTATION.sub("", _FONT.sub("", value))
    return _COLOUR.sub(lambda found: css_reference(found.group()), value)
