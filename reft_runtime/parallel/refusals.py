"""Which models several ranks can compute: told by a configuration, before anything is loaded."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from reft_runtime.base.quantised import keeps_quantised
from reft_runtime.base.recurrent import find_mixers
from reft_runtime.errors import ConfigError

_HEADS = (
    "num_attention_heads",
    "num_key_value_heads",
    "num_global_key_value_heads",
    "num_kv_heads",
)


def check_devices(device: str, count: int) -> None:
    """Raise `ConfigError` unless this machine has so many devices of a kind, one for each rank."""
    there = torch.cuda.device_count()
    if device not in ("cpu", "cuda"):
        raise refused(f"give --device cuda, not {device}: ranks take cuda:0 and those after it")
    if device == "cuda" and count > there:
        raise refused(f"the ranks here need {count} CUDA devices, and torch sees {there}")
    if device == "cpu" and there:
        raise refused(
            "on a CPU the ranks must see no CUDA device: set CUDA_VISIBLE_DEVICES to an empty"
            " value, or give --device cuda"
        )


def check_shards(config: PretrainedConfig, ranks: int) -> None:
    """Raise `ConfigError`, with the reason, for a model that is not split over so many ranks."""
    kind = f"model type {config.model_type!r}"
    if keeps_quantised(config) or getattr(config, "quantization_config", None):
        raise refused("a quantised base is not split; take the model that it was made from")
    for name in _HEADS:
        value = getattr(config, name, None)
        for heads in value if isinstance(value, list | tuple) else [value]:
            if isinstance(heads, int) and heads % ranks:
                raise refused(f"{name} of the model is {heads}, which {ranks} does not divide")
    if getattr(config, "kv_lora_rank", None):
        raise refused(f"{kind} is not split: it keeps latents, which belong to all heads")
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    if find_mixers(model):
        raise refused(f"{kind} is not split: it has recurrent layers")
    if not any("*" in name for name in model.tp_plan):  # of layers
        raise refused(f"{kind} is not split: transformers has no plan for its layers (tp_plan)")


def refused(reason: str) -> ConfigError:
    """The error for a start with several ranks that cannot be."""
    return ConfigError(f"tensor_parallel: {reason}.", param="tensor_parallel")
