"""One prompt at a grid of strengths: which, the answers as a table, and a picture of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from reft_runtime.display.plots import save
from reft_runtime.errors import ConfigError
from reft_runtime.use import MAX_STRENGTH
from server.cli.columns import Column
from server.cli.console import table

if TYPE_CHECKING:
    from reft_runtime.training import Score

MOST_STRENGTHS = 101


@dataclass(frozen=True, slots=True)
class Point:
    """The answer at one strength, and, where rows were given, the score there."""

    strength: float
    column: Column
    score: Score | None = None

    def as_json(self) -> dict[str, Any]:
        """The point as plain values."""
        plain = {"strength": self.strength, **self.column.as_json()}
        if self.score is None:
            return plain
        return {**plain, "metric": self.score.metric, "score": self.score.value}


def read_strengths(text: str) -> list[float]:
    """Read strengths: FROM:TO:STEP with both ends, or numbers with commas between them.

    Raises `ConfigError`.
    """
    parts = text.split(":")
    try:
        numbers = [float(part) for part in (parts if len(parts) > 1 else text.split(","))]
    except ValueError:
        numbers = []
    if len(parts) == 3 and len(numbers) == 3:
        numbers = _range(*numbers)
    elif len(parts) > 1:
        numbers = []
    if not numbers or not all(abs(number) <= MAX_STRENGTH for number in numbers):
        raise ConfigError(
            f"strengths: write FROM:TO:STEP, such as -1:2:0.25, or numbers such as 0,0.5,1, from"
            f" {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}, not {text!r}."
        )
    if len(numbers) > MOST_STRENGTHS:
        raise ConfigError(
            f"strengths: {text!r} are {len(numbers):,}, and at most {MOST_STRENGTHS} are answered;"
            " take a larger step."
        )
    return numbers


def _range(first: float, last: float, step: float) -> list[float]:
    """The strengths from `first` to `last`, none where no step leads there."""
    count = (last - first) / step if step else math.nan
    if not 0 <= count <= 10**6:
        return []
    steps = math.floor(count + 1e-9)
    return [round(first + step * place, 9) for place in range(steps + 1)]


def show_points(console: Console, points: Sequence[Point]) -> None:
    """A table with a line for each strength."""
    columns = {"strength": "right", "tokens": "right", "first": "right", "mean": "right"}
    scored = points[0].score
    if scored is not None:
        columns[scored.metric] = "right"
    rows = []
    for point in points:
        reply = point.column.reply
        nats = [f"{reply.trace.kl:.3f}", f"{reply.trace.mean_log_ratio:.3f}"]
        row = [f"{point.strength:g}", str(reply.tokens), *nats]
        if point.score is not None:
            row.append(point.score.shown)
        rows.append([*row, reply.text.strip()])
    console.print(table({**columns, "answer": "fold"}, rows))
    console.print("first: nats from the base's distribution of the first token", style="dim")
    console.print(
        "mean: nats a token by which the answer is likelier than to the base", style="dim"
    )


def draw(path: Path, name: str, points: Sequence[Point]) -> None:
    """A picture of divergences, length and score by strength."""
    from matplotlib.figure import Figure

    strengths = [point.strength for point in points]
    curves: list[tuple[str, Sequence[float]]] = [
        ("first token, nats from the base", [point.column.reply.trace.kl for point in points]),
        (
            "answer, nats a token likelier than to the base",
            [point.column.reply.trace.mean_log_ratio for point in points],
        ),
        ("length of the answer, tokens", [point.column.reply.tokens for point in points]),
    ]
    scores = [point.score for point in points if point.score is not None]
    if scores:
        curves.append((scores[0].metric, [score.value for score in scores]))
    figure = Figure(figsize=(6, 2.2 * len(curves)), layout="constrained")
    figure.suptitle(name)
    rows = figure.subplots(len(curves), sharex=True)
    for axes, (label, values) in zip(rows, curves, strict=True):
        axes.plot(strengths, values, marker="o", markersize=3)
        axes.set_title(label, loc="left", fontsize="medium")
        axes.grid(alpha=0.3)
    rows[-1].set_xlabel("strength")
    save(figure, path)
