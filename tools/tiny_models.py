"""Tiny random models of every decoder family of transformers, with the layers of the real ones.

A configuration keeps its family's own defaults, and so its pattern of layers, its norms, biases
and scalings; only sizes are made small. Greedy answers of these models vary with the prompt.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 320
HIDDEN = 32
MAX_LENGTH = 256
WINDOW = 8

MOST_LAYERS = 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.3,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # multi-head latent attention
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    # recurrent layers
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_n_groups": 1,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_groups": 1,
    "conv_kernel": 4,
    "chunk_size": 16,
    "conv_L_cache": 3,
    "lru_width": 32,
    "rotary_dim": 8,
    "query_pre_attn_scalar": 8,
    "attention_window_size": WINDOW,
}
"""What is made small, by the names of configurations."""

SEEN: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "depth": 1,
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "out_hidden_size": HIDDEN,
    "output_size": 32,
    "projection_dim": 32,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
"""Sizes of the parts that see and hear, by the same names."""

_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_ENCODER_DECODER = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LOCAL_AND_FULL = {"layer_types": [*3 * ["sliding_attention"], "full_attention"]}
_OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "cwm": _IDS,
    "dbrx": {
        "d_model": HIDDEN,
        "rope_parameters": _ROPE,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_top_k": 2},
    },
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": None, "head_dim": 16},
    "emu3_text_model": _IDS,
    "emu3_vqgan": {"base_channels": 32, "embed_dim": 32, "codebook_size": 64},
    "falcon_h1": {"mamba_n_heads": 4},
    "gemma3n_text": {
        "num_hidden_layers": 7,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
        "pad_token_id": 0,
    },
    "gemma4_unified_text": {
        "vocab_size_per_layer_input": VOCABULARY,
        "global_head_dim": 8,
        "pad_token_id": 0,
    },
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "bamba": {"attn_layer_indices": [3]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "num_hidden_layers": 3,
    },
    "laguna": _LOCAL_AND_FULL,
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "conv", "full_attention", "conv"],
        "num_dense_layers": 2,
    },
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "hidden_size": 32},
    "mellum": _LOCAL_AND_FULL,
    "minimax_m3_vl_text": {
        "layer_types": [
            "full_attention",
            "minimax_m3_sparse",
            "minimax_m3_sparse",
            "full_attention",
        ],
        "index_block_size": 8,
        "index_topk_blocks": 2,
    },
    "mllama_text_model": _IDS,
    "modernbert-decoder": _IDS,
    "moshi": {"audio_vocab_size": 64, "num_codebooks": 2, "ffn_dim": 96},
    "plbart": _ENCODER_DECODER,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 64,
        "partial_rotary_factor": 1.0,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 16)},
    "whisper": _ENCODER_DECODER,
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention"],
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What families need beside `SIZES`, because they name it otherwise or check it."""


def decoder_types() -> tuple[str, ...]:
    """The model types that transformers has a causal language model for."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a tiny model; `changes` are set last."""
    made = CONFIG_MAPPING[model_type]
    values = {**_sizes(made, SIZES), **_OWN.get(model_type, {})}
    if "kv_lora_rank" in values:
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name, part in _parts(made).items():
        if name not in values:
            sizes = SIZES if name in ("text_config", "decoder") else SEEN
            values[name] = {**_sizes(part, sizes), **_OWN.get(part.model_type, {})}
            values[name]["model_type"] = part.model_type
    return made(**{**values, **changes})


def tiny_model(config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model that is ready to generate greedily."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32
    )
    return ready(model)


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """A random model made ready to generate greedily, its constants made random."""
    # Norms' weights and all biases begin as constants: random ones show that each is applied.
    for name, parameter in model.named_parameters():
        if name.endswith(".sinks"):
            parameter.data = 2 * torch.randn_like(parameter)
        elif parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, num_beams=1
    )
    model.train(False)
    return model


def _parts(made: type[PretrainedConfig]) -> dict[str, type[PretrainedConfig]]:
    """The classes of the configurations in a configuration, by their names there."""
    try:
        default = made()
    except Exception:  # it has no defaults that go together
        return {}
    found = {name: type(getattr(default, name, None)) for name in made.sub_configs}
    return {
        name: part
        for name, part in found.items()
        if issubclass(part, PretrainedConfig) and part.model_type
    }


def _sizes(made: type[PretrainedConfig], sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a class of configurations has, by its names, with its pattern of layers."""
    names = {field.name for field in fields(made)} | {*(made.attribute_map or {})}
    values = {name: value for name, value in sizes.items() if name in names}
    try:
        kinds: list[str] | None = getattr(made(), "layer_types", None)
    except Exception:  # it has no defaults that go together
        kinds = None
    count = sizes["num_hidden_layers"]
    if kinds and sizes is SIZES:
        while set(kinds[:count]) != set(kinds) and count < MOST_LAYERS:
            count += 1
        values["num_hidden_layers"] = count
    return values
