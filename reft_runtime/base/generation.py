"""What counts of a model's own generation settings: the ids that end an answer, and no more.

The rest (penalties, banned tokens, temperatures) is for each request to say.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NO_SETTINGS = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "transformers_version",
    "max_length",
    "max_new_tokens",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "trust_remote_code",
}
"""Fields of a generation config that change no token of an answer, nor its greatest length."""

_GREEDY = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0}
"""Values that match what a request without settings of its own gets anyway."""

_log = logging.getLogger(__name__)


def ends_of_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> frozenset[int]:
    """Ids of the tokens that end an answer, for serving and for training alike.

    They are those of the model's generation config, or of its configuration if that has none, and
    the tokenizer's, which training writes at a completion's end. Some configurations write -1 for
    none: ids outside of the vocabulary end nothing.
    """
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = model.config.eos_token_id if ends is None else ends
    found = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(one for one in found if 0 <= one < model.config.vocab_size)


def tell_ignored(model: PreTrainedModel) -> None:
    """Log, in one line, the model's own generation settings that are not applied."""
    settings = ignored_settings(model)
    if settings:
        listed = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        _log.warning(
            "The model's own generation settings are not applied (%s): requests say theirs.",
            listed,
        )


def ignored_settings(model: PreTrainedModel) -> dict[str, Any]:
    """The settings of the model's generation config that would make `model.generate` differ."""
    if model.generation_config is None:
        return {}
    return {
        name: value
        for name, value in model.generation_config.to_diff_dict().items()
        if value is not None
        and name not in _NO_SETTINGS
        and not name.startswith("_")
        and _GREEDY.get(name) != value
    }
