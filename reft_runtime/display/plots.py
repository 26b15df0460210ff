"""Pictures, drawn by matplotlib if it is installed."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reft_runtime.errors import ConfigError, InvalidRequest
from reft_runtime.machine.places import STANDARD_OUTPUT, check_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDEST = 16.0
"""Largest width of a heat map, in inches."""

MOST_TICKS = 60


def need_matplotlib() -> None:
    """Raise `ConfigError` if matplotlib is missing; the message says how to install it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "plot: needs matplotlib; run `pip install 'reft-server[plot]'`, or leave it out.",
            param="plot",
        ) from None


def check_plot(path: str | Path) -> Path:
    """The path of a picture, once it is known that it can be drawn and written.

    `-` is standard output, which gets a PNG.

    Raises `ConfigError` that says what is in the way.
    """
    need_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    path = Path(path)
    if path == STANDARD_OUTPUT:
        if not hasattr(sys.stdout, "buffer"):  # in a notebook
            raise ConfigError("plot: standard output takes text only here; name a file.")
        return path
    endings = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in endings:
        raise ConfigError(
            f"plot: {path} must end with .png, .svg or .pdf, which says what it is.", param="plot"
        )
    if path.is_dir():
        raise ConfigError(f"plot: {path} is a folder; name a file.", param="plot")
    check_folder(path.parent, "plot")
    return path


def save(figure: Figure, path: Path, meanwhile: str = "") -> None:
    """Write a picture; if that fails, raise `ConfigError`, whose message ends with `meanwhile`."""
    try:
        if path != STANDARD_OUTPUT:
            figure.savefig(path)
            return
        figure.savefig(drawn := io.BytesIO(), format="png")
        sys.stdout.buffer.write(drawn.getvalue())
        sys.stdout.flush()
    except OSError as error:
        raise ConfigError(
            f"plot: {path} cannot be written: {error.strerror}.{meanwhile}", param="plot"
        ) from None


def heat_map(edits: Sequence[tuple[int, str, int, float]], axes: Axes | None = None) -> Axes:
    """Draw the sizes of edits, each (layer, component, position, size): layers by positions.

    Where several edits meet in one place, the largest is shown. Raises `ConfigError` without
    matplotlib, and `InvalidRequest` if there are no edits.
    """
    need_matplotlib()
    if not edits:
        raise InvalidRequest("plot: no row was edited, so there is nothing to draw.")
    components = {component for _, component, _, _ in edits}
    places = sorted({(layer, component) for layer, component, _, _ in edits})
    positions = sorted({position for _, _, position, _ in edits})
    sizes = [[math.nan] * len(positions) for _ in places]
    for layer, component, position, size in edits:
        row = sizes[places.index((layer, component))]
        column = positions.index(position)
        row[column] = max(size, row[column])  # a cell begins as nan, which loses
    if axes is None:
        from matplotlib import pyplot

        _, axes = pyplot.subplots(
            figsize=(min(2.5 + 0.25 * len(positions), WIDEST), 1.2 + 0.25 * len(places)),
            layout="constrained",
        )
    image = axes.imshow(sizes, aspect="auto", vmin=0, origin="lower")
    step = 1 + len(positions) // MOST_TICKS
    axes.set_xticks(range(0, len(positions), step), [str(p) for p in positions[::step]])
    axes.set_yticks(
        range(len(places)),
        [f"{layer} {where}" if len(components) > 1 else str(layer) for layer, where in places],
    )
    axes.set(xlabel="position", ylabel="layer")
    axes.figure.colorbar(image, ax=axes, label="length of the change / of the row")
    return axes
