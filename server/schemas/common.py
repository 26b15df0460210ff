"""What the bodies of completions and chat have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reft_runtime.errors import InvalidRequest
from reft_runtime.sampling import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_SEED,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    SamplingParams,
)
from reft_runtime.use import MAX_INTERVENTIONS

MAX_STRENGTH = 100.0
MAX_SUBSPACE = 1024
MAX_TOKENS = 2**31 - 1
MAX_STOP_LENGTH = 1024

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
ModelName = Annotated[str, Field(min_length=1, max_length=512)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Nothing = Annotated[list[Any], Field(max_length=0)]
"""An empty list: what clients send for a feature that they do not use."""


class RequestBody(BaseModel):
    """A JSON object whose nulls mean 'not given' and whose unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


class InterventionUse(RequestBody):
    """One intervention to apply: how strongly (1 as trained, 0 not at all), and along what.

    `subspace` names the directions to edit, columns of R; without it all are.
    """

    name: ModelName
    strength: float = Field(default=1.0, ge=-MAX_STRENGTH, le=MAX_STRENGTH)
    subspace: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_SUBSPACE)] | None = None


class StreamOptions(RequestBody):
    """`include_usage`: end the stream with a chunk that counts the tokens."""

    include_usage: bool = False


class TextFormat(RequestBody):
    """The one answer format there is."""

    type: Literal["text"]


class WithoutEffect(RequestBody):
    """Fields that ordinary clients send and that change no answer of this server.

    Those with a meaning are accepted only with the value that asks for nothing.
    """

    user: str = ""
    metadata: dict[str, Any] = {}
    service_tier: str = "auto"
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    store: Literal[False] = False


class SamplingBody(WithoutEffect):
    """Model, interventions and how to pick tokens."""

    model: ModelName
    interventions: list[InterventionUse] = Field(
        default=[], max_length=MAX_INTERVENTIONS, fail_fast=True
    )
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=MAX_TOKENS, description="0 or -1: all tokens.")
    min_p: float = Field(default=0.0, ge=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    trace: bool = Field(default=False, description="Say what every edit did; not streamed.")
    stop: (
        StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
    ) = Field(default=[])
    stop_token_ids: list[TokenId] = Field(default=[], max_length=MAX_STOP_TOKENS, fail_fast=True)
    seed: int | None = Field(default=None, ge=-MAX_SEED - 1, le=MAX_SEED)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default={}, max_length=MAX_LOGIT_BIAS
    )
    min_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _check_streaming(self) -> SamplingBody:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise InvalidRequest("stream_options needs stream: true.", param="stream_options")
        if self.trace and self.stream:
            raise InvalidRequest("trace needs stream: false.", param="trace")
        return self

    def sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """The engine's form of these fields; raises `InvalidRequest`."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={_token_id(key): bias for key, bias in self.logit_bias.items()},
            seed=self.seed,
            n=self.n,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) <= 10):
        raise InvalidRequest(f"logit_bias: {key!r} is not a token id.", param="logit_bias")
    return int(key)
