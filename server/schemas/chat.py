"""Body of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from reft_runtime.errors import InvalidRequest
from reft_runtime.sampling import MAX_LOGPROBS, SamplingParams
from server.schemas.base import OnlyFalse, RequestBody
from server.schemas.common import (
    MAX_TOKENS,
    NO_EFFECT,
    NOT_USED,
    ONLY_DEFAULT,
    Nothing,
    SamplingBody,
    one_or_many,
)
from server.schemas.tools import MAX_CALLS, MAX_TOOLS, ToolCall, ToolFields

if TYPE_CHECKING:
    from reft_runtime.text import ChatOptions
    from reft_runtime.text import Message as Turn

MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_SWITCHES = 16

MAX_SWITCH_LENGTH = 256


def _plain(value: Any) -> Any:
    # This runs before the union's members: each of them would say that it alone is wanted.
    if not isinstance(value, bool | int | float | str) or (
        isinstance(value, str) and len(value) > MAX_SWITCH_LENGTH
    ):
        raise ValueError(
            f"give a text of up to {MAX_SWITCH_LENGTH} characters, a number, true or false"
        )
    return value


Switch = Annotated[bool | int | float | str, BeforeValidator(_plain)]
ChatSwitches = Annotated[
    dict[Annotated[str, Field(max_length=64)], Switch], Field(max_length=MAX_SWITCHES)
]
"""Values of the chat template's own variables, by name."""


class TextPart(RequestBody):
    """A piece of a message's text.

    Some clients make one part of an earlier answer and leave in it what else the message had. It is
    taken and not used: what is used stands in the message.
    """

    type: Literal["text"]
    text: str = Field(description="The text.")
    role: Literal["assistant"] = Field(default="assistant", description=NOT_USED)
    reasoning_content: str = Field(default="", description=NOT_USED)
    tool_calls: list[Any] = Field(default=[], max_length=MAX_CALLS, description=NOT_USED)
    annotations: Nothing = Field(default=[], description=ONLY_DEFAULT)


Content = Annotated[
    Annotated[str, Tag("one")]
    | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("many")],
    Discriminator(
        one_or_many,
        custom_error_type="content_type",
        custom_error_message="Give a text, or a list of text parts",
    ),
]


