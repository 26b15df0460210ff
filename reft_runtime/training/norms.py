"""Steering vectors measured by the base's own rows: the same strength at any layer or model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.edits.sites import Site
from reft_runtime.errors import ConfigError
from reft_runtime.interventions import Intervention
from reft_runtime.interventions.foreign.steering import check_scale
from reft_runtime.loading.base import load_base
from reft_runtime.machine.cores import use_threads
from reft_runtime.text import Tokenizer
from reft_runtime.training.forward import Base

TEXTS = (
    "The train to the coast leaves at nine, and it takes a little more than two hours.",
    "She opened the window because the room had been too warm all morning.",
    "Water boils at a lower temperature on a mountain than it does by the sea.",
    "How do I find out which of these two numbers is the larger one?",
    "He wrote a short letter to his brother, who lives in another country.",
    "First chop the onions, then fry them slowly in butter until they are soft.",
    "The company said on Tuesday that it would open three new offices next year.",
    "I have never seen so many birds in one place, and none of them made a sound.",
)
"""Plain sentences, whose rows are measured."""


def in_norms(
    intervention: Intervention,
    *,
    model: str | Path | PreTrainedModel = "demo",
    tokenizer: PreTrainedTokenizerBase | None = None,
    scale: float = 1.0,
    dtype: str = "auto",
    threads: int | None = None,
) -> Intervention:
    """The same steering vectors, each `scale` times as long as the base's rows at its place.

    So the strength of a request counts lengths of rows, times `scale`. A place's length is the mean
    of the rows of `TEXTS`, without the first row of each, which is far longer than all others; the
    manifest's `training.norms` has it for each edit. `model`, `tokenizer`, `dtype` and `threads`
    are those of `direction`. Raises `ConfigError` for edits that are no steering vectors, and
    `WrongBaseModel` for a place that the model does not have.
    """
    manifest = intervention.manifest
    check_scale(scale)
    for index, edit in enumerate(manifest.edits):
        if edit.kind != "steering":
            raise ConfigError(
                f"in-norms: edit {index} is {edit.kind}, and only vectors that are added have a"
                " length to change; leave it out.",
                param="in_norms",
            )
        if not intervention.tensors[f"edits.{index}.v"].any():
            raise ConfigError(
                f"in-norms: the vector of edit {index} is zero, and no factor gives it a length.",
                param="in_norms",
            )
    use_threads(threads)
    sites = [(edit.layer, edit.component) for edit in manifest.edits]
    _, loaded, own = load_base(model, tokenizer, dtype, None, differentiable=True)
    try:
        base = Base(loaded)
        for index, site in enumerate(sites):
            base.sites.check(*site, manifest.width_of(index))
        words = Tokenizer(own, loaded.max_model_len)
        rows = _RowNorms(sites, [words.encode(text, param="texts") for text in TEXTS])
        rows.measure(base)
    finally:
        loaded.give_back()
    norms = [rows.mean[site] for site in sites]
    tensors = dict(intervention.tensors)
    for index, norm in enumerate(norms):
        name = f"edits.{index}.v"
        vector = tensors[name].float()
        tensors[name] = (vector * (scale * norm / vector.norm())).to(tensors[name].dtype)
    measured = {**manifest.training, "norms": [round(norm, 4) for norm in norms]}
    return Intervention(manifest.model_copy(update={"training": measured}), tensors)


class _RowNorms:
    """An `Editor` that changes nothing and keeps the mean length of the rows of each site."""

    def __init__(self, sites: Sequence[Site], texts: list[list[int]]) -> None:
        self.sites: tuple[Site, ...] = tuple(dict.fromkeys(sites))
        self.mean: dict[Site, float] = {}
        self._texts = [ids for ids in texts if len(ids) > 1]

    @torch.no_grad()
    def measure(self, base: Base) -> None:
        """Run the texts through the model."""
        count = len(self._texts)
        with base.sites.hooked(self):
            base.logits(self._texts, [0] * count, [None] * count, [])

    def apply(self, site: Site, hidden: Tensor) -> None:
        """Measure the packed rows [T, d] of one site."""
        texts = torch.split(hidden, [len(ids) for ids in self._texts])
        self.mean[site] = float(torch.cat([rows[1:] for rows in texts]).float().norm(dim=1).mean())
