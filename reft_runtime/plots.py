"""Pictures, which matplotlib draws where it is installed."""

from __future__ import annotations

from pathlib import Path

from reft_runtime.errors import ConfigError
from reft_runtime.places import check_folder


def need_matplotlib() -> None:
    """Raise `ConfigError` that says how to install it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "plot: needs matplotlib; run `pip install 'reft-server[plot]'`, or leave it out.",
            param="plot",
        ) from None


def check_plot(path: str | Path) -> Path:
    """The place of a picture, which can be drawn and written; raises `ConfigError`."""
    need_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    path = Path(path)
    endings = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in endings:
        raise ConfigError(
            f"plot: {path} must end with .png, .svg or .pdf, which says what it is.", param="plot"
        )
    if path.is_dir():
        raise ConfigError(f"plot: {path} is a folder; name a file.", param="plot")
    check_folder(path.parent, "plot")
    return path
