"""How a training went, for those who want to see it: a picture, or TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from reft_runtime.display.plots import save
from reft_runtime.errors import ConfigError
from reft_runtime.machine.places import check_folder


def check_tensorboard(folder: str | Path) -> Path:
    """The folder that TensorBoard will read, which can be written; raises `ConfigError`."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard: is not installed; run `pip install 'reft-server[tensorboard]'`, or leave"
            " it out.",
            param="tensorboard",
        )
    check_folder(Path(folder), "tensorboard")
    return Path(folder)


def tensorboard(folder: Path) -> TrainerCallback:
    """transformers' callback that writes losses, rates and evaluations into a folder."""
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))  # type: ignore[no-untyped-call]


def write_plot(path: Path, history: Sequence[Mapping[str, Any]], taken: int | None) -> None:
    """Draw what the Trainer logged: losses and accuracy by step, with the step that was `taken`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    losses = figure.subplots()
    losses.set(xlabel="step", ylabel="loss, nats a token")
    _curve(losses, history, "loss", "training", color="C0", linewidth=1)
    _curve(losses, history, "eval_loss", "evaluation", color="C1", marker="o")
    if any("eval_accuracy" in entry for entry in history):
        shares = losses.twinx()
        shares.set(ylabel="accuracy", ylim=(0, 1.02))
        _curve(shares, history, "eval_accuracy", "accuracy", color="C2", marker="s", linestyle="--")
    if taken is not None:
        losses.axvline(taken, color="grey", linestyle=":", label=f"step {taken} is taken")
    figure.legend(loc="outside upper center", ncols=4)
    save(figure, path, meanwhile=" The intervention is written.")


def _curve(
    axes: Any, history: Sequence[Mapping[str, Any]], name: str, label: str, **style: Any
) -> None:
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)
