"""How one request picks its tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_args

from reft_runtime.errors import InvalidRequest

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 128
MAX_STOP_TOKENS = 128
MAX_LOGIT_BIAS = 1024
MAX_SEED = 2**63 - 1

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form that an answer must have.

    `source` is by `kind`: a JSON Schema, nothing (any JSON object), a regular expression, a JSON
    list of the texts to choose from, or a grammar in Lark's notation as llguidance reads it.
    With a `frame`, a grammar in Lark's notation, it is that of what the frame calls `@answer`.
    `param` is the field of the request that errors name.
    """

    kind: GrammarKind
    source: str = ""
    param: str = field(default="grammar", compare=False)
    frame: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind) or not isinstance(self.source, str):
            raise InvalidRequest(
                f"{self.param}: give one of {', '.join(get_args(GrammarKind))}, and its source as"
                " text.",
                param=self.param,
            )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings of one request; a value out of range raises `InvalidRequest` that names it.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 mean all tokens. `max_tokens` None means up
    to the model's length. `logprobs` None returns none; k returns the chosen token's
    log-probability and the k best; `prompt_logprobs` does the same for the prompt. A traced request
    returns at least those of the chosen tokens. Log-probabilities are those of the model, before
    penalties, bias and temperature. A `seed` makes the answer reproducible, whatever else is in the
    batch. Presence and frequency penalties count generated tokens (OpenAI), the repetition penalty
    counts prompt and generated tokens (CTRL, arXiv 1909.05858). The text leaves out special tokens
    unless `skip_special_tokens` is False, and the stop string, stop id or EOS that ended it unless
    `include_stop_str_in_output` is True; of special tokens it always keeps `kept_special_tokens`.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    grammar: Grammar | None = None
    kept_special_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        _check_types(self)
        # Copies: what the caller does to its own lists later is not checked.
        for name in ("stop", "stop_token_ids", "kept_special_tokens"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        if self.max_tokens is not None:
            _bounded("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _bounded("temperature", self.temperature, 0, 100)
        _bounded("top_k", self.top_k, 0, 2**31 - 1)
        _bounded("top_p", self.top_p, 0, 1, above_low=True)
        _bounded("min_p", self.min_p, 0, 1)
        _bounded("repetition_penalty", self.repetition_penalty, 0, 100, above_low=True)
        _bounded("presence_penalty", self.presence_penalty, -2, 2)
        _bounded("frequency_penalty", self.frequency_penalty, -2, 2)
        _bounded("n", self.n, 1, MAX_CHOICES)
        _bounded("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens}).",
                param="min_tokens",
            )
        if self.seed is not None:
            _bounded("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _bounded(name, count, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop: at most {MAX_STOP_STRINGS} strings.", param="stop")
        if any(not text for text in self.stop):
            raise InvalidRequest("stop: an empty string never matches; leave it out.", param="stop")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidRequest(
                f"stop_token_ids: at most {MAX_STOP_TOKENS} ids.", param="stop_token_ids"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(
                f"logit_bias: at most {MAX_LOGIT_BIAS} tokens.", param="logit_bias"
            )
        for bias in self.logit_bias.values():
            _bounded("logit_bias", bias, -100, 100)


_WHOLE = ("top_k", "n", "min_tokens")
_WHOLE_OR_NONE = ("max_tokens", "seed", "logprobs", "prompt_logprobs")
_NUMBERS = (
    *("temperature", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


def _check_types(sampling: SamplingParams) -> None:
    """Raise `InvalidRequest` for a field of another type: the engine computes with what it gets."""

    def check(name: str, fits: object, wanted: str) -> None:
        if not fits:
            given = repr(getattr(sampling, name))[:40]
            raise InvalidRequest(f"{name} must be {wanted}, not {given}.", param=name)

    for name in (*_WHOLE, *_WHOLE_OR_NONE):
        value = getattr(sampling, name)
        left_out = value is None and name in _WHOLE_OR_NONE
        check(name, left_out or isinstance(value, Integral), "a whole number")
    for name in _NUMBERS:
        check(name, isinstance(getattr(sampling, name), Real), "a number")
    check("stop", _all(sampling.stop, str), "a list of texts")
    kept: Any = sampling.kept_special_tokens
    fits = _all(kept, str) and not isinstance(kept, str)  # of which each character is one
    check("kept_special_tokens", fits, "a list of texts")
    check("stop_token_ids", _all(sampling.stop_token_ids, Integral), "a list of token ids")
    bias: Any = sampling.logit_bias
    fits = isinstance(bias, Mapping) and _all(bias, Integral) and _all(bias.values(), Real)
    check("logit_bias", fits, "numbers by token id, such as {5: -1.5}")
    check("grammar", sampling.grammar is None or isinstance(sampling.grammar, Grammar), "a Grammar")


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, Collection) and all(isinstance(value, kind) for value in values)


def _bounded(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    inside = low <= value <= high and not (above_low and value == low)  # not a number: False
    if not inside:
        bounds = f"above {low} and" if above_low else f"at least {low} and"
        raise InvalidRequest(f"{name} must be {bounds} at most {high}, not {value}.", param=name)
