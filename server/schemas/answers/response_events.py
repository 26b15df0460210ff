"""Events of a streamed answer of POST /v1/responses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from server.schemas.answers.base import ErrorObject, described
from server.schemas.answers.chat import ChatTokenLogprob
from server.schemas.answers.responses import (
    ItemId,
    OutputItem,
    OutputText,
    ReasoningText,
    ResponseObject,
)

Number = Annotated[int, Field(description="Counts the events of the stream, from 0.")]
Place = Annotated[int, Field(description="The item's place in the output, from 0.")]
PartPlace = Annotated[Literal[0], Field(description="The part's place in the item: always 0.")]


@described
class ResponseEvent(TypedDict):
    """The answer begins or ends."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: Number
    response: ResponseObject
    """The answer as it is now."""


@described
class ItemEvent(TypedDict):
    """An item begins or ends."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: Number
    output_index: Place
    item: OutputItem
    """The item as it is now."""


@described
class PartEvent(TypedDict):
    """An item's text begins or ends."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: Number
    item_id: ItemId
    output_index: Place
    content_index: PartPlace
    part: OutputText | ReasoningText
    """The text as it is now."""


@described
class TextDeltaEvent(TypedDict):
    """More of a message's text."""

    type: Literal["response.output_text.delta"]
    sequence_number: Number
    item_id: ItemId
    output_index: Place
    content_index: PartPlace
    delta: str
    """What it gained."""
    logprobs: list[ChatTokenLogprob]
    """Log-probabilities of the new tokens, if they were asked for."""


@described
class TextDoneEvent(TypedDict):
    """The whole of a message's text."""

    type: Literal["response.output_text.done"]
    sequence_number: Number
    item_id: ItemId
    output_index: Place
    content_index: PartPlace
    text: str
    """The text."""
    logprobs: list[ChatTokenLogprob]
    """Log-probabilities of its tokens, if they were asked for."""


@described
class ReasoningDeltaEvent(TypedDict):
    """More of what is thought."""

    type: Literal["response.reasoning_text.delta"]
    sequence_number: Number
    item_id: ItemId
    output_index: Place
    content_index: PartPlace
    delta: str
    """What it gained."""


@described
class ReasoningDoneEvent(TypedDict):
    """The whole of what was thought."""

    type: Literal["response.reasoning_text.done"]
    sequence_number: Number
    item_id: ItemId
    output_index: Place
    content_index: PartPlace
    text: str
    """The text."""


@described
class ArgumentsDeltaEvent(TypedDict):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    sequence_number: Number
    item_id: ItemId
    output_index: Place
    delta: str
    """What they gained."""


@described
class ArgumentsDoneEvent(TypedDict):
    """The whole of a call's arguments."""

    type: Literal["response.function_call_arguments.done"]
    sequence_number: Number
    item_id: ItemId
    output_index: Place
    name: str
    """The function."""
    arguments: str
    """The text of a JSON object."""


@described
class ErrorEvent(TypedDict):
    """Why a stream that had begun cannot go on."""

    type: Literal["error"]
    sequence_number: Number
    code: str | None
    """A word for programs."""
    message: str
    """What is wrong."""
    param: str | None
    """The field at fault."""
    error: ErrorObject
    """The same as one object."""


RESPONSE_EVENTS = (
    ResponseEvent,
    ItemEvent,
    PartEvent,
    TextDeltaEvent,
    TextDoneEvent,
    ReasoningDeltaEvent,
    ReasoningDoneEvent,
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
    ErrorEvent,
)
"""All of them; an event's `type` says which it is."""
