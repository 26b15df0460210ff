"""Decides by a model's configuration whether the engine takes it; a refusal says the reason."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from reft_runtime.errors import ConfigError, UnsupportedModel

SUPPORTED_LAYER_TYPES = {
    "full_attention",
    "sliding_attention",
    "linear_attention",
    "conv",
    "mamba",
    "hybrid",
    "moe",
    "mlp",
}


RECURRENT_LAYER_TYPES = {"linear_attention", "mamba", "conv"}

LONGEST_RECURRENT = 1 << 17
"""Longest sequence, in tokens, of a model whose layers are all recurrent and that names none."""

_REASONS = {"indexed_attention": "an indexer chooses which keys each token sees"}
"""Why layers of a type are not served."""


def check_config(config: PretrainedConfig) -> None:
    """Raise `UnsupportedModel` for a model that the engine would compute differently."""
    if config.is_encoder_decoder:
        raise refuse(config, "it is an encoder-decoder")
    if getattr(config, "quantization_config", None):
        raise refuse(config, f"its weights are quantised ({_method(config)}); {_UNQUANTISED}")
    if getattr(config, "vision_config", None) or getattr(config, "audio_config", None):
        raise refuse(config, "it is multimodal; its text model alone may be served")
    ours = type(config).__module__.startswith("transformers.")
    if ours and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise refuse(config, "it is no causal language model")
    if getattr(config, "kv_lora_rank", None):
        raise refuse(config, "multi-head latent attention (MLA)")
    if getattr(config, "attn_logit_softcapping", None) or getattr(
        config, "final_logit_softcapping", None
    ):
        raise refuse(config, "logit soft-capping")
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        raise refuse(config, "ALiBi position biases")
    if getattr(config, "use_bidirectional_attention", False):
        raise refuse(config, "bidirectional attention")
    kinds = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES
    for kind in sorted(kinds):
        raise refuse(config, f"{_REASONS.get(kind, 'another kind of layers')} ({kind})")
    for rope in _rope_settings(config):
        if rope.get("rope_type") == "dynamic":
            raise refuse(config, "dynamic NTK rotary scaling, which depends on the batch's length")


_UNQUANTISED = "take the model that it was made from, in bfloat16 or float32"


def _method(config: PretrainedConfig) -> str:
    quantization: Any = config.quantization_config
    found = quantization if isinstance(quantization, dict) else vars(quantization)
    return str(found.get("quant_method") or "by an unknown method").rpartition(".")[2].lower()


def chosen_length(config: PretrainedConfig, wanted: int | None) -> int:
    """Longest sequence to be served, in tokens: `wanted`, or all that the model can take.

    Raises `ConfigError` if `wanted` is out of range.
    """
    limit = _length_limit(config)
    if wanted is None:
        return limit
    if not 1 <= wanted <= limit:
        raise ConfigError(
            f"max_model_len must be from 1 to {limit} for this model, not {wanted}.",
            param="max_model_len",
        )
    return wanted


def refuse(config: PretrainedConfig, reason: str) -> UnsupportedModel:
    """The error that refuses a model, in one line."""
    return UnsupportedModel(f"Model type {config.model_type!r} is not supported: {reason}.")


def _rope_settings(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Rotary settings; some models have one for each layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _length_limit(config: PretrainedConfig) -> int:
    """Longest sequence in tokens: all learned positions, but only longrope's original length."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None and RECURRENT_LAYER_TYPES.issuperset(
        getattr(config, "layer_types", None) or ("other",)
    ):
        limit = LONGEST_RECURRENT
    if not isinstance(limit, int):
        raise refuse(config, "it does not say its maximum length (max_position_embeddings)")
    for rope in _rope_settings(config):
        if rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            limit = min(limit, original or limit)
    return limit
