"""Body of POST /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from reft_runtime.sampling import MAX_LOGPROBS
from server.schemas.base import OnlyFalse, RequestBody
from server.schemas.chat import MAX_MESSAGES, MAX_PARTS, ChatSwitches
from server.schemas.common import (
    MAX_TOKENS,
    NO_EFFECT,
    NOT_USED,
    ONLY_DEFAULT,
    Sampled,
    one_or_many,
)

LOGPROBS = "message.output_text.logprobs"
"""What `include` says for log-probabilities; `top_logprobs` asks for them, too."""


Kind = Literal["message", "function_call", "function_call_output", "reasoning"]
"""What an item of the input may be."""


class Part(RequestBody):
    """A piece of text. What an earlier answer had beside its text is taken and not used."""

    type: Literal["input_text", "output_text"]
    text: str = Field(description="The text.")
    annotations: list[Any] = Field(default=[], description=NOT_USED)
    parsed: Any = Field(
        default=None, description="What OpenAI's client makes of the text; not used."
    )
    logprobs: list[Any] = Field(default=[], description=NOT_USED)


Text = Annotated[
    Annotated[str, Tag("one")]
    | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True), Tag("many")],
    Discriminator(
        one_or_many,
        custom_error_type="text_type",
        custom_error_message="Give a text, or a list of parts of type input_text or output_text",
    ),
]


class Item(RequestBody):
    """What all items may have; an earlier answer's items are sent back with these."""

    id: str = Field(default="", max_length=512, description=NOT_USED)
    status: Literal["in_progress", "completed", "incomplete"] = Field(
        default="completed", description=NOT_USED
    )


class MessageItem(Item):
    """One turn; without a `type` in OpenAI's short form."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"] = Field(description="Who speaks.")
    content: Text = Field(description="A text, or a list of parts.")
    phase: str = Field(default="", description=NOT_USED)


class FunctionCallItem(Item):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: str = Field(description="What the output's `call_id` names.")
    name: str = Field(description="The function.")
    arguments: str = Field(description="Its arguments, as JSON text.")
    parsed_arguments: Any = Field(
        default=None, description="What OpenAI's client makes of the arguments; not used."
    )


class FunctionCallOutputItem(Item):
    """What the function that was called has returned."""

    type: Literal["function_call_output"]
    call_id: str = Field(description="Which call this answers.")
    output: Text = Field(description="What it returned.")


class ReasoningPart(BaseModel):
    """A piece of what was thought."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    type: Literal["reasoning_text"]
    text: str = Field(description="The text.")


class ReasoningItem(BaseModel):
    """What was thought before an answer. That of servers that keep it to themselves is empty."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = (
        Field(default=None, description="What was thought, in parts.")
    )


class UnknownItem(BaseModel):
    """Any other item: its `type` is always wrong."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    type: Kind


def _kind(value: Any) -> str:
    kind = value.get("type") or "message" if isinstance(value, dict) else "message"
    return f"a {kind}" if kind in get_args(Kind) else "any other"


InputItem = Annotated[
    Annotated[MessageItem, Tag("a message")]
    | Annotated[FunctionCallItem, Tag("a function_call")]
    | Annotated[FunctionCallOutputItem, Tag("a function_call_output")]
    | Annotated[ReasoningItem, Tag("a reasoning")]
    | Annotated[SkipJsonSchema[UnknownItem], Tag("any other")],
    Discriminator(_kind),
]

Input = Annotated[
    Annotated[str, Tag("one")]
    | Annotated[
        list[InputItem],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
        Tag("many"),
    ],
    Discriminator(
        one_or_many,
        custom_error_type="input_type",
        custom_error_message="Give a text, or a list of items",
    ),
]


class TextConfig(RequestBody):
    """The form of the answer: `format` is `text`, `json_object` or `json_schema`."""

    format: dict[str, Any] = Field(
        default={"type": "text"},
        description='As response_format of a chat, but flat: {"type": "json_schema", "name": ..., '
        '"schema": ...}.',
    )
    verbosity: str = Field(default="medium", description="Accepted only if medium.")

    @field_validator("format")
    @classmethod
    def _check_type(cls, given: dict[str, Any]) -> dict[str, Any]:
        if given.get("type") not in ("text", "json_object", "json_schema"):
            raise PydanticCustomError(
                "format_type",
                'Give {{"type": "text"}}, {{"type": "json_object"}}, or {{"type": "json_schema", '
                '"name": ..., "schema": ...}}',
            )
        return given


class Reasoning(RequestBody):
    """Options of models that reason. What is thought comes whole, and so without summaries."""

    effort: str | None = Field(
        default=None, description="Value for chat templates that read it; as reasoning_effort."
    )
    summary: Literal["auto"] | None = Field(default=None, description=NO_EFFECT)


class ResponseStreamOptions(RequestBody):
    """Options of a streamed answer: none that changes it."""

    include_obfuscation: OnlyFalse = Field(default=False, description=ONLY_DEFAULT)


class ResponsesRequest(Sampled):
    """Text to answer, or a conversation. Nothing of it or of the answer is kept."""

    input: Input = Field(description="A text, or the conversation so far as a list of items.")
    instructions: str | None = Field(
        default=None, description="Text of a system turn before all others."
    )
    max_output_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TOKENS,
        description="Longest answer in tokens; by default up to the model's length.",
    )
    top_logprobs: int = Field(
        default=0,
        ge=0,
        le=MAX_LOGPROBS,
        description="Above 0: also answer log-probabilities, with those of so many best tokens.",
    )
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(
        default=[], max_length=16, description="The first also answers log-probabilities."
    )
    text: TextConfig = Field(default=TextConfig(), description="The form of the answer.")
    reasoning: Reasoning = Field(default=Reasoning(), description="How much to think.")
    tools: list[dict[str, Any]] = Field(
        default=[],
        description='As tools of a chat, but flat: {"type": "function", "name": ..., '
        '"parameters": ...}.',
    )
    tool_choice: str | dict[str, Any] | None = Field(
        default=None,
        description='As tool_choice of a chat, but flat: {"type": "function", "name": ...}.',
    )
    parallel_tool_calls: bool = Field(default=True, description="False allows at most one call.")
    chat_template_kwargs: ChatSwitches = Field(
        default={},
        description='Switches of the model\'s chat template, such as `{"enable_thinking": false}`.',
    )
    stream_options: ResponseStreamOptions = Field(
        default=ResponseStreamOptions(), description=NO_EFFECT
    )
    truncation: Literal["disabled"] = Field(default="disabled", description=ONLY_DEFAULT)
    background: OnlyFalse = Field(default=False, description=ONLY_DEFAULT)
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = (
        Field(default={}, max_length=16, description="Texts by name; they come back in the answer.")
    )
    client_metadata: dict[str, Any] = Field(default={}, description=NO_EFFECT)
