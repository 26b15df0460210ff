"""Steering without training: the difference of means of contrasting texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.base.shape import base_shape, shape_of
from reft_runtime.edits.sites import Site
from reft_runtime.errors import ConfigError
from reft_runtime.interventions import BaseShape, Edit, Intervention
from reft_runtime.loading.base import load_base
from reft_runtime.machine.cores import use_threads
from reft_runtime.text import Tokenizer
from reft_runtime.training.forward import Base

BATCH = 32


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

    Both are means over texts of the mean over a text's tokens; the first token of every text is
    left out, whose states are far longer than all others and say nothing. The vector, times
    `scale`, is added at `positions` (arXiv 2312.06681 calls this contrastive activation addition).
    `template` is what the manifest says of chats. `threads` is by default one a core that this
    process may use. Raises `ConfigError`.
    """
    use_threads(threads)
    shape = base_shape(model)
    if not 0 <= layer < shape.num_layers:
        raise ConfigError(
            f"layer: {layer}; {shape.model} has 0 to {shape.num_layers - 1}.", param="layer"
        )
    if not math.isfinite(scale):
        raise ConfigError(f"scale: must be a finite number, not {scale}.", param="scale")

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
            },
        )

    made(shape, torch.zeros(shape.hidden_size))  # what the format refuses is told before the load
    name, loaded, own = load_base(model, tokenizer, dtype, None, differentiable=True)
    try:
        base, words = Base(loaded), Tokenizer(own, loaded.max_model_len)
        base.sites.check(layer, "block_output", loaded.hidden_size)
        means = []
        for what, texts in (("positive", positive), ("negative", negative)):
            ids = [words.encode(text) for text in texts]
            if not any(len(one) > 1 for one in ids):
                raise ConfigError(f"{what}: there is no text of two tokens or more.", param=what)
            means.append(_mean(base, layer, [one for one in ids if len(one) > 1], what, progress))
        vector = scale * (means[0] - means[1])
    finally:
        loaded.give_back()
    if not vector.any():
        raise ConfigError(
            "The vector is zero, and would change nothing: the scale is 0, or the means of both"
            " texts are equal."
        )
    return made(shape_of(name, loaded), vector)


@torch.no_grad()
def _mean(base: Base, layer: int, texts: list[list[int]], what: str, progress: bool) -> Tensor:
    recorder = _Recorder(layer)
    total = torch.zeros(base.loaded.hidden_size)
    for first in tqdm(range(0, len(texts), BATCH), desc=what, disable=not progress):
        part = texts[first : first + BATCH]
        with base.sites.hooked(recorder):
            base.logits(part, [0] * len(part), [None] * len(part), [])
        for rows in torch.split(recorder.rows, [len(text) for text in part]):
            total += rows[1:].mean(0).cpu()
    return total / len(texts)


class _Recorder:
    """An `Editor` that changes nothing and keeps the rows it sees."""

    def __init__(self, layer: int) -> None:
        self.sites: tuple[Site, ...] = ((layer, "block_output"),)
        self.rows = torch.empty(0)

    def apply(self, site: Site, hidden: Tensor) -> None:
        self.rows = hidden.float().clone()
