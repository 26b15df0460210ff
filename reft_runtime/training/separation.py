"""Which layer to read or steer: how well a difference of means tells two sets of texts apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.base.shape import base_shape
from reft_runtime.errors import ConfigError
from reft_runtime.interventions import Edit, Intervention
from reft_runtime.machine.cores import use_threads
from reft_runtime.training.settings import parsed_positions
from reft_runtime.training.states import states_of

FOLDS = 5


@dataclass(frozen=True, slots=True)
class Separation:
    """How well the difference of means of one layer's outputs tells texts of two sets apart.

    `auroc` and `accuracy` are of texts that were left out of the means, in `FOLDS` folds (or as
    many as the smaller set has texts), and averaged over these. A text counts as right on its own
    side of the point half-way between the means; `accuracy` is the mean over both sets, so that
    0.5 is chance whatever their sizes are. `norm` is the length of the difference of all texts, and
    `relative_norm` that over the mean length of a text's state.
    """

    layer: int
    auroc: float
    accuracy: float
    norm: float
    relative_norm: float


def separations(
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    model: str | Path | PreTrainedModel = "demo",
    tokenizer: PreTrainedTokenizerBase | None = None,
    read: str | None = None,
    template: str | None = None,
    dtype: str = "auto",
    progress: bool = True,
    threads: int | None = None,
) -> list[Separation]:
    """How well the vector that `direction` would make separates the texts, at each of `layers`.

    None is all layers. Each text goes through the model once, whatever the number of layers. `read`
    and `template` are as for `direction`. Raises `ConfigError`, and `InvalidFile` for a template
    that no file may have.
    """
    where = None if read is None else parsed_positions("read", read)
    use_threads(threads)
    shape = base_shape(model)
    chosen = range(shape.num_layers) if layers is None else sorted(set(layers))
    for layer in chosen:
        if not 0 <= layer < shape.num_layers:
            raise ConfigError(
                f"layers: {layer}; {shape.model} has 0 to {shape.num_layers - 1}.", param="layers"
            )
    nothing = Edit(0, "all", {"v": torch.zeros(shape.hidden_size)}, kind="steering")
    Intervention.build(shape, [nothing], template=template)  # which refuses a wrong template
    sets = {"positive": positive, "negative": negative}
    _, found = states_of(
        sets, chosen, where,
        model=model, tokenizer=tokenizer, template=template, dtype=dtype, progress=progress,
    )  # fmt: skip
    for what, states in zip(sets, found, strict=True):
        if len(states) < 2:
            raise ConfigError(
                f"{what}: only one text can be read, and none would be left to be told apart;"
                " give two or more.",
                param=what,
            )
    by_layer = zip(chosen, *(states.unbind(1) for states in found), strict=True)
    return [_separation(layer, ups.double(), downs.double()) for layer, ups, downs in by_layer]


def _separation(layer: int, ups: Tensor, downs: Tensor) -> Separation:
    """That of the states [texts, d] of both sets."""
    folds = min(FOLDS, len(ups), len(downs))
    auroc = accuracy = 0.0
    for fold in range(folds):
        # Texts of contrasting pairs, which often have the same number, fall in the same fold.
        (up, some), (down, others) = (_split(states, fold, folds) for states in (ups, downs))
        axis, middle = normalize(up - down, dim=0), (up + down) / 2
        right, wrong = (some - middle) @ axis, (others - middle) @ axis
        auroc += _above(right[:, None] - wrong) / folds
        accuracy += (_above(right) + _above(-wrong)) / 2 / folds
    norm = float((ups.mean(0) - downs.mean(0)).norm())
    length = float(torch.cat((ups, downs)).norm(dim=1).mean())
    return Separation(layer, auroc, accuracy, norm, norm / length)


def _above(numbers: Tensor) -> float:
    """The share of numbers above 0; a 0 counts half."""
    return float((numbers.sign() + 1).mean()) / 2


def _split(states: Tensor, fold: int, folds: int) -> tuple[Tensor, Tensor]:
    """The mean of the states outside a fold, and the states in it."""
    inside = torch.arange(len(states)) % folds == fold
    return states[~inside].mean(0), states[inside]