class Message(RequestBody):
    """One turn. The parts of a content list are joined without anything between them.

    An assistant's turn may have no content, may have called tools, and what was thought before it
    is for templates that show it; a turn of the role `tool`
    is the result of the call that `tool_call_id` names. `name` is for templates that show who
    speaks.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Who speaks; `developer` is the same as `system`."
    )
    content: Content | None = Field(
        default=None, validate_default=True, description="A text, or a list of text parts."
    )
    name: str = Field(
        default="", max_length=256, description="Who speaks, for chat templates that show it."
    )
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] = Field(
        default=[], description="Calls that an assistant's turn made."
    )
    tool_call_id: str = Field(
        default="", max_length=256, description="Of the role `tool`: which call this answers."
    )
    reasoning_content: str | None = Field(
        default=None, description="What the model thought before an earlier answer."
    )
    reasoning: str | None = Field(default=None, description="The same, as vLLM calls it.")
    # A client sends an earlier answer back with these fields empty; the last one is LiteLLM's.
    parsed: Any = Field(
        default=None, description="What OpenAI's client makes of the content; not used."
    )
    annotations: Nothing = Field(default=[], description=ONLY_DEFAULT)
    provider_specific_fields: dict[str, None] = Field(default={}, description=NO_EFFECT)

    @field_validator("content", mode="before")
    @classmethod
    def _only_an_assistant_says_nothing(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role", "assistant") != "assistant":
            raise PydanticKnownError("missing")
        return content

    @model_validator(mode="after")
    def _check_calls(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("calls_role", "tool_calls are an assistant's")
        if (self.reasoning_content or self.reasoning) and self.role != "assistant":
            raise PydanticCustomError("reasoning_role", "reasoning_content is an assistant's")
        if bool(self.tool_call_id) != (self.role == "tool"):
            raise PydanticCustomError(
                "call_id_role", "a tool's turn has a tool_call_id, and no other turn has one"
            )
        return self

    def as_turn(self) -> Turn:
        """The turn as chat templates take it; `developer` is today's name for `system`."""
        parts = [self.content] if isinstance(self.content, str) else self.content or []
        text = "".join(part if isinstance(part, str) else part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": text}
        if self.name:
            turn["name"] = self.name
        if self.tool_calls:
            turn["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.tool_call_id:
            turn["tool_call_id"] = self.tool_call_id
        if thought := self.reasoning_content or self.reasoning:
            turn["reasoning_content"] = thought
        return turn


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatLayout(RequestBody):
    """How a conversation is written as a prompt."""

    add_generation_prompt: bool = Field(
        default=True, description="Begin an assistant's turn behind the messages."
    )
    continue_final_message: bool = Field(
        default=False, description="With `add_generation_prompt: false`, continue the last message."
    )
    chat_template_kwargs: ChatSwitches = Field(
        default={},
        description='Switches of the model\'s chat template, such as `{"enable_thinking": false}`.',
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        Field(default=None, description="Value for chat templates that read it.")
    )

    def options(self, known: Sequence[str]) -> ChatOptions:
        """These fields for a template whose switches are `known`."""
        from reft_runtime.text import ChatOptions  # loads torch: only when needed

        switches = dict(self.chat_template_kwargs)
        if self.reasoning_effort is not None and "reasoning_effort" in known:
            switches.setdefault("reasoning_effort", self.reasoning_effort)
        return ChatOptions(self.add_generation_prompt, self.continue_final_message, switches)


def check_either(body: ChatLayout, other: str, *more: str) -> None:
    """Raise `InvalidRequest` unless `body` has either its field `other` or its `messages`.

    The fields of a layout, and `more`, need messages; their defaults, which generated clients send,
    ask for nothing.
    """
    chats = getattr(body, "messages", None) is not None
    if chats == (getattr(body, other) is not None):
        raise InvalidRequest(f"Give either {other} or messages.", param=other)
    if chats:
        return
    fields = type(body).model_fields
    for name in sorted({*ChatLayout.model_fields, *more}):
        if getattr(body, name) != fields[name].default:
            raise InvalidRequest(f"{name} needs messages.", param=name)


class ChatRequest(SamplingBody, ChatLayout, ToolFields):
    """A conversation to answer."""

    messages: Messages = Field(description="The conversation so far.")
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="As `max_tokens`, which is the older name."
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TOKENS,
        description="Longest answer in tokens; by default up to the model's length.",
    )
    logprobs: bool = Field(default=False, description="Also answer each token's log-probability.")
    top_logprobs: int = Field(
        default=0, ge=0, le=MAX_LOGPROBS, description="And so many of the best tokens in its place."
    )
    verbosity: Literal["medium"] = Field(default="medium", description=ONLY_DEFAULT)
    echo: OnlyFalse = Field(default=False, description=ONLY_DEFAULT)
    add_special_tokens: OnlyFalse = Field(default=False, description=ONLY_DEFAULT)
    modalities: list[Literal["text"]] = Field(
        default=["text"], max_length=1, description=ONLY_DEFAULT
    )
    functions: list[dict[str, Any]] = Field(
        default=[], max_length=MAX_TOOLS, description='Accepted only if function_call is "none".'
    )
    function_call: Literal["none", "auto"] | None = Field(
        default=None, description="Replaced by `tool_choice`."
    )

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens differ; give one of them.",
                param="max_tokens",
            )
        if self.functions and self.function_call != "none":
            raise InvalidRequest(
                'functions are taken only with function_call: "none"; give them as tools, which '
                "took their place in OpenAI's API.",
                param="functions",
            )
        return self

    def sampling(self) -> SamplingParams:
        """The engine's form of the sampling fields; raises `InvalidRequest`."""
        return self.sampling_params(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=self.top_logprobs if self.logprobs else None,
        )
