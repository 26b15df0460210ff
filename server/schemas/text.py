"""Bodies of POST /tokenize and /detokenize."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from server.schemas.base import RequestBody
from server.schemas.chat import ChatLayout, Messages, check_either
from server.schemas.common import ModelName, TokenId
from server.schemas.tools import Tool, ToolList, checked

TOKENIZED_FOR = "Any model that is served; an intervention's template applies."


class TokenizeRequest(ChatLayout):
    """Text, or a conversation laid out by the model's chat template, to turn into token ids."""

    model: ModelName | None = Field(default=None, description=TOKENIZED_FOR)
    prompt: str | None = Field(default=None, description="A text.")
    messages: Messages | None = Field(
        default=None, description="A conversation, instead of a prompt."
    )
    add_special_tokens: bool | None = Field(
        default=None, description="By default true for a prompt; for messages the template decides."
    )
    return_token_strs: bool = Field(default=False, description="Also answer each token's text.")
    tools: ToolList = Field(default=[], description="Tools that the chat template is told of.")

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

    model: ModelName | None = Field(default=None, description=TOKENIZED_FOR)
    tokens: list[TokenId] = Field(fail_fast=True, description="Token ids.")
    skip_special_tokens: bool = Field(default=False, description="Leave special tokens out.")
