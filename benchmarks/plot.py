"""Plot the parts of training's memory, and how a step's time depends on its tokens.

python -m benchmarks.plot benchmarks/results/hh.jsonl
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.table import Line, collect, read_results

GB = 1e9
BYTES = 4
"""Bytes of a float32."""
COLORS = {
    "weights": "#4c72b0",
    "gradients": "#dd8452",
    "AdamW": "#937860",
    "reference model": "#c44e52",
    "activations, logits, the rest": "#c8c8c8",
}


def draw(results: Path) -> Path:
    """Draw both panels beside the results, as an SVG without dates or random ids."""
    header, records = read_results(results)
    lines = [
        line
        for line in collect(header, [one for one in records if one.row.work == "train"])
        if line.found
    ]
    ours = next(line for line in lines if line.row.program == "ours")
    mpl.rcParams["svg.hashsalt"] = results.stem
    figure = Figure(figsize=(11, 0.42 * len(lines) + 2.2), layout="constrained")
    memory, times = figure.subplots(1, 2, width_ratios=(2, 1))
    _draw_memory(memory, lines, num_weights=ours.found[0].num_weights)
    _draw_times(times, ours)
    picture = results.with_suffix(".svg")
    figure.savefig(picture, metadata={"Date": None})
    return picture


def _draw_memory(axes: Axes, lines: list[Line], *, num_weights: int) -> None:
    """Stack, for each row, the known parts of the measured peak and the remainder."""
    copy = BYTES * num_weights / GB
    held = {"weights": copy, "gradients": copy, "AdamW": 2 * copy}
    for place, line in enumerate(reversed(lines)):
        parts = dict(held)
        if line.row.reference == "in memory":
            parts["reference model"] = copy
        parts["activations, logits, the rest"] = line.memory / GB - sum(parts.values())
        start = 0.0
        for name, size in parts.items():
            axes.barh(place, size, left=start, color=COLORS[name], height=0.7)
            start += size
        axes.text(start, place, f" {start:.1f}", va="center", fontsize=8)
    names = [line.name.replace("*", "") for line in reversed(lines)]
    axes.set_yticks(range(len(lines)), names, fontsize=8)
    axes.set_xlabel("peak memory of the process, GB")
    axes.set_title("Where the memory of training goes", fontsize=10)
    for name, color in COLORS.items():
        axes.barh(0, 0, color=color, label=name)
    axes.legend(fontsize=8, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_times(axes: Axes, ours: Line) -> None:
    """Plot each measured step of ours, and the best line through the origin."""
    tokens = np.concatenate([found.step_tokens for found in ours.found])
    seconds = np.concatenate([found.step_seconds for found in ours.found])
    slope = float((tokens * seconds).sum() / (tokens**2).sum())
    off = float(np.abs(seconds / (slope * tokens) - 1).max())
    axes.scatter(tokens, seconds, s=14, color=COLORS["weights"])
    axes.plot([0, tokens.max()], [0, slope * tokens.max()], color="#888888", linewidth=1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a step")
    axes.set_ylabel("seconds")
    axes.set_title(
        f"Ours: {1e3 * slope:.2f} ms a token,\nno step off by more than {off:.0%}", fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])))
