"""The shape of a base model, from its configuration alone: no weights are read."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from reft_runtime.base.demo import locate
from reft_runtime.base.language import language_config
from reft_runtime.base.model import LoadedModel
from reft_runtime.base.pretrained import read_config
from reft_runtime.errors import ConfigError
from reft_runtime.interventions.format.manifest import BaseShape


def base_shape(model: str | Path | PreTrainedModel) -> BaseShape:
    """The shape of "demo", a folder, a hub id or a transformers model; no weights are read.

    Raises `ConfigError`.
    """
    if isinstance(model, PreTrainedModel):
        config = language_config(model.config)
        if config is not model.config:
            return _configured(config, model_name(model))
        return _shape(config, model_name(model), type(model).__name__)
    if not isinstance(model, str | Path):
        raise ConfigError(
            "model: give demo, a folder, a hub id or a transformers model, not"
            f" {type(model).__name__}.",
            param="model",
        )
    path, name = locate(str(model))
    return _configured(read_config(path), name)


def read_base(model: str) -> tuple[BaseShape, PretrainedConfig]:
    """Shape and configuration of `demo`, a folder or a hub id.

    Raises `ConfigError`, whose `param` is `base`.
    """
    try:
        path, name = locate(model)
        config = read_config(path)
        return _configured(config, name), config
    except ConfigError as error:
        raise ConfigError(f"base: {error.message.removeprefix('model: ')}", param="base") from None


def model_name(model: PreTrainedModel) -> str:
    """The name of a model in memory: the place it was loaded from, else its class."""
    return Path(model.name_or_path or "").name or type(model).__name__


def shape_of(name: str, loaded: LoadedModel) -> BaseShape:
    """The shape of a loaded model, which interventions are checked against."""
    return _shape(loaded.model.config, name, loaded.architecture)


def _shape(config: PretrainedConfig, name: str, architecture: str) -> BaseShape:
    return BaseShape(
        model=name,
        architecture=architecture,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
    )


def _configured(config: PretrainedConfig, name: str) -> BaseShape:
    """Shape of the causal language model that a configuration describes."""
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size")
    if not isinstance(architecture, str) or not all(hasattr(config, size) for size in sizes):
        raise ConfigError(
            f"model: {name!r} ({config.model_type}) is no causal language model, and has none in"
            " it.",
            param="model",
        )
    return _shape(config, name, architecture)


def count_parameters(config: PretrainedConfig) -> int:
    """Number of parameters of the model that a configuration describes."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    return model.num_parameters()
