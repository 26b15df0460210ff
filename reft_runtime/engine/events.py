"""What the engine tells its callers, step by step. Token ids only; small and serialisable."""

from __future__ import annotations

from dataclasses import dataclass

from reft_runtime.outputs import FinishReason, TokenLogprob, TracedEdit


@dataclass(frozen=True, slots=True)
class Started:
    """A request left the queue at time `at` (`time.monotonic`): its first chunk is computed."""

    request_id: str
    at: float


@dataclass(frozen=True, slots=True)
class PromptReused:
    """The prompt is computed, and `tokens` of its tokens came from the prefix cache."""

    request_id: str
    tokens: int


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log-probabilities of the next prompt tokens, in order; `Request.scored_from` is the first."""

    request_id: str
    logprobs: tuple[TokenLogprob, ...]


# Not frozen: there is one for every token, and a frozen one takes five times as long to make.
@dataclass(slots=True)
class TokenMade:
    """One choice has one more token, or (`token` None) ended without one.

    With a `finish_reason` it is the choice's last event; `stop_id` is the stop id that ended it.
    With `complete` the token ended it by completing its grammar, and is part of the answer.
    """

    request_id: str
    choice: int
    token: int | None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    stop_id: int | None = None
    complete: bool = False


@dataclass(frozen=True, slots=True)
class LabelsScored:
    """Log-probabilities of a request's labels, in their order; the request's last event."""

    request_id: str
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Traced:
    """What edits did to rows of a request's first choice, for a request that asks for it."""

    request_id: str
    edits: tuple[TracedEdit, ...]


@dataclass(frozen=True, slots=True)
class Explained:
    """How far a traced request is from the base model; its last event, after its choices ended.

    `kl` and `log_ratios` are as in `Trace`, but the ratios cover every generated token, also those
    after a stop string: the engine knows no stop strings.
    """

    request_id: str
    kl: float
    log_ratios: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """A fault inside this request ended all its choices.

    With `out_of_memory`, memory ran out and this request was the newest: it may be sent again.
    With `param`, the value of this field of the request is at fault.
    """

    request_id: str
    reason: str
    out_of_memory: bool = False
    param: str | None = None


Event = (
    Started | PromptReused | PromptScored | TokenMade | LabelsScored | Traced | Explained | Failed
)
