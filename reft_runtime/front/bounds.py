"""How much one request may ask to be told beside its answer: log-probabilities, and traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from reft_runtime.errors import InvalidRequest
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


def bound_scores(
    prompts: Sequence[int],
    sampling: SamplingParams,
    room: int | None = None,
    *,
    trace: bool = False,
) -> SamplingParams:
    """Settings of a request with prompts of such lengths, its log-probabilities bounded.

    A `trace` needs those of the answers' tokens: the settings ask for them then. Where `max_tokens`
    is not given (None) it becomes what the bound allows, at most `room`; None where there is no
    `room` yet. Raises `InvalidRequest`.
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
        if room is None:
            return sampling
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


def bound_trace(
    edited: Sequence[_Positions], prompt: int, sampling: SamplingParams, *, given: bool
) -> tuple[int, SamplingParams]:
    """Most rows that a trace of these edits has, and the settings, the rows bounded.

    `given` says whether the caller chose `max_tokens`; if not it becomes what the bound allows.
    Raises `InvalidRequest`.
    """
    rows = sum(positions.count(prompt) for positions in edited)
    each = sum(positions.edits_decode for positions in edited)
    # The last token is not computed, so that nothing edits it.
    made = max(0, (sampling.max_tokens or 0) - 1)
    if each and not given and rows <= MAX_TRACED_ROWS:
        made = min(made, (MAX_TRACED_ROWS - rows) // each)
        sampling = replace(sampling, max_tokens=made + 1)
    rows += each * made
    if rows > MAX_TRACED_ROWS:
        raise too_much_traced(rows)
    return rows, sampling


def too_much_traced(rows: int) -> InvalidRequest:
    """The error of a trace of so many rows."""
    return InvalidRequest(
        f"trace: the edits times the tokens that they edit are {rows} rows, and one request gets "
        f"at most {MAX_TRACED_ROWS}. Shorten the prompts or lower max_tokens, or trace fewer "
        "interventions at once.",
        param="trace",
    )
