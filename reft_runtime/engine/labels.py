"""The log-probabilities of labels after a prompt: read from logits, and collected by request."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from reft_runtime.engine.events import LabelsScored
from reft_runtime.kernels.staging import send
from reft_runtime.schedule.labels import END, Tokens
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.request import Request

_ROWS = 64
"""Rows of logits worked on at once: each gets a float32 copy."""


def scored_rows(chunk: Chunk) -> range:
    """Positions of a chunk after which something is scored; empty if nothing is."""
    first = chunk.sequence.first_scored
    return (
        range(chunk.stop, chunk.stop)
        if first is None
        else range(max(chunk.start, first), chunk.stop)
    )


def beginnings(chunk: Chunk) -> list[Tokens]:
    """The beginning of labels that the sequence has at each scored position of its chunk."""
    sequence = chunk.sequence
    begin = sequence.prompt_length
    return [tuple(sequence.tokens[begin : at + 1]) for at in scored_rows(chunk)]


def label_logprobs(
    logits: Tensor,
    prefixes: SequenceOf[Tokens],
    following: Mapping[Tokens, Tokens],
    eos_ids: Collection[int],
) -> dict[Tokens, float] | None:
    """Log-probabilities (natural) of what may follow each beginning, by beginning and token.

    `logits` [beginnings, vocabulary] come behind `prefixes`. Those of `END` are of all `eos_ids`
    together. None if a row is not finite.
    """
    found: dict[Tokens, float] = {}
    for start in range(0, len(prefixes), _ROWS):
        part = prefixes[start : start + _ROWS]
        scores = logits[start : start + len(part)].float().log_softmax(-1)
        asked = [(row, token) for row, prefix in enumerate(part) for token in following[prefix]]
        rows, tokens = send(torch.tensor(asked), logits.device).unbind(1)
        values = scores[rows, tokens.clamp(min=0)]
        if any(token == END for _, token in asked):
            ids = send(torch.tensor(sorted(eos_ids)), logits.device)
            values = torch.where(tokens == END, scores[:, ids].logsumexp(-1)[rows], values)
        for (row, token), value in zip(asked, values.tolist(), strict=True):
            found[*part[row], token] = value
    return found if all(map(math.isfinite, found.values())) else None


class LabelScores:
    """What is known of the labels of the live requests that ask for them."""

    def __init__(self) -> None:
        self._found: dict[str, dict[Tokens, float]] = {}

    def take(self, request: Request, logprobs: Mapping[Tokens, float]) -> None:
        """Add log-probabilities; what is computed again after a preemption replaces the old."""
        self._found.setdefault(request.id, {}).update(logprobs)

    def ended(self, request: Request) -> list[LabelsScored]:
        """The last event of a request whose sequences have all ended; none if it has no labels."""
        if request.labels is None:
            return []
        return [LabelsScored(request.id, request.labels.scores(self._found.pop(request.id)))]

    def drop(self, request_id: str) -> None:
        """Forget a request that is over."""
        self._found.pop(request_id, None)

    def check_integrity(self) -> None:
        """Raise AssertionError if anything is left. The engine must be idle."""
        if self._found:
            raise AssertionError(f"labels left: {', '.join(self._found)}")
