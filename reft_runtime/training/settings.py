"""What can be set for a training, and defaults that scale with the base model and the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import Any, get_args, get_type_hints

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions import BaseShape, Positions
from reft_runtime.interventions.format.kinds import KINDS

DEFAULT_RANK = 4

ROWS_SEEN = 6_000
"""A training goes by default over this many rows, several times over the same if need be."""

MIN_EPOCHS, MAX_EPOCHS = 3, 30

MAX_ROWS_SEEN = 100_000_000
"""The longest training, in rows: their order is in memory."""

DTYPES = ("auto", "float32", "bfloat16")

MAX_SEED = 2**32 - 1
"""The highest seed that numpy, which transformers seeds as well, takes."""

CHECKS = 5
"""A training is evaluated and saved this many times."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How to train. None leaves a choice to `complete`.

    `layers` None is all of them; `positions` as in a file (`l1`, `f1+l1`, ...); `untied` gives the
    first and the last tokens of `fN+lM` weights of their own. `lr` is the highest learning rate,
    reached after 6 % of the steps, from where it falls linearly to 0. `batch_size` rows make one
    step, shared by `accumulate` parts one after another and by all processes: memory is that of
    `batch_size / accumulate` rows. `template` is as in `layout.Layout`; None leaves it to
    `layout.choose_template`. Rows of more than `max_length` tokens (None: what the model takes) are
    an error, or are cut with `truncate`. `dtype` is that of the base's weights; edits, their sums
    and the optimiser are in float32. `hold_out` is the share of the rows that are not trained
    on, but choose the checkpoint and measure it: None is a tenth of rows with labels, of at least
    100 and where no others are given to evaluate on, 0 is none. `patience` stops a training after
    so many evaluations, of five, that were no better than one before.
    Raises `TypeError` for values of another type, and `ConfigError` for those that cannot be.
    """

    kind: str = "loreft"
    layers: tuple[int, ...] | None = None
    rank: int | None = None
    positions: str = "l1"
    untied: bool = False
    lr: float | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    template: str | None = None
    max_length: int | None = None
    truncate: bool = False
    seed: int = 0
    dtype: str = "auto"
    hold_out: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if self.kind not in KINDS:
            raise _error("kind", f"unknown {self.kind!r}; known: {', '.join(KINDS)}.")
        if self.rank is not None and not self.has_rank:
            raise _error("rank", f"a {self.kind} edit has none; leave it out.")
        for name in ("rank", "steps", "batch_size", "accumulate", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise _error(name, f"must be at least 1, not {value}.")
        for name in ("lr", "epochs"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise _error(name, f"must be a finite number above 0, not {value}.")
        if not 0 <= self.seed <= MAX_SEED:
            raise _error("seed", f"must be from 0 to {MAX_SEED:,}, not {self.seed}.")
        if self.hold_out is not None and not 0 <= self.hold_out < 1:
            raise _error(
                "hold_out",
                f"must be a share of the rows from 0 to below 1, such as 0.1, not {self.hold_out}.",
            )
        if self.patience is not None and not 1 <= self.patience < CHECKS:
            raise _error(
                "patience",
                f"a training is evaluated {CHECKS} times; give 1 to {CHECKS - 1}, not"
                f" {self.patience}.",
            )
        if self.epochs is not None and self.steps is not None:
            raise _error("steps", "give epochs or steps, not both.")
        if self.batch_size % self.accumulate:
            raise _error(
                "batch_size",
                f"{self.batch_size} rows of a step cannot be shared by {self.accumulate} parts.",
            )
        _ = self.sides
        if self.dtype not in DTYPES:
            raise _error("dtype", f"must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")
        if self.layers is not None and (
            not self.layers or len(set(self.layers)) < len(self.layers)
        ):
            raise _error("layers", "name each layer once, such as 8,16,24; or all.")

    def _check_types(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "layers":
                self._check_layers(value)
                continue
            allowed = get_args(hints[field.name]) or (hints[field.name],)
            numbers = (int,) if float in allowed else ()
            fits = isinstance(value, (*allowed, *numbers))
            if not fits or (isinstance(value, bool) and bool not in allowed):
                names = " or ".join(kind.__name__ for kind in allowed if kind is not NoneType)
                extra = " or None" if NoneType in allowed else ""
                raise TypeError(f"{field.name}: must be {names}{extra}, not {_shown(value)}.")

    def _check_layers(self, layers: Any) -> None:
        if layers is None:
            return
        if (
            isinstance(layers, str)
            or not isinstance(layers, Sequence)
            or not all(type(layer) is int for layer in layers)
        ):
            raise TypeError(
                "layers: must be numbers of layers such as (8, 16, 24), or None for all, not"
                f" {_shown(layers)}."
            )
        object.__setattr__(self, "layers", tuple(layers))

    @property
    def has_rank(self) -> bool:
        """Whether the kind's edits have a rank."""
        return any("r" in spec.shape for spec in KINDS[self.kind].tensors.values())

    @property
    def sides(self) -> list[Positions]:
        """Positions of the edits of each layer; untied, first and last tokens by themselves."""
        positions = parsed_positions("positions", self.positions)
        if not self.untied:
            return [positions]
        sides = (
            [Positions(first=positions.first), Positions(last=positions.last)]
            if (positions.first and positions.last)
            else []
        )
        if not sides or positions != Positions(first=positions.first, last=positions.last):
            raise _error("untied", f"needs positions of the form fN+lM, not {self.positions!r}.")
        return sides

    def steps_over(self, rows: int) -> int:
        """The number of steps over so many rows; 0 where `complete` has not chosen one yet."""
        name = "epochs" if self.steps is None else "steps"
        steps = self.steps or math.ceil((self.epochs or 0) * rows / self.batch_size)
        if steps * self.batch_size > MAX_ROWS_SEEN:
            raise _error(
                name,
                f"{getattr(self, name):g} of them go over {steps * self.batch_size:,} rows; at most"
                f" {MAX_ROWS_SEEN:,} can be.",
            )
        return steps

    def complete(self, base: BaseShape, rows: int) -> TrainSettings:
        """The same with every open choice made for a base model and a number of rows.

        The learning rate falls with the width d as d^(-3/4), through the paper's 9e-4 at 4,096.
        """
        layers = tuple(range(base.num_layers)) if self.layers is None else self.layers
        for layer in layers:
            if not 0 <= layer < base.num_layers:
                raise _error(
                    "layers", f"there is no {layer}; {base.model} has 0 to {base.num_layers - 1}."
                )
        rank = self.rank or (DEFAULT_RANK if self.has_rank else None)
        if rank is not None and rank > base.hidden_size:
            raise _error("rank", f"{rank} is above the model's hidden size, {base.hidden_size}.")
        epochs = self.epochs
        if epochs is None and self.steps is None:
            epochs = float(min(max(MIN_EPOCHS, math.ceil(ROWS_SEEN / rows)), MAX_EPOCHS))
        lr = self.lr or float(f"{9e-4 * (4096 / base.hidden_size) ** 0.75:.2g}")
        return replace(self, layers=layers, rank=rank, epochs=epochs, lr=lr)


def parsed_positions(name: str, text: str) -> Positions:
    """The positions that a setting of this name says; raises `ConfigError` for what says none."""
    try:
        return Positions.parse(text)
    except InvalidFile as error:
        reason = error.message.removeprefix("positions: ")
        raise ConfigError(f"{name}: {reason}", param=name) from None


def _shown(value: object) -> str:
    return f"{repr(value)[:80]} ({type(value).__name__})"


def _error(name: str, message: str) -> ConfigError:
    return ConfigError(f"{name}: {message}", param=name)
