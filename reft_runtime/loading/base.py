"""Finds and loads the base model of a name, with its tokenizer."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.base.demo import locate
from reft_runtime.base.language import language_model
from reft_runtime.base.model import LoadedModel
from reft_runtime.base.ownership import claim, release
from reft_runtime.base.pretrained import read_config, read_tokenizer
from reft_runtime.base.shape import model_name
from reft_runtime.base.stages import stage
from reft_runtime.base.support import check_config, chosen_length
from reft_runtime.errors import ConfigError
from reft_runtime.loading.loader import adopt_model, load_model
from reft_runtime.machine.memory import keep_freed_memory
from reft_runtime.text import Tokenizer


def load_base(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
    max_model_len: int | None,
    *,
    device: str = "cpu",
    differentiable: bool = False,
    ranks: int = 1,
) -> tuple[str, LoadedModel, PreTrainedTokenizerBase]:
    """Name, model and tokenizer of "demo", a hub id, a folder, or a model in memory.

    A model in memory stays on its device, and nobody else may take it until
    `LoadedModel.give_back`; raises `ConfigError` if somebody has it already. `device`,
    `differentiable` and `ranks` are those of `load_model`.
    """
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ConfigError("tokenizer: give that of the model in memory.", param="tokenizer")
        name = model_name(model)
        model = language_model(model)
        claim(model)
        try:
            loaded = adopt_model(
                model, max_model_len, tokenizer=tokenizer, differentiable=differentiable
            )
        except BaseException:
            release(model)
            raise
    else:
        with stage("Finding the model"):
            path, name = locate(str(model))
            check_config(read_config(path))
            # The tokenizer is read before the weights, so that its faults are reported at once.
            tokenizer = tokenizer or read_tokenizer(path)
        loaded = load_model(
            path,
            dtype,
            max_model_len,
            tokenizer=tokenizer,
            device=device,
            differentiable=differentiable,
            ranks=ranks,
        )
    keep_freed_memory()
    return name, loaded, tokenizer


def read_words(model: str | Path) -> Tokenizer:
    """The tokenizer of "demo", a hub id or a folder; no weights are read."""
    path, _ = locate(str(model))
    config = read_config(path)
    check_config(config)
    return Tokenizer(read_tokenizer(path), chosen_length(config, None))
