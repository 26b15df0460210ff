"""Answers of /tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from server.schemas.answers.base import described


@described
class Tokens(TypedDict):
    """The tokens of a text or a conversation."""

    tokens: Sequence[int]
    """Token ids."""
    count: int
    """How many there are."""
    max_model_len: int
    """Most tokens of a prompt and its answer together."""
    token_strs: NotRequired[list[str]]
    """The vocabulary's entry of each; with `return_token_strs`."""


@described
class Detokenized(TypedDict):
    """The text of token ids."""

    prompt: str
    """The text."""


@with_config(use_attribute_docstrings=True, extra="allow")
class TokenizerInfo(TypedDict):
    """What a client needs to write prompts itself.

    Every special token is a field more, such as `eos_token`.
    """

    tokenizer_class: str
    """The name of its class in transformers."""
    vocab_size: int
    """How many tokens it has."""
    model_max_length: int
    """Most tokens of a prompt and its answer together."""
    chat_template: str | None
    """The chat template, in Jinja."""
