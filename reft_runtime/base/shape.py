"""The shape of a base model, from its configuration alone: no weights are read."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from reft_runtime.base.demo import locate
from reft_runtime.base.pretrained import read_config
from reft_runtime.errors import ConfigError
from reft_runtime.interventions.format.manifest import BaseShape


def read_shape(model: str | Path | PreTrainedModel) -> BaseShape:
    """Shape of `demo`, a folder, a hub id or a transformers model; raises `ConfigError`."""
    if isinstance(model, PreTrainedModel):
        name = Path(model.name_or_path or "").name or type(model).__name__
        return base_shape(model.config, name)
    if not isinstance(model, str | Path):
        raise ConfigError(
            "model: give demo, a folder, a hub id or a transformers model, not"
            f" {type(model).__name__}.",
            param="model",
        )
    path, name = locate(str(model))
    return base_shape(read_config(path), name)


def read_base(model: str) -> tuple[BaseShape, PretrainedConfig]:
    """Shape and configuration of `demo`, a folder or a hub id; raises `ConfigError` of `base`."""
    try:
        path, name = locate(model)
        config = read_config(path)
        return base_shape(config, name), config
    except ConfigError as error:
        raise ConfigError(f"base: {error.message.removeprefix('model: ')}", param="base") from None


def base_shape(config: PretrainedConfig, name: str) -> BaseShape:
    """Shape of the causal language model that a configuration describes."""
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size")
    if not isinstance(architecture, str) or not all(hasattr(config, size) for size in sizes):
        raise ConfigError(
            f"model: {name!r} ({config.model_type}) is no causal language model of text alone.",
            param="model",
        )
    return BaseShape(
        model=name,
        architecture=architecture,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
    )


def count_parameters(config: PretrainedConfig) -> int:
    """Number of parameters of the model that a configuration describes."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    return model.num_parameters()
