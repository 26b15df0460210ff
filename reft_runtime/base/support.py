"""Decides by a model's configuration whether the engine takes it; a refusal says the reason."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from reft_runtime.base import quantised
from reft_runtime.errors import ConfigError, UnsupportedModel

SUPPORTED_LAYER_TYPES = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
    "conv",
    "mamba",
    "hybrid",
    "moe",
    "mlp",
}

TUNED = "attn_temperature_tuning"
"""Setting of Llama 4's configuration and attention: whether queries are scaled by position."""

RECURRENT_LAYER_TYPES = {"linear_attention", "mamba", "conv"}

LONGEST_RECURRENT = 1 << 17
"""Longest sequence, in tokens, of a model whose layers are all recurrent and that names none."""

_REASONS = {"indexed_attention": "an indexer chooses which keys each token sees"}
"""Why layers of a type are not served."""

ENCODERS = {
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"),
    *("roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Model types whose tokens see those behind them, unless the configuration has `is_decoder`."""

OTHERWISE = {
    "cpmant": "its tokens see those behind them in a prompt",
    "gemma4_assistant": "it drafts for another model",
    "gemma4_unified_assistant": "it drafts for another model",
    "git": "it describes images",
    "hrm_text": "its layers run several times for a token",
    "longcat_flash": "a layer attends more than once",
    "musicgen": "it makes sound",
    "musicgen_melody": "it makes sound",
    "xlm": "it is trained to fill gaps, not to go on",
    "xlnet": "it is trained on permutations of a text, and has no largest length",
}
"""Why some model types are no decoders as the engine runs them."""


def check_config(config: PretrainedConfig) -> None:
    """Raise `UnsupportedModel` for a model that the engine would compute differently."""
    if config.is_encoder_decoder:
        raise refuse(config, "it is an encoder-decoder")
    if reason := quantised.why_refused(config):
        raise refuse(config, reason)
    if config.model_type in OTHERWISE:
        raise refuse(config, OTHERWISE[config.model_type])
    if getattr(config, "text_config", None):
        raise refuse(
            config, "it also sees or hears, and transformers has its language model in no class"
        )
    if hasattr(config, "decoder_layers") or hasattr(config, "num_decoder_layers"):
        raise refuse(config, "it is the decoder of an encoder-decoder, made for what that encodes")
    if config.model_type in ENCODERS and not config.is_decoder:
        raise refuse(config, "it is an encoder: its tokens see those behind them")
    ours = type(config).__module__.startswith("transformers.")
    if ours and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise refuse(config, "it is no causal language model")
    for size in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if not isinstance(getattr(config, size, None), int):
            raise refuse(config, f"its configuration does not say its {size}")
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        raise refuse(config, "ALiBi position biases")
    # "vision" concerns images alone.
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):
        raise refuse(config, "bidirectional attention")
    kinds = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES
    if kinds:
        kind = min(kinds)
        raise refuse(config, f"{_REASONS.get(kind, 'another kind of layers')} ({kind})")


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
    """Longest sequence in tokens: all learned positions, but only as far as angles are fixed.

    Past its original length, longrope and dynamic NTK rotate all tokens otherwise. Llama 4 scales
    queries by their positions, which it counts from the beginning of a forward pass; only sequences
    whose scales are all 1 are served.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None and RECURRENT_LAYER_TYPES.issuperset(
        getattr(config, "layer_types", None) or ("other",)
    ):
        limit = LONGEST_RECURRENT
    if not isinstance(limit, int) or limit < 1:
        raise refuse(config, "it does not say its maximum length (max_position_embeddings)")
    for rope in _rope_settings(config):
        if rope.get("rope_type") in ("longrope", "dynamic"):
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            limit = min(limit, original or limit)
    if getattr(config, TUNED, False):
        limit = min(limit, int(config.floor_scale) - 1)
    return limit
