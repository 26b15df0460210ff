"""Answers of POST /v1/responses, and the items in them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from server.schemas.answers.base import Applied, Created, Id, Traces, described
from server.schemas.answers.chat import ChatTokenLogprob

ItemStatus = Annotated[
    Literal["in_progress", "completed", "incomplete"],
    Field(description="Whether the item is whole; `incomplete` if its length was reached."),
]
ItemId = Annotated[str, Field(description="The item's id.")]


@described
class OutputText(TypedDict):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    """The text."""
    annotations: Annotated[list[Any], Field(max_length=0)]
    """Always empty."""
    logprobs: list[ChatTokenLogprob]
    """Log-probabilities of its tokens, if they were asked for."""


@described
class ReasoningText(TypedDict):
    """The text of what was thought."""

    type: Literal["reasoning_text"]
    text: str
    """The text."""


@described
class OutputMessage(TypedDict):
    """A message of the assistant."""

    id: ItemId
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    """Always `assistant`."""
    content: list[OutputText]
    """Its one text; empty while it begins."""


@described
class OutputReasoning(TypedDict):
    """What the model thought before its answer."""

    id: ItemId
    type: Literal["reasoning"]
    status: ItemStatus
    summary: Annotated[list[Any], Field(max_length=0)]
    """Always empty."""
    content: list[ReasoningText]
    """Its one text; empty while it begins."""


@described
class OutputFunctionCall(TypedDict):
    """A call that the model asks for."""

    id: ItemId
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    """What the output's `call_id` names."""
    name: str
    """One of the request's `tools`."""
    arguments: str
    """Its arguments: the text of a JSON object."""


OutputItem = OutputMessage | OutputReasoning | OutputFunctionCall


@described
class InputTokensDetails(TypedDict):
    """What is known of the input's tokens."""

    cached_tokens: int
    """Those whose keys and values came from the prefix cache."""
    cache_write_tokens: int
    """Always 0."""


@described
class OutputTokensDetails(TypedDict):
    """What is known of the output's tokens."""

    reasoning_tokens: int
    """Those with which the model thought before its answer."""


@described
class ResponseUsage(TypedDict):
    """Numbers of tokens."""

    input_tokens: int
    """Tokens of the input, instructions and tools included."""
    input_tokens_details: InputTokensDetails
    """What is known of them."""
    output_tokens: int
    """Tokens that were generated."""
    output_tokens_details: OutputTokensDetails
    """What is known of them."""
    total_tokens: int
    """The sum of both."""


@described
class ResponseError(TypedDict):
    """Why an answer that had begun failed."""

    code: Literal["server_error"]
    """Always `server_error`."""
    message: str
    """What is wrong."""


@described
class IncompleteDetails(TypedDict):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens"]
    """Its length was reached."""


@described
class AskedReasoning(TypedDict):
    """How much thinking the request asked for."""

    effort: str | None
    """As in the request."""
    summary: None
    """Always null."""


@described
class AskedText(TypedDict):
    """The form of the answer that the request asked for."""

    format: dict[str, Any]
    """As in the request."""
    verbosity: str
    """As in the request."""


@described
class ResponseObject(TypedDict):
    """The answer to a text or a conversation; fields of the request are repeated in it."""

    id: Id
    object: Literal["response"]
    """Always `response`."""
    created_at: Created
    completed_at: int | None
    """When it ended, in Unix seconds; null unless its status is `completed`."""
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    """Whether it is whole."""
    error: ResponseError | None
    """Why it failed."""
    incomplete_details: IncompleteDetails | None
    """Why it is not whole."""
    model: Applied
    output: list[OutputItem]
    """What was thought, the message, and calls."""
    usage: ResponseUsage | None
    """Numbers of tokens; null while it goes on."""
    background: Literal[False]
    """Always false."""
    instructions: str | None
    """As in the request."""
    max_output_tokens: int | None
    """As in the request."""
    metadata: dict[str, str]
    """As in the request."""
    parallel_tool_calls: bool
    """As in the request."""
    previous_response_id: None
    """Always null: nothing is stored."""
    reasoning: AskedReasoning
    """As in the request."""
    store: Literal[False]
    """Always false."""
    temperature: float
    """As in the request."""
    text: AskedText
    """As in the request."""
    tool_choice: str | dict[str, Any]
    """As in the request."""
    tools: list[dict[str, Any]]
    """As in the request."""
    top_logprobs: int
    """As in the request."""
    top_p: float
    """As in the request."""
    truncation: Literal["disabled"]
    """Always `disabled`."""
    trace: NotRequired[Traces]
