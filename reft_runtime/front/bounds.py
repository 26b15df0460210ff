"""The bounds of a request: its length, its log-probabilities and the rows of its trace."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from reft_runtime.errors import ContextLengthExceeded, InvalidRequest
from reft_runtime.outputs import Tracing
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.labels import LabelTree

if TYPE_CHECKING:
    from reft_runtime.schedule.request import AppliedIntervention

MAX_SCORES = 200_000
"""Most log-probabilities of one request: its tokens times (1 + alternatives per token).

A trace adds one for each token of an answer: the base model's log-probability.
"""

MAX_TRACED_ROWS = 16_384
"""Most rows of one request's trace: the sum over its edits of the tokens that each edits.

In a trace `along` each counts once for each direction of its edit.
"""


class Traced(NamedTuple):
    """The positions of an edit that a trace tells of, and what each of its rows counts."""

    positions: _Positions
    weight: int


class _Positions(Protocol):
    def count(self, n: int) -> int: ...

    def generated(self, start: int, stop: int) -> Sequence[int]: ...


def traced(uses: Iterable[AppliedIntervention], trace: Tracing) -> list[Traced]:
    """What a trace tells of; raises `InvalidRequest` for what cannot be read along."""
    found = []
    for edit in (edit for use in uses if use.strength or trace == "along" for edit in use.edits):
        weight = len(edit.axes) if trace == "along" else 1
        if not weight:
            raise InvalidRequest(
                f"trace: the edit of layer {edit.layer} has no directions, along which its rows"
                " could be read; trace it with true.",
                param="trace",
            )
        found.append(Traced(edit.positions, weight))
    return found


def check_length(prompt: int, max_tokens: int | None, limit: int, field: str) -> None:
    """Raise `ContextLengthExceeded` if a prompt of `prompt` tokens leaves no room for its answer.

    An answer without `max_tokens` needs one token. The error's `param` is the prompt's `field`, or
    `max_tokens` if a shorter answer would fit.
    """
    needed = 1 if max_tokens is None else max_tokens
    if prompt + needed > limit:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens, but {prompt + needed} are "
            f"needed ({prompt} in the prompt, {needed} for the answer). Shorten the prompt or "
            "lower max_tokens.",
            param=field if prompt + min(needed, 1) > limit else "max_tokens",
        )


def check_labels(
    prompts: Sequence[int], labels: Sequence[LabelTree], limit: int, field: str
) -> None:
    """Raise if a prompt (of so many tokens) leaves no room for a label, or the scores are too many.

    `labels` are those behind each prompt. Raises `ContextLengthExceeded`, whose `param` is the
    prompts' `field`, and `InvalidRequest`.
    """
    for prompt, tree in zip(prompts, labels, strict=True):
        longest = max(map(len, tree.labels))
        if prompt + longest > limit:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {limit} tokens, but {prompt + longest} are"
                f" needed ({prompt} in the prompt, {longest} for the longest label). Shorten the"
                " prompt or the labels.",
                param=field if prompt + 1 > limit else "labels",
            )
    scores = sum(len(label) for tree in labels for label in tree.labels)
    if scores > MAX_SCORES:
        raise InvalidRequest(
            f"labels: those of {len(prompts)} prompts have {scores} tokens to score, and one"
            f" request gets at most {MAX_SCORES}. Send fewer prompts at once, or fewer labels.",
            param="labels",
        )


def bounded(
    prompts: Sequence[int],
    limit: int,
    sampling: SamplingParams,
    edited: Sequence[Traced],
    *,
    most: int | None = None,
    trace: bool,
) -> Iterator[SamplingParams]:
    """Yield the settings for each prompt; `prompts` are the lengths in tokens.

    The bounds count all prompts together. A `max_tokens` of None becomes the most that the bounds
    and `limit`, the model's length, allow, and at most `most`. Raises `InvalidRequest`.
    """
    given, rows = sampling.max_tokens is not None, 0
    for prompt in prompts:
        room = limit - prompt if most is None else min(most, limit - prompt)
        settings = _bound_scores(prompts, sampling, room, trace=trace)
        if trace:
            rows, settings = _bound_trace(edited, prompt, settings, given=given, taken=rows)
        yield settings


def _bound_scores(
    prompts: Sequence[int], sampling: SamplingParams, room: int, *, trace: bool
) -> SamplingParams:
    """Settings of a request with prompts of these lengths, after checking its log-probabilities.

    A `trace` needs the log-probabilities of the answers' tokens, so the returned settings ask for
    them.
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
    edited: Sequence[Traced], prompt: int, sampling: SamplingParams, *, given: bool, taken: int
) -> tuple[int, SamplingParams]:
    """The most rows that a trace may have after this prompt, `taken` included, and the settings.

    `given` says whether the caller chose `max_tokens`; if not, it becomes what the bound allows.
    """
    before = taken + sum(one.weight * one.positions.count(prompt) for one in edited)

    def rows_with(made: int) -> int:
        return before + sum(one.weight * len(one.positions.generated(0, made)) for one in edited)

    # The last token is never run through the model, so nothing edits it.
    made = max(0, (sampling.max_tokens or 0) - 1)
    rows = rows_with(made)
    if before <= MAX_TRACED_ROWS < rows and not given:
        made = bisect_right(range(made + 1), MAX_TRACED_ROWS, key=rows_with) - 1
        sampling = replace(sampling, max_tokens=made + 1)
        rows = rows_with(made)
    if rows > MAX_TRACED_ROWS:
        several = any(one.weight > 1 for one in edited)
        directions = ", once for each direction that is read along," if several else ""
        raise InvalidRequest(
            f"trace: the edits times the tokens that they edit{directions} are {rows} rows, and "
            f"one request gets at most {MAX_TRACED_ROWS}. Shorten the prompts or lower max_tokens, "
            "or trace fewer interventions at once.",
            param="trace",
        )
    return rows, sampling
