"""The language model of a checkpoint that also sees or hears: its configuration and its weights.

The towers for images and sounds are left out: nothing of them is read, or kept. What remains is
one of transformers' causal language models, and is served as if its weights had come alone.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from reft_runtime.base.support import OTHERWISE
from reft_runtime.errors import UnsupportedModel

TEXT_KEYS = {
    r"^(?:model\.)?(?:language_model|text_model)\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "model.",
}
"""How checkpoints with several models name the weights of the language model, and what it does."""

_PLAIN = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Text models without a class of their own, and the model type that computes the same of a text.

They place tokens along three axes (M-RoPE), and those of a text lie at one place along all of them.
"""

_OF_THE_WHOLE = ("tie_word_embeddings", "eos_token_id", "quantization_config")
"""Fields whose value in the whole configuration counts for the language model too."""

_M_ROPE = ("mrope_section", "mrope_interleaved")


def language_config(config: PretrainedConfig) -> PretrainedConfig:
    """Configuration of the language model in a model that also sees or hears.

    It is `config` itself for other models, also for those that are refused by their type, and where
    the language model has no class of its own.
    """
    text = getattr(config, "text_config", None)
    if not isinstance(text, PretrainedConfig) or config.is_encoder_decoder:
        return config
    if config.model_type in OTHERWISE:
        return config
    if text.model_type in _PLAIN:
        found = _plain(text)
    elif text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found = deepcopy(text)
    else:
        return config
    for name in _OF_THE_WHOLE:
        if (value := getattr(config, name, None)) is not None:
            setattr(found, name, list(value) if isinstance(value, tuple) else value)
    return found


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The language model in a model object that also sees or hears, and shares its modules.

    It is `model` itself for other models. Raises `UnsupportedModel` if it cannot be taken out.
    """
    config = language_config(model.config)
    if config is model.config:
        return model
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    with torch.device("meta"):
        found: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=model.dtype, trust_remote_code=False
        )
    if type(decoder) is type(found):
        parts = dict(decoder.named_children())
    else:
        places = [name for name, one in found.named_children() if type(one) is type(decoder)]
        parts = dict.fromkeys(places, decoder)
    for name, part in parts.items():
        setattr(found, name, part)
    own_head = decoder.get_output_embeddings()
    found.set_output_embeddings(own_head or model.get_output_embeddings())  # type: ignore[no-untyped-call]
    if not parts or any(parameter.is_meta for parameter in found.parameters()):
        raise UnsupportedModel(
            f"Model type {model.config.model_type!r} is not supported as a model in memory: its"
            f" language model, {type(decoder).__name__}, is none that transformers has alone."
            " Save it, and give the folder."
        )
    found.generation_config = model.generation_config
    found.name_or_path = model.name_or_path
    return found  # type: ignore[no-any-return]


def _plain(text: PretrainedConfig) -> PretrainedConfig:
    fields = {name: value for name, value in text.to_dict().items() if name != "model_type"}
    rope = dict(fields.get("rope_parameters") or {})
    fields["rope_parameters"] = {key: rope[key] for key in rope if key not in _M_ROPE}
    if text.model_type == "qwen3_vl_moe_text":  # not a setting there: its router always does so
        fields["norm_topk_prob"] = True
    found: PretrainedConfig = AutoConfig.for_model(_PLAIN[text.model_type], **fields)
    return found
