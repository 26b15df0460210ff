"""Bodies of POST /tokenize and /detokenize."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from server.schemas.base import RequestBody
from server.schemas.chat import ChatLayout, Messages, check_either
from server.schemas.common import ModelName, TokenId
from server.schemas.tools import Tool, ToolList, checked


class TokenizeRequest(ChatLayout):
    """Text, or a conversation laid out by the model's chat template, to turn into token ids."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="By default true for a prompt; for messages the template decides."
    )
    return_token_strs: bool = False
    tools: ToolList = Field(default=[])

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[Tool]) -> list[Tool]:
        return checked(tools)

    @model_validator(mode="after")
    def _check_together(self) -> TokenizeRequest:
        check_either(self, "prompt", "tools")
        return self


class DetokenizeRequest(RequestBody):
    """Token ids to turn into text."""

    model: ModelName | None = None
    tokens: list[TokenId] = Field(fail_fast=True)
    skip_special_tokens: bool = False
