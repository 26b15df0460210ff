"""A small line plot for documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

matplotlib.rcParams["svg.hashsalt"] = "reft"  # the same figures give the same file


class Line(NamedTuple):
    """Points joined by a line."""

    label: str
    x: list[int]
    y: list[float]


def draw(x_label: str, y_label: str, lines: Sequence[Line]) -> Figure:
    """A plot of lines: y from zero, x by its logarithm with a mark at every point."""
    figure = Figure(figsize=(4.8, 3), layout="constrained")
    panel = figure.subplots()
    for line in lines:
        panel.plot(line.x, line.y, "o-", ms=3, label=line.label)
    ticks = sorted({x for line in lines for x in line.x})
    panel.set(xlabel=x_label, ylabel=y_label, xscale="log", ylim=(0, None))
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend()
    return figure
