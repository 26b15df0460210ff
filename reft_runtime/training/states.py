"""Hidden states of texts: the mean over a text's tokens, at several layers by one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.base.shape import shape_of
from reft_runtime.edits.sites import Site
from reft_runtime.errors import ConfigError
from reft_runtime.interventions import BaseShape, Positions
from reft_runtime.loading.base import load_base
from reft_runtime.progress import bar
from reft_runtime.text import Tokenizer
from reft_runtime.training.forward import Base

BATCH = 32


def states_of(
    sets: Mapping[str, Sequence[str]],
    layers: Sequence[int],
    where: Positions | None,
    *,
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    template: str | None,
    dtype: str,
    progress: bool,
) -> tuple[BaseShape, list[Tensor]]:
    """The base's shape, and for each of the named sets what its texts give, [texts, layers, d].

    That is the output of each layer, the mean over the text's tokens at `where`; None is all but
    the first. A text without such tokens is left out. The states are in float32 on the CPU. Raises
    `ConfigError` that names the set.
    """
    name, loaded, own = load_base(model, tokenizer, dtype, None, differentiable=True)
    try:
        base, words = Base(loaded), Tokenizer(own, loaded.max_model_len)
        for layer in layers:
            base.sites.check(layer, "block_output", loaded.hidden_size)
        found = []
        for what, texts in sets.items():
            rows = [_rows(words, what, text, template, where) for text in texts]
            longest = max((len(ids) for ids, _ in rows), default=0)
            if longest > words.max_model_len:
                raise ConfigError(
                    f"{what}: a text has {longest:,} tokens, and the model takes"
                    f" {words.max_model_len:,}; shorten it.",
                    param=what,
                )
            rows = [(ids, places) for ids, places in rows if places]
            if not rows:
                place = "two tokens or more" if where is None else f"tokens at {where}"
                raise ConfigError(f"{what}: there is no text of {place}.", param=what)
            found.append(_means(base, layers, rows, what, progress=progress))
        return shape_of(name, loaded), found
    finally:
        loaded.give_back()


def _rows(
    words: Tokenizer, what: str, text: str, template: str | None, where: Positions | None
) -> tuple[list[int], list[int]]:
    """Token ids of one text, and which of them are read."""
    if template is None:
        ids = words.encode(text, param=what)
    else:
        ids = words.encode_chat([{"role": "user", "content": text}], template)
    count = len(ids)
    return ids, [*range(1, count)] if where is None else where.offsets(count, 0, count)


@torch.no_grad()
def _means(
    base: Base,
    layers: Sequence[int],
    texts: list[tuple[list[int], list[int]]],
    what: str,
    *,
    progress: bool,
) -> Tensor:
    """The means [texts, layers, d] of texts, each its ids and the tokens that are read."""
    found = []
    for first in bar(range(0, len(texts), BATCH), desc=what, disable=not progress):
        part = texts[first : first + BATCH]
        recorder = _Recorder(layers, part)
        with base.sites.hooked(recorder):
            base.logits([ids for ids, _ in part], [0] * len(part), [None] * len(part), [])
        found.append(torch.stack([recorder.means[layer] for layer in layers], dim=1))
    return torch.cat(found)


class _Recorder:
    """An `Editor` that changes nothing and keeps the mean of each text's rows, by layer."""

    def __init__(self, layers: Sequence[int], texts: list[tuple[list[int], list[int]]]) -> None:
        self.sites: tuple[Site, ...] = tuple((layer, "block_output") for layer in layers)
        self.means: dict[int, Tensor] = {}
        self._lengths = [len(ids) for ids, _ in texts]
        self._places = [places for _, places in texts]

    def apply(self, site: Site, hidden: Tensor) -> None:
        texts = zip(torch.split(hidden, self._lengths), self._places, strict=True)
        self.means[site[0]] = torch.stack([rows[at].float().mean(0) for rows, at in texts]).cpu()
