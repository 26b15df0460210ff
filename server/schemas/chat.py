"""Body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from reft_runtime.errors import InvalidRequest
from reft_runtime.sampling import MAX_LOGPROBS, SamplingParams
from server.schemas.common import MAX_TOKENS, Nothing, RequestBody, SamplingBody, TextFormat

if TYPE_CHECKING:
    from reft_runtime.text import Message as Turn

MAX_MESSAGES = 4096
MAX_PARTS = 4096


class TextPart(RequestBody):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class Message(RequestBody):
    """One turn. The parts of a content list are joined without anything between them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]
    # A client sends an earlier answer back with these, empty; the last one is LiteLLM's.
    tool_calls: Nothing = Field(default=[])
    annotations: Nothing = Field(default=[])
    provider_specific_fields: dict[str, None] = Field(default={})

    def as_text(self) -> Turn:
        """Role and text, as chat templates take them; `developer` is today's name for `system`."""
        if isinstance(self.content, str):
            text = self.content
        else:
            text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(SamplingBody):
    """A conversation to answer."""

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)
    response_format: TextFormat = TextFormat(type="text")
    modalities: list[Literal["text"]] = Field(default=["text"], max_length=1)
    tools: Nothing = Field(default=[])
    functions: Nothing = Field(default=[])
    tool_choice: Literal["none", "auto"] = "none"
    function_call: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = True

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
        return self

    def sampling(self) -> SamplingParams:
        """The engine's form of the sampling fields; raises `InvalidRequest`."""
        return self.sampling_params(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=self.top_logprobs if self.logprobs else None,
        )
