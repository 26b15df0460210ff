"""Steering without training: the difference of means of contrasting texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.base.shape import base_shape
from reft_runtime.errors import ConfigError
from reft_runtime.interventions import BaseShape, Edit, Intervention
from reft_runtime.machine.cores import use_threads
from reft_runtime.training.settings import parsed_positions
from reft_runtime.training.states import states_of


def read_texts(path: str | Path) -> list[str]:
    """The lines of a text file in UTF-8 that are not blank; a line ends at a line feed only."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 (byte {error.start}); save the texts as UTF-8."
        ) from None
    lines = (line.strip(" \t\r") for line in text.split("\n"))
    return [line for line in lines if line.strip()]


def direction(
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    layer: int,
    model: str | Path | PreTrainedModel = "demo",
    tokenizer: PreTrainedTokenizerBase | None = None,
    read: str | None = None,
    positions: str = "all",
    scale: float = 1.0,
    template: str | None = None,
    description: str = "",
    license: str | None = None,
    dtype: str = "auto",
    progress: bool = True,
    threads: int | None = None,
) -> Intervention:
    """A steering vector: the output of `layer` for `positive` texts less that for `negative` ones.

    Both are means over texts of the mean over a text's tokens at `read`, by default all but the
    first, whose states are far longer than all others and say nothing. `l1` reads the last one, as
    contrastive activation addition does (arXiv 2312.06681). The vector, times `scale`, is added at
    `positions`. With a `template` each text is what a user says in it, and so says the manifest.
    `threads` is by default one a core that this process may use. Raises `ConfigError`.
    """
    where = None if read is None else parsed_positions("read", read)
    parsed_positions("positions", positions)
    if not math.isfinite(scale):
        raise ConfigError(f"scale: must be a finite number, not {scale}.", param="scale")
    use_threads(threads)
    shape = base_shape(model)
    if not 0 <= layer < shape.num_layers:
        raise ConfigError(
            f"layer: {layer}; {shape.model} has 0 to {shape.num_layers - 1}.", param="layer"
        )

    def made(shape: BaseShape, vector: Tensor) -> Intervention:
        return Intervention.build(
            shape,
            [Edit(layer, positions, {"v": vector}, kind="steering")],
            template=template,
            description=description,
            license=license,
            training={
                "method": "difference of means",
                "positive": len(positive),
                "negative": len(negative),
                "scale": scale,
                **({} if where is None else {"read": str(where)}),
            },
        )

    made(shape, torch.zeros(shape.hidden_size))  # what the format refuses is told before the load
    own, (ups, downs) = states_of(
        {"positive": positive, "negative": negative}, [layer], where,
        model=model, tokenizer=tokenizer, template=template, dtype=dtype, progress=progress,
    )  # fmt: skip
    vector = scale * (ups.mean(0) - downs.mean(0))[0]
    if not vector.any():
        raise ConfigError(
            "The vector is zero, and would change nothing: the scale is 0, or the means of both"
            " texts are equal."
        )
    return made(own, vector)
