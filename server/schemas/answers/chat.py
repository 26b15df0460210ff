"""Answers of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from server.schemas.answers.base import (
    Applied,
    Created,
    Id,
    Index,
    PromptLogprobs,
    PromptTokenIds,
    TokenIds,
    Traces,
    Usage,
    described,
)

ChatEnd = Literal["stop", "length", "tool_calls"]
"""Why a choice of a chat ended."""


@described
class TopLogprob(TypedDict):
    """One token and its log-probability."""

    token: str
    """Its text; bytes that are not whole characters are written out."""
    logprob: float
    """Its log-probability (natural); -9999 stands for minus infinity."""
    bytes: list[int]
    """Its text's bytes."""


@described
class ChatTokenLogprob(TypedDict):
    """A token of the answer, and the best in its place."""

    token: str
    """Its text; bytes that are not whole characters are written out."""
    logprob: float
    """Its log-probability (natural); -9999 stands for minus infinity."""
    bytes: list[int]
    """Its text's bytes."""
    top_logprobs: list[TopLogprob]
    """The best tokens in its place, as many as `top_logprobs` asked for."""


@described
class ChatLogprobs(TypedDict):
    """Log-probabilities of a choice's tokens."""

    content: list[ChatTokenLogprob]
    """An entry for each token."""
    refusal: None
    """Always null."""


@described
class CalledFunction(TypedDict):
    """The function that the model calls."""

    name: str
    """One of the request's `tools`."""
    arguments: str
    """Its arguments: the text of a JSON object."""


@described
class ChatToolCall(TypedDict):
    """A call that the model asks for."""

    id: str
    """What the result's `tool_call_id` names."""
    type: Literal["function"]
    """Always `function`."""
    function: CalledFunction
    """The function, and its arguments."""


@described
class ChatMessage(TypedDict):
    """A turn of the assistant."""

    role: Literal["assistant"]
    """Always `assistant`."""
    content: str | None
    """The answer's text; null if there are only calls, or if it ended while it thought."""
    refusal: None
    """Always null."""
    reasoning_content: NotRequired[str]
    """What the model thought before its answer."""
    tool_calls: NotRequired[list[ChatToolCall]]
    """Calls that the model asks for."""


@described
class ChatChoice(TypedDict):
    """One of the `n` answers."""

    index: Index
    message: ChatMessage
    """The assistant's turn."""
    logprobs: ChatLogprobs | None
    """Log-probabilities of its tokens; null without `logprobs`."""
    finish_reason: ChatEnd
    """Why it ended."""
    token_ids: NotRequired[TokenIds]


@described
class ChatCompletion(TypedDict):
    """The answer to a conversation."""

    id: Id
    object: Literal["chat.completion"]
    """Always `chat.completion`."""
    created: Created
    model: Applied
    choices: list[ChatChoice]
    """The `n` answers."""
    usage: Usage
    """Numbers of tokens."""
    prompt_token_ids: NotRequired[PromptTokenIds]
    prompt_logprobs: NotRequired[PromptLogprobs]
    trace: NotRequired[Traces]


@described
class FunctionDelta(TypedDict):
    """More of a call's function."""

    name: NotRequired[str]
    """The function, in the call's first piece."""
    arguments: str
    """More of its arguments' text."""


@described
class ToolCallDelta(TypedDict):
    """More of a call."""

    index: int
    """Which call of the answer, from 0."""
    id: NotRequired[str]
    """What the result's `tool_call_id` names, in the call's first piece."""
    type: NotRequired[Literal["function"]]
    """Always `function`, in the call's first piece."""
    function: FunctionDelta
    """More of its function."""


@described
class ChatDelta(TypedDict):
    """What a choice gained; only what there is more of."""

    role: NotRequired[Literal["assistant"]]
    """In a choice's first chunk."""
    content: NotRequired[str | None]
    """More of the answer's text; null in the first chunk of a chat with tools."""
    reasoning_content: NotRequired[str]
    """More of what the model thinks before its answer."""
    tool_calls: NotRequired[list[ToolCallDelta]]
    """More of its calls."""


@described
class ChatChunkChoice(TypedDict):
    """What one choice gained."""

    index: Index
    delta: ChatDelta
    """What it gained."""
    logprobs: ChatLogprobs | None
    """Log-probabilities of the new tokens; null without `logprobs`."""
    finish_reason: ChatEnd | None
    """Why it ended; null while it goes on."""
    token_ids: NotRequired[TokenIds]


@described
class ChatCompletionChunk(TypedDict):
    """One event of a streamed answer; `[DONE]` follows the last."""

    id: Id
    object: Literal["chat.completion.chunk"]
    """Always `chat.completion.chunk`."""
    created: Created
    model: Applied
    choices: list[ChatChunkChoice]
    """The choice that gained something; empty in a last chunk with `usage` or `trace`."""
    usage: NotRequired[Usage | None]
    """In the last chunk with `stream_options.include_usage`, before that null."""
    prompt_token_ids: NotRequired[PromptTokenIds]
    trace: NotRequired[Traces]
