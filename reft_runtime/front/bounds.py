"""How long a request may be, and how much it may ask to be told: log-probabilities, traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from reft_runtime.errors import ContextLengthExceeded, InvalidRequest
from reft_runtime.sampling import SamplingParams

MAX_SCORES = 200_000
"""Log-probabilities of one request: tokens times one more than their alternatives.

With a trace there is one more for each token of an answer, the base model's.
"""

MAX_TRACED_ROWS = 16_384
"""Rows of one request's trace: edits times the tokens that they edit."""


class _Positions(Protocol):
    @property
    def edits_decode(self) -> bool: ...

    def count(self, n: int) -> int: ...


def check_length(prompt: int, max_tokens: int | None, limit: int, field: str) -> None:
    """Raise `ContextLengthExceeded` where a prompt of so many tokens leaves its answer no room.

    An answer without `max_tokens` needs one token. The error names the prompt's `field`, or
    `max_tokens` where a shorter answer would do.
    """
    needed = 1 if max_tokens is None else max_tokens
    if prompt + needed > limit:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens, but {prompt + needed} are "
            f"needed ({prompt} in the prompt, {needed} for the answer). Shorten the prompt or "
            "lower max_tokens.",
            param=field if prompt + min(needed, 1) > limit else "max_tokens",
        )


def bounded(
    prompts: Sequence[int],
    limit: int,
    sampling: SamplingParams,
    edited: Sequence[_Positions],
    *,
    trace: bool,
) -> Iterator[SamplingParams]:
    """The settings of each prompt, of which these are the lengths.

    The bounds are those of all prompts together; a `max_tokens` that is not given (None) becomes
    what they allow, and the model's length, `limit`. `edited` are the positions of each edit.
    Raises `InvalidRequest`.
    """
    given, rows = sampling.max_tokens is not None, 0
    for prompt in prompts:
        settings = _bound_scores(prompts, sampling, limit - prompt, trace=trace)
        if trace:
            rows, settings = _bound_trace(edited, prompt, settings, given=given, taken=rows)
        yield settings


def _bound_scores(
    prompts: Sequence[int], sampling: SamplingParams, room: int, *, trace: bool
) -> SamplingParams:
    """Settings of a request with prompts of such lengths, its log-probabilities bounded.

    A `trace` needs those of the answers' tokens: the settings ask for them then.
    """
    scored = 0
    if sampling.prompt_logprobs is not None:
        scored = sum(prompts) * (1 + sampling.prompt_logprobs)
        if scored > MAX_SCORES:
            raise InvalidRequest(
                f"logprobs: of {sum(prompts)} prompt tokens with {sampling.prompt_logprobs} "
                f"alternatives they are {scored} numbers, and one request gets at most "
                f"{MAX_SCORES}. Send fewer prompts at once, or lower logprobs.",
                param="logprobs",
            )
    if trace and sampling.logprobs is None:
        sampling = replace(sampling, logprobs=0)
    answers, of_token = len(prompts) * sampling.n, 0
    if sampling.logprobs is not None:
        of_token = 1 + sampling.logprobs + trace
    each = answers * of_token
    if sampling.max_tokens is None:
        most = min(room, (MAX_SCORES - scored) // each) if each else room
        return replace(sampling, max_tokens=max(1, most))
    if scored + each * sampling.max_tokens > MAX_SCORES:
        asked = "trace" if trace else "logprobs"
        raise InvalidRequest(
            f"{asked}: {answers} x {sampling.max_tokens} tokens of answers with {of_token} "
            f"log-probabilities each are more than {MAX_SCORES} numbers, the most that one request "
            f"gets. max_tokens: at most {(MAX_SCORES - scored) // each}.",
            param=asked,
        )
    return sampling


def _bound_trace(
    edited: Sequence[_Positions], prompt: int, sampling: SamplingParams, *, given: bool, taken: int
) -> tuple[int, SamplingParams]:
    """Most rows that a trace of these edits has, with those `taken` before, and the settings.

    `given` says whether the caller chose `max_tokens`; if not it becomes what the bound allows.
    """
    rows = taken + sum(positions.count(prompt) for positions in edited)
    each = sum(positions.edits_decode for positions in edited)
    # The last token is not computed, so that nothing edits it.
    made = max(0, (sampling.max_tokens or 0) - 1)
    if each and not given and rows <= MAX_TRACED_ROWS:
        made = min(made, (MAX_TRACED_ROWS - rows) // each)
        sampling = replace(sampling, max_tokens=made + 1)
    rows += each * made
    if rows > MAX_TRACED_ROWS:
        raise InvalidRequest(
            f"trace: the edits times the tokens that they edit are {rows} rows, and one request "
            f"gets at most {MAX_TRACED_ROWS}. Shorten the prompts or lower max_tokens, or trace "
            "fewer interventions at once.",
            param="trace",
        )
    return rows, sampling
