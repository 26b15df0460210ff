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
from reft_runtime.interventions import BaseShape, Edit, Intervention, Positions
from reft_runtime.loading.base import load_base
from reft_runtime.machine.cores import use_threads
from reft_runtime.text import Tokenizer
from reft_runtime.training.forward import Base
from reft_runtime.training.settings import parsed_positions

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
    name, loaded, own = load_base(model, tokenizer, dtype, None, differentiable=True)
    try:
        base, words = Base(loaded), Tokenizer(own, loaded.max_model_len)
        base.sites.check(layer, "block_output", loaded.hidden_size)
        means = []
        for what, texts in (("positive", positive), ("negative", negative)):
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
                place = "two tokens or more" if read is None else f"tokens at {read}"
                raise ConfigError(f"{what}: there is no text of {place}.", param=what)
            means.append(_mean(base, layer, rows, what, progress))
        vector = scale * (means[0] - means[1])
    finally:
        loaded.give_back()
    if not vector.any():
        raise ConfigError(
            "The vector is zero, and would change nothing: the scale is 0, or the means of both"
            " texts are equal."
        )
    return made(shape_of(name, loaded), vector)


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
def _mean(
    base: Base,
    layer: int,
    texts: list[tuple[list[int], list[int]]],
    what: str,
    progress: bool,
) -> Tensor:
    """The mean over texts, each its ids and the tokens that are read, of the mean over these."""
    recorder = _Recorder(layer)
    total = torch.zeros(base.loaded.hidden_size)
    for first in tqdm(range(0, len(texts), BATCH), desc=what, disable=not progress):
        part = texts[first : first + BATCH]
        with base.sites.hooked(recorder):
            base.logits([ids for ids, _ in part], [0] * len(part), [None] * len(part), [])
        states = torch.split(recorder.rows, [len(ids) for ids, _ in part])
        for rows, (_, places) in zip(states, part, strict=True):
            total += rows[places].mean(0).cpu()
    return total / len(texts)


class _Recorder:
    """An `Editor` that changes nothing and keeps the rows it sees."""

    def __init__(self, layer: int) -> None:
        self.sites: tuple[Site, ...] = ((layer, "block_output"),)
        self.rows = torch.empty(0)

    def apply(self, site: Site, hidden: Tensor) -> None:
        self.rows = hidden.float().clone()
