"""Bodies of POST /tokenize and /detokenize."""

from __future__ import annotations

from pydantic import Field, model_validator

from reft_runtime.errors import InvalidRequest
from server.schemas.chat import Messages
from server.schemas.common import ModelName, RequestBody, TokenId


class TokenizeRequest(RequestBody):
    """Text, or a conversation laid out by the model's chat template, to turn into token ids."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _check_together(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Give either prompt or messages.", param="prompt")
        return self


class DetokenizeRequest(RequestBody):
    """Token ids to turn into text."""

    model: ModelName | None = None
    tokens: list[TokenId] = Field(fail_fast=True)
