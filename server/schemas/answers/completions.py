"""Answers of POST /v1/completions and /v1/classify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from reft_runtime.outputs import FinishReason
from server.schemas.answers.base import (
    Applied,
    Created,
    Id,
    Index,
    PromptLogprobs,
    TokenIds,
    Traces,
    Usage,
    described,
)


@described
class CompletionLogprobs(TypedDict):
    """Log-probabilities of a choice's tokens, a list for each of their properties."""

    tokens: list[str]
    """Their texts."""
    token_logprobs: list[float | None]
    """Their log-probabilities (natural); null for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    """By text, the best tokens in their places, and the token itself."""
    text_offset: list[int]
    """Where they begin in `text`, in characters."""


@described
class CompletionChoice(TypedDict):
    """One of the `n` answers to one of the prompts, or what it gained."""

    index: Index
    text: str
    """Its text, behind the prompt's with `echo`."""
    logprobs: CompletionLogprobs | None
    """Log-probabilities of its tokens; null without `logprobs`."""
    finish_reason: FinishReason | None
    """Why it ended; null while a stream goes on."""
    token_ids: NotRequired[TokenIds]
    prompt_token_ids: NotRequired[Sequence[int] | None]
    """The prompt's token ids, in a stream in its first chunk; with `return_token_ids`."""
    prompt_logprobs: NotRequired[PromptLogprobs]


@described
class Completion(TypedDict):
    """What continues the prompts."""

    id: Id
    object: Literal["text_completion"]
    """Always `text_completion`."""
    created: Created
    model: Applied
    choices: list[CompletionChoice]
    """The `n` answers to each prompt."""
    usage: Usage
    """Numbers of tokens."""
    trace: NotRequired[Traces]


@described
class CompletionChunk(TypedDict):
    """One event of a streamed answer; `[DONE]` follows the last."""

    id: Id
    object: Literal["text_completion"]
    """Always `text_completion`."""
    created: Created
    model: Applied
    choices: list[CompletionChoice]
    """The choice that gained something; empty in a last chunk with `usage` or `trace`."""
    usage: NotRequired[Usage | None]
    """In the last chunk with `stream_options.include_usage`, before that null."""
    trace: NotRequired[Traces]


@described
class ClassifiedPrompt(TypedDict):
    """Which label answers one prompt."""

    index: int
    """Which prompt, from 0."""
    label: str
    """The likeliest label."""
    probs: Sequence[float]
    """The labels' probabilities among each other, in their order."""
    num_classes: int
    """How many labels there are."""


@described
class Classifications(TypedDict):
    """Which label answers each prompt."""

    id: Id
    object: Literal["list"]
    """Always `list`."""
    created: Created
    model: Applied
    labels: Sequence[str]
    """The labels to choose from."""
    data: list[ClassifiedPrompt]
    """An entry for each prompt."""
    usage: Usage
    """Numbers of tokens."""
