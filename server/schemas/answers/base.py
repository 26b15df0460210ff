"""What several routes' answers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NotRequired

from pydantic import Field, with_config
from typing_extensions import TypedDict

described = with_config(use_attribute_docstrings=True)
"""Decorator of an answer's class: the texts below its fields are their descriptions."""

Id = Annotated[str, Field(description="The answer's id.")]
Created = Annotated[int, Field(description="When the request was begun, in Unix seconds.")]
Applied = Annotated[
    str, Field(description="What was applied: the request's `model`, or the interventions' names.")
]
Index = Annotated[int, Field(description="Which choice, from 0: prompt times `n`, plus choice.")]
TokenIds = Annotated[
    Sequence[int], Field(description="The answer's token ids; with `return_token_ids`.")
]
PromptTokenIds = Annotated[
    Sequence[int], Field(description="The prompt's token ids; with `return_token_ids`.")
]


@described
class ErrorObject(TypedDict):
    """What is wrong."""

    message: str
    """What is wrong and, where it can be told, what to do instead."""
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "requests",
        "tokens",
        "server_error",
    ]
    """The kind of the error; `requests` and `tokens` are quotas."""
    param: str | None
    """The field, header or query parameter at fault."""
    code: str | None
    """A word for programs, such as `model_not_found`."""


@described
class Error(TypedDict):
    """OpenAI's error object, as every route sends it."""

    error: ErrorObject
    """What is wrong."""


@described
class PromptTokensDetails(TypedDict):
    """How the prompt's tokens were computed."""

    cached_tokens: int
    """Those whose keys and values came from the prefix cache."""


@described
class CompletionTokensDetails(TypedDict):
    """What the answer's tokens are for."""

    reasoning_tokens: int
    """Those with which the model thought before its answer."""


@described
class Usage(TypedDict):
    """Numbers of tokens, over all prompts and choices."""

    prompt_tokens: int
    """Tokens of the prompts; each counts once, whatever `n` is."""
    completion_tokens: int
    """Tokens that were generated."""
    total_tokens: int
    """The sum of both."""
    prompt_tokens_details: PromptTokensDetails
    """What is known of the prompt's tokens."""
    completion_tokens_details: NotRequired[CompletionTokensDetails]
    """What is known of the answer's tokens; of models that think."""


@described
class PromptLogprob(TypedDict):
    """One token in the place of a prompt's token."""

    logprob: float
    """Its log-probability (natural)."""
    rank: int | None
    """Its place among the best, from 1; null if it is not among them."""
    decoded_token: str
    """Its text."""


PromptLogprobs = Annotated[
    list[dict[str, PromptLogprob] | None],
    Field(
        description="For every prompt token its own and the best, by token id; null for the first."
        " With `prompt_logprobs`."
    ),
]


@described
class TracedRow(TypedDict):
    """What one edit did to one row."""

    intervention: int
    """Place of the intervention in the request, from 0."""
    edit: int
    """Place of the edit in its file, from 0."""
    layer: int
    """The layer, from 0."""
    component: str
    """The layer's part, such as its output."""
    position: int
    """Place of the token; from the prompt's length on tokens are generated."""
    relative_size: float
    """Length of the change over that of the row before it, taken as 1e-12 at least."""
    before: NotRequired[list[float]]
    """With `"trace": "along"`: the row's product with each direction of the edit, at length 1."""
    after: NotRequired[list[float]]
    """The same for the row after the edit."""


@described
class PromptTrace(TypedDict):
    """What the interventions did to one prompt and its answers."""

    edits: list[TracedRow]
    """Every edit of every row."""
    kl: float
    """Divergence of the first token's distribution from the base model's, in nats."""
    log_ratios: list[list[float]]
    """For each choice and token: the log-probability with the edits less that without, in nats."""


Traces = Annotated[list[PromptTrace], Field(description="An object for each prompt; with `trace`.")]
