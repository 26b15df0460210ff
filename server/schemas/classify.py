"""Body of POST /v1/classify."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from reft_runtime.interventions.format.labels import MOST_LABELS
from server.schemas.base import OnlyTrue
from server.schemas.chat import ChatLayout, Messages, check_either
from server.schemas.common import ONLY_DEFAULT, ModelBody
from server.schemas.completions import Prompt, prompts_of

if TYPE_CHECKING:
    from reft_runtime.front.prompts import Prompt as Asked


class ClassifyRequest(ModelBody, ChatLayout):
    """What is to be classified, and the labels to choose from."""

    input: Prompt | None = Field(
        default=None, description="A text, a list of token ids, or a list of either."
    )
    messages: Messages | None = Field(
        default=None, description="A conversation, instead of input: its answer is classified."
    )
    labels: list[str] | None = Field(
        default=None,
        max_length=MOST_LABELS,
        fail_fast=True,
        description="Labels to choose from; by default those in the intervention's file.",
    )
    add_special_tokens: OnlyTrue = Field(default=True, description=ONLY_DEFAULT)
    activation: OnlyTrue = Field(default=True, description=ONLY_DEFAULT)
    use_activation: OnlyTrue = Field(default=True, description=ONLY_DEFAULT)

    @model_validator(mode="after")
    def _check_together(self) -> ClassifyRequest:
        check_either(self, "input")
        return self

    def asked(self) -> list[Asked]:
        """Each prompt as text, as token ids, or as messages."""
        if self.messages is not None:
            return [[message.as_turn() for message in self.messages]]
        assert self.input is not None
        return [*prompts_of(self.input)]
