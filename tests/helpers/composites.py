"""Tiny random models that also see or hear, as folders of transformers hold them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)

from tests.helpers.models import HIDDEN, MAX_LENGTH, VOCABULARY, WINDOW
from tools import tiny_models

EOS = [2, 7]
"""Of the whole configuration; the text model's own ends differ."""

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
_VISION |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
_QWEN_VISION = {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2}
_QWEN_VISION |= {"out_hidden_size": HIDDEN}
_M_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_STATES = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
_STATES |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}

OF_TYPE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        _VISION,
    ),
    "gemma4": (
        "gemma4_text",
        {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
        _VISION | {"model_type": "gemma4_vision"},
    ),
    "mistral3": ("mistral", {}, _VISION),
    "llama4": (
        "llama4_text",
        {"intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": WINDOW},
        _VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "qwen3_5": ("qwen3_5_text", _STATES, _QWEN_VISION),
    "qwen2_5_vl": ("qwen2_5_vl_text", {"rope_parameters": _M_ROPE}, _QWEN_VISION),
    "qwen3_vl_moe": (
        "qwen3_vl_moe_text",
        _EXPERTS | {"rope_parameters": _M_ROPE},
        _QWEN_VISION | {"deepstack_visual_indexes": [0]},
    ),
    "voxtral": ("llama", {}, {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}),
}
"""By model type: the type of its text model, and what is special of that and of its tower."""


def composite(model_type: str, **changes: Any) -> PreTrainedModel:
    """A random float32 model with a tower; `changes` are fields of its whole configuration."""
    text_type, text, tower = OF_TYPE[model_type]
    text_config = {**_TEXT, **text, "model_type": text_type}
    known = AutoConfig.for_model(text_type).to_dict()
    text_config = {k: v for k, v in text_config.items() if k in known}
    values = {
        "audio_config" if model_type == "voxtral" else "vision_config": tower,
        "text_config": text_config,
        "eos_token_id": EOS,
        **changes,
    }
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForMultimodalLM.from_config(  # type: ignore[no-untyped-call]
        AutoConfig.for_model(model_type, **values), dtype=torch.float32
    )
    return tiny_models.ready(model)
