"""Body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from reft_runtime.errors import InvalidRequest
from reft_runtime.sampling import MAX_CHOICES, MAX_LOGPROBS, SamplingParams
from server.schemas.base import OnlyTrue
from server.schemas.common import MAX_TOKENS, ONLY_DEFAULT, SamplingBody, TokenId

DEFAULT_MAX_TOKENS = 16


def _prompt_kind(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return "text"
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], str):
            return "texts"
        return "token_lists" if isinstance(prompt[0], list) else "tokens"
    return None


TokenPrompt = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(max_length=MAX_CHOICES, fail_fast=True), Tag("texts")]
    | Annotated[TokenPrompt, Tag("tokens")]
    | Annotated[
        list[TokenPrompt],
        Field(max_length=MAX_CHOICES, fail_fast=True),
        Tag("token_lists"),
    ],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="Give a string, a list of token ids, or a list of either",
    ),
]


def prompts_of(given: Prompt) -> list[str] | list[list[int]]:
    """The prompts of a body, each as text or as token ids."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [given]
    return given


class CompletionRequest(SamplingBody):
    """A raw prompt, or several, to continue."""

    prompt: Prompt = Field(
        description="A text, a list of token ids, or a list of either, each with its own answers."
    )
    max_tokens: int = Field(
        DEFAULT_MAX_TOKENS, ge=0, le=MAX_TOKENS, description="Longest answer in tokens."
    )
    echo: bool = Field(default=False, description="Put the prompt before the answer.")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Also answer each token's log-probability, and so many of the best tokens.",
    )
    suffix: Literal[""] = Field(default="", description=ONLY_DEFAULT)
    add_special_tokens: OnlyTrue = Field(default=True, description=ONLY_DEFAULT)

    @model_validator(mode="after")
    def _check_together(self) -> CompletionRequest:
        if len(self.prompts) * self.n > MAX_CHOICES:
            raise InvalidRequest(
                f"n times the number of prompts is at most {MAX_CHOICES}, "
                f"not {self.n} x {len(self.prompts)}.",
                param="n",
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens: 0 needs echo: true.", param="max_tokens")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each as text or as token ids."""
        return prompts_of(self.prompt)

    def sampling(self) -> SamplingParams:
        """The engine's form of the sampling fields; raises `InvalidRequest`."""
        return self.sampling_params(
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            echoed=self.logprobs if self.echo else None,
        )
