"""From one row of logits to one token, for every row of a step.

Order of processing, as in vLLM: the row must be finite; log-probabilities are taken from the raw
logits; then what a grammar refuses, logit_bias, the min_tokens ban, repetition, presence and
frequency penalties, temperature, min_p, top_k, top_p, and the draw. Arithmetic is float32 whatever
the logits' dtype (cumulated weights are float64).

The draw inverts the distribution's CDF, in the order of token ids, at one number in [0, 1) that
depends on (seed, choice, step) only. So a row's token depends on its own logits and noise, and on
nothing else in the batch. Of equal logits the lowest id is the greedy choice and the first to be
kept by top_k and top_p.
"""

from __future__ import annotations

import hashlib
import math
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reft_runtime.engine import plain_sampler
from reft_runtime.kernels.operators import Picking, Picks, cpu_operators
from reft_runtime.outputs import TokenLogprob
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.token_counts import TokenCounts

TINY = torch.finfo(torch.float32).tiny
"""The least temperature and repetition penalty that are applied."""


# Not frozen: there is one for every token, and a frozen one takes five times as long to make.
@dataclass(slots=True)
class SampleRow:
    """What the sampler must know about one row, that of choice number `choice` of n.

    `made` is the number of the choice's tokens so far, and `counts` counts prompt and tokens where
    the row has penalties. `seed` is the request's own or one drawn at its admission. Token ids of
    `logit_bias` and `stop_token_ids` lie inside the vocabulary. `allowed` has a bit for each token
    id that a grammar allows, int32 [words] on the CPU; None allows all.
    """

    params: SamplingParams
    seed: int
    choice: int
    made: int
    counts: TokenCounts | None
    eos_ids: frozenset[int]
    allowed: Tensor | None = None


# Not frozen: there is one for every token, and a frozen one takes five times as long to make.
@dataclass(slots=True)
class Sampled:
    """The token picked for one row, and its log-probability where `params.logprobs` asks for it."""

    token: int
    logprob: TokenLogprob | None = None


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled | None]:
    """Pick one token a row; `logits` [rows, vocabulary] is left as it is.

    None stands for a row that cannot be sampled: it holds NaN or +inf, or no token is left (all
    are -inf, from the model or after the bans).
    """
    picks = _pick(logits, [_picking(row) for row in rows])
    return [
        None if token < 0 else Sampled(token, _logprob(picks, i, token, row.params.logprobs))
        for i, (token, row) in enumerate(zip(picks.tokens, rows, strict=True))
    ]


@torch.inference_mode()
def prompt_logprobs(
    logits: Tensor, next_tokens: Sequence[int], k: int
) -> list[TokenLogprob | None]:
    """Log-probability of each of `next_tokens` [T] after its position's `logits` [T, vocabulary].

    Each comes with the k best tokens of its position. None stands for a row that is not finite.
    """
    picks = _pick(logits, [Picking(logprobs=k, scored=token) for token in next_tokens])
    return [
        None if best < 0 else _logprob(picks, i, token, k)
        for i, (best, token) in enumerate(zip(picks.tokens, next_tokens, strict=True))
    ]


def noise(seed: int, choice: int, step: int) -> float:
    """The number in [0, 1), a multiple of 2**-53, that draws token `step` of a choice.

    It is a hash of the three numbers and not a generator with a state: so it is the same in any
    batch, on any device, after a preemption, and in every version of torch.
    """
    digest = hashlib.blake2b(struct.pack("<qqq", seed, choice, step), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def banned(params: SamplingParams, eos_ids: Iterable[int]) -> list[int]:
    """Tokens that end a choice: they are banned until it has `min_tokens` tokens."""
    return [*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)]


def has_penalties(params: SamplingParams) -> bool:
    """Whether scores depend on earlier tokens: by repetition, presence or frequency penalties."""
    return bool(
        params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    )


def _banned(row: SampleRow) -> list[int]:
    """The tokens that are banned for the row's next token, where no grammar decides it."""
    if row.allowed is not None or row.made >= row.params.min_tokens:
        return []
    return banned(row.params, row.eos_ids)


def _pick(logits: Tensor, rows: Sequence[Picking]) -> Picks:
    """Pick by the compiled operators where they take the logits, else by torch's own."""
    operators = cpu_operators()
    if operators is not None and operators.supports(logits):
        return operators.pick(logits, rows)
    return plain_sampler.pick(logits, rows)


def _picking(row: SampleRow) -> Picking:
    params = row.params
    added = {**params.logit_bias, **dict.fromkeys(_banned(row), -math.inf)}
    return Picking(
        temperature=max(params.temperature, TINY) if params.temperature else 0.0,
        min_p=params.min_p,
        top_k=params.top_k,
        top_p=params.top_p,
        point=noise(row.seed, row.choice, row.made) if params.temperature else 0.0,
        repetition=max(params.repetition_penalty, TINY),
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        allowed=row.allowed,
        added=(array("q", added), array("d", added.values())) if added else None,
        seen=None if row.counts is None else (row.counts.ids, row.counts.times),
        logprobs=params.logprobs,
    )


def _logprob(picks: Picks, row: int, token: int, k: int | None) -> TokenLogprob | None:
    if k is None:
        return None
    own, *best = picks.logprobs[row]
    return TokenLogprob(token, own, tuple(zip(picks.ids[row][:k], best[:k], strict=True)))
