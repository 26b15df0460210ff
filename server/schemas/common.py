"""What the bodies of completions and chat have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from reft_runtime.errors import InvalidRequest
from reft_runtime.outputs import Tracing
from reft_runtime.sampling import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    SamplingParams,
)
from reft_runtime.use import MAX_INTERVENTIONS, MAX_STRENGTH
from server.schemas.base import OnlyFalse, OnlyTrue, RequestBody
from server.schemas.structured import FormFields

MAX_SUBSPACE = 1024
MAX_TOKENS = 2**31 - 1
MAX_STOP_LENGTH = 1024
MAX_BIAS = 100
MAX_NAMED = 8
"""Most wrong keys that one error names."""

NO_EFFECT = "Accepted, and changes nothing."
NOT_USED = "As an earlier answer has it; not used."
ONLY_DEFAULT = "Accepted with its default only, which asks for nothing."
WHICH_MODEL = "The base model, or an intervention: `NAME`, `NAME@DIGEST` or `BASE:NAME`."

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
ModelName = Annotated[str, Field(min_length=1, max_length=512)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Nothing = Annotated[list[Any], Field(max_length=0)]
"""An empty list, which clients send for a feature that they do not use."""


def one_or_many(value: Any) -> str | None:
    """Discriminator of a text (`one`) and a list (`many`); None for anything else."""
    if isinstance(value, str):
        return "one"
    return "many" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[StopString, Tag("one")]
    | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True), Tag("many")],
    Discriminator(
        one_or_many,
        custom_error_type="stop_type",
        custom_error_message=f"Give a string, or a list of up to {MAX_STOP_STRINGS} strings",
    ),
]


class InterventionUse(RequestBody):
    """One intervention to apply. `strength` is 1 as trained, and 0 for no effect.

    `subspace` lists the directions to edit, which are columns of R counted from 0; by default all
    are edited.
    """

    name: ModelName = Field(description="`NAME` or `NAME@DIGEST`.")
    strength: float = Field(
        default=1.0,
        ge=-MAX_STRENGTH,
        le=MAX_STRENGTH,
        description="1 is as trained, 0 nothing, negative the opposite.",
    )
    subspace: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_SUBSPACE)] | None = Field(
        default=None, description="Directions to edit, counted from 0; by default all."
    )


class StreamOptions(RequestBody):
    """Options of a streamed answer.

    `include_usage` ends the stream with a chunk that counts the tokens. `continuous_usage_stats`
    counts the tokens so far in every chunk. `include_obfuscation` asks for padding, which this
    server does not have.
    """

    include_usage: bool = Field(default=False, description="End with a chunk that counts tokens.")
    continuous_usage_stats: bool = Field(
        default=False, description="Count the tokens so far in every chunk."
    )
    include_obfuscation: OnlyFalse = Field(default=False, description="Only false.")


class WithoutEffect(RequestBody):
    """Fields that ordinary clients send and that change no answer of this server.

    A field with a meaning is accepted only with the value that asks for nothing.
    """

    user: str = Field(default="", description=NO_EFFECT)
    metadata: dict[str, Any] = Field(default={}, description=NO_EFFECT)
    service_tier: str = Field(default="auto", description=NO_EFFECT)
    safety_identifier: str = Field(default="", description=NO_EFFECT)
    prompt_cache_key: str = Field(default="", description=NO_EFFECT)
    prompt_cache_retention: str = Field(default="", description=NO_EFFECT)
    store: OnlyFalse = Field(default=False, description=ONLY_DEFAULT)
    use_beam_search: OnlyFalse = Field(default=False, description=ONLY_DEFAULT)
    early_stopping: OnlyFalse = Field(default=False, description=ONLY_DEFAULT)
    length_penalty: float = Field(default=1.0, ge=1, le=1, description=ONLY_DEFAULT)
    spaces_between_special_tokens: OnlyTrue = Field(default=True, description=ONLY_DEFAULT)
    return_tokens_as_token_ids: OnlyFalse = Field(default=False, description=ONLY_DEFAULT)
    bad_words: Nothing = Field(default=[], description=ONLY_DEFAULT)


class ModelBody(WithoutEffect):
    """The model and its interventions."""

    model: ModelName = Field(description=WHICH_MODEL)
    interventions: list[InterventionUse] = Field(
        default=[],
        max_length=MAX_INTERVENTIONS,
        fail_fast=True,
        description="Applied in this order, instead of what `model` names.",
    )
    priority: int = Field(
        default=0,
        ge=-MAX_SEED - 1,
        le=MAX_SEED,
        description="Orders your own waiting requests, the lowest number first.",
    )


class Sampled(ModelBody):
    """The model, its interventions and the sampling of tokens."""

    temperature: float = Field(
        default=1.0, ge=0, le=2, description="0 takes the likeliest token each time."
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Only the likeliest tokens that together have this probability.",
    )
    top_k: int = Field(
        default=0,
        ge=-1,
        le=MAX_TOKENS,
        description="Only so many of the likeliest tokens; 0 or -1 takes all.",
    )
    min_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Only tokens at least this probable, as a share of the likeliest one's.",
    )
    stream: bool = Field(default=False, description="Send the answer as it comes, in events.")
    trace: Tracing = Field(
        default=False,
        description="Say what every edit did, and how the edits changed each token; `along` also "
        "says where the edited rows lie along the edits' directions.",
    )
    stop: Stop = Field(default=[], description="Texts that end the answer.")
    stop_token_ids: list[TokenId] = Field(
        default=[], max_length=MAX_STOP_TOKENS, fail_fast=True, description="Tokens that end it."
    )
    seed: int | None = Field(
        default=None,
        ge=-MAX_SEED - 1,
        le=MAX_SEED,
        description="The same seed gives the same tokens, whatever else is in the batch.",
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Taken from the logit of every generated token."
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="The same, times how often the token was generated."
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, le=100, description="Above 1, tokens of prompt and answer lose."
    )
    logit_bias: dict[str, float] = Field(
        default={}, max_length=MAX_LOGIT_BIAS, description="Added to logits, by token id."
    )
    min_tokens: int = Field(
        default=0, ge=0, le=MAX_TOKENS, description="The answer does not end before so many."
    )
    ignore_eos: bool = Field(
        default=False, description="The answer does not end at end-of-sequence tokens."
    )
    skip_special_tokens: bool = Field(
        default=True, description="Leave special tokens out of the text."
    )
    include_stop_str_in_output: bool = Field(
        default=False, description="Keep the stop string, stop id or EOS in the text."
    )

    @field_validator("trace", mode="before")
    @classmethod
    def _check_trace(cls, trace: object) -> object:
        if not isinstance(trace, bool) and trace != "along":
            raise PydanticCustomError("trace_type", "Give true, false or 'along'")
        return trace

    @field_validator("logit_bias")
    @classmethod
    def _check_logit_bias(cls, biases: dict[str, float]) -> dict[str, float]:
        wrong = [key for key in biases if not _is_token_id(key)]
        if wrong:
            raise PydanticCustomError(
                "logit_bias_keys", "{keys}: no token id", {"keys": _listed(wrong)}
            )
        wrong = [key for key, bias in biases.items() if not -MAX_BIAS <= bias <= MAX_BIAS]
        if wrong:
            raise PydanticCustomError(
                "logit_bias_values",
                "the bias of {keys} is not between -100 and 100",
                {"keys": _listed(wrong)},
            )
        return biases


class SamplingBody(Sampled, FormFields):
    """What completions and chat take: choices, their form, and what is told of them."""

    n: int = Field(
        default=1, ge=1, le=MAX_CHOICES, description="How many answers each prompt gets."
    )
    best_of: int | None = Field(default=None, description="Accepted only if it equals n.")
    stream_options: StreamOptions = Field(
        default=StreamOptions(), description="Needs `stream: true`."
    )
    return_token_ids: bool = Field(
        default=False, description="Also answer the token ids of prompt and answer."
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Best tokens listed per prompt token; not streamed.",
    )

    @model_validator(mode="after")
    def _check_sampling(self) -> SamplingBody:
        if self.best_of is not None and self.best_of != self.n:
            raise InvalidRequest(
                f"best_of is supported only where it equals n ({self.n}).", param="best_of"
            )
        if "stream_options" in self.model_fields_set and not self.stream:
            raise InvalidRequest("stream_options needs stream: true.", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs needs stream: false.", param="prompt_logprobs")
        return self

    def sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, echoed: int | None = None
    ) -> SamplingParams:
        """The engine's form of these fields; raises `InvalidRequest`.

        `echoed` is how many log-probabilities an echoed prompt's tokens need.
        """
        scored = [count for count in (self.prompt_logprobs, echoed) if count is not None]
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(key): bias for key, bias in self.logit_bias.items()},
            seed=self.seed,
            n=self.n,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=max(scored, default=None),
            skip_special_tokens=self.skip_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
            grammar=self.grammar,
        )


def _is_token_id(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) <= 10


def _listed(keys: list[str]) -> str:
    """The first few of `keys`, and how many more there are."""
    more = f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
    return ", ".join(repr(key[:40]) for key in keys[:MAX_NAMED]) + more
