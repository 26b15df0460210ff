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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reft_runtime.kernels.operators import Drawing, cpu_operators
from reft_runtime.kernels.staging import send
from reft_runtime.outputs import TokenLogprob
from reft_runtime.sampling import SamplingParams

_CHUNK = 2**18
"""Logits a core works on at once: their float32 and float64 copies stay in its cache."""

_DEVICE_CHUNK = 2**25
"""Logits worked on at once on a device, where launches count; copies take half a gigabyte."""

_WIDTH = 256
"""Best tokens of a row among which its top_k and top_p thresholds are looked for first."""

_WIDEN = 32
"""Factor by which the number of tokens looked at grows when it did not suffice."""

TINY = torch.finfo(torch.float32).tiny
"""The least temperature and repetition penalty that are applied."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What the sampler must know about one row, that of choice number `choice` of n.

    `generated` are the choice's tokens so far. `seed` is the request's own or one drawn at its
    admission. Token ids of `logit_bias` and `stop_token_ids` lie inside the vocabulary. `allowed`
    has a bit for each token id that a grammar allows, int32 [words] on the CPU; None allows all.
    """

    params: SamplingParams
    seed: int
    choice: int
    prompt: Sequence[int]
    generated: Sequence[int]
    eos_ids: frozenset[int]
    allowed: Tensor | None = None


@dataclass(frozen=True, slots=True)
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
    tokens = _greedy(logits)
    worked = [
        i
        for i, row in enumerate(rows)
        if tokens[i] is not None and (row.params.temperature > 0 or _is_edited(row))
    ]
    for part in _chunks(worked, logits):
        picked = _pick(logits[part].float(), [rows[i] for i in part])
        for i, token in zip(part, picked, strict=True):
            tokens[i] = token

    logprobs = _logprobs(
        logits,
        {
            i: (token, row.params.logprobs)
            for i, (token, row) in enumerate(zip(tokens, rows, strict=True))
            if token is not None and row.params.logprobs is not None
        },
    )
    return [
        None if token is None else Sampled(token, logprobs.get(i)) for i, token in enumerate(tokens)
    ]


@torch.inference_mode()
def prompt_logprobs(
    logits: Tensor, next_tokens: Sequence[int], k: int
) -> list[TokenLogprob | None]:
    """Log-probability of each of `next_tokens` [T] after its position's `logits` [T, vocabulary].

    Each comes with the k best tokens of its position. None stands for a row that is not finite.
    """
    wanted = {
        i: (token, k)
        for i, (best, token) in enumerate(zip(_greedy(logits), next_tokens, strict=True))
        if best is not None
    }
    logprobs = _logprobs(logits, wanted)
    return [logprobs.get(i) for i in range(len(next_tokens))]


def noise(seed: int, choice: int, step: int) -> float:
    """The number in [0, 1), a multiple of 2**-53, that draws token `step` of a choice.

    It is a hash of the three numbers and not a generator with a state: so it is the same in any
    batch, on any device, after a preemption, and in every version of torch.
    """
    digest = hashlib.blake2b(struct.pack("<qqq", seed, choice, step), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _chunks(indices: Sequence[int], logits: Tensor) -> list[Sequence[int]]:
    size = _CHUNK * torch.get_num_threads() if logits.is_cpu else _DEVICE_CHUNK
    rows = max(1, size // logits.shape[1])
    return [indices[start : start + rows] for start in range(0, len(indices), rows)]


def _greedy(logits: Tensor) -> list[int | None]:
    """The best token of each row, None where the row is not finite.

    One pass suffices: NaN and +inf are maximal, and the largest is -inf only when all are.
    """
    operators = cpu_operators()
    if operators is not None and operators.supports(logits):
        return [None if token < 0 else token for token in operators.greedy(logits)]
    best, tokens = logits.max(-1)
    return [
        token if ok else None
        for token, ok in zip(tokens.tolist(), best.isfinite().tolist(), strict=True)
    ]


def _pick(scores: Tensor, rows: Sequence[SampleRow]) -> list[int | None]:
    """Tokens of rows that need more than the maximum of their logits; overwrites `scores`."""
    for row_scores, row in zip(scores, rows, strict=True):
        _edit(row_scores, row)
    tokens = _greedy(scores)
    drawn = [
        i for i, row in enumerate(rows) if tokens[i] is not None and row.params.temperature > 0
    ]
    if drawn:
        # An index makes a copy, which is not needed where every row is drawn.
        part = scores if len(drawn) == len(rows) else scores[drawn]
        params = [rows[i].params for i in drawn]
        points = [noise(rows[i].seed, rows[i].choice, len(rows[i].generated)) for i in drawn]
        for i, token in zip(drawn, _draw(part, params, points), strict=True):
            tokens[i] = token
    return tokens


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
    made = len(row.generated)
    if row.allowed is not None:
        return []
    return banned(row.params, row.eos_ids) if made < row.params.min_tokens else []


def _is_edited(row: SampleRow) -> bool:
    return (
        row.allowed is not None
        or bool(row.params.logit_bias)
        or has_penalties(row.params)
        or bool(_banned(row))
    )


def _edit(scores: Tensor, row: SampleRow) -> None:
    """Bias, ban and penalise the tokens of one row [vocabulary], in place."""
    params, device = row.params, scores.device
    if row.allowed is not None:
        _refuse(scores, row.allowed)
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=device)
        scores[ids] += torch.tensor(list(params.logit_bias.values()), device=device)
    if banned_now := _banned(row):
        scores[torch.tensor(banned_now, device=device)] = -math.inf
    if params.repetition_penalty != 1:
        # A repeated id is written repeatedly with the same value, so ids need not be unique.
        ids = torch.tensor([*row.prompt, *row.generated], dtype=torch.long, device=device)
        seen, penalty = scores[ids], max(params.repetition_penalty, TINY)
        # The clamp keeps a tiny penalty's quotient finite.
        scores[ids] = torch.where(seen > 0, seen / penalty, seen * penalty).clamp(
            max=torch.finfo(torch.float32).max
        )
    if row.generated and (params.presence_penalty or params.frequency_penalty):
        times = Counter(row.generated)
        counts = torch.tensor(list(times.values()), dtype=torch.float32, device=device)
        ids = torch.tensor(list(times), device=device)
        scores[ids] -= params.presence_penalty + params.frequency_penalty * counts


def _refuse(scores: Tensor, allowed: Tensor) -> None:
    """Leave no token of one row [vocabulary] but those with a bit in `allowed`, in place."""
    operators = cpu_operators()
    if operators is not None and operators.supports(scores):
        operators.refuse_(scores, allowed)
        return
    bits = np.unpackbits(allowed.numpy().view(np.uint8), count=len(scores), bitorder="little")
    scores.masked_fill_(send(torch.from_numpy(bits == 0), scores.device), -math.inf)


def _draw(scores: Tensor, params: Sequence[SamplingParams], points: Sequence[float]) -> list[int]:
    """Draw a token from each row of `scores` [rows, vocabulary]; overwrites them.

    The largest of each row is finite.
    """
    operators = cpu_operators()
    if operators is not None and operators.supports(scores):
        return operators.draw_(
            scores,
            [
                Drawing(own.temperature, own.min_p, own.top_k or 0, own.top_p, point)
                for own, point in zip(params, points, strict=True)
            ],
        )
    # The best becomes 0 before anything divides, so that no temperature can overflow.
    scores -= scores.amax(-1, keepdim=True)
    scores /= _column([own.temperature for own in params], scores).clamp(min=TINY)
    if any(own.min_p > 0 for own in params):
        lowest = _column([own.min_p for own in params], scores).log()
        scores.masked_fill_(scores < lowest, -math.inf)
    _truncate(scores, params)

    weights = scores.exp_().cumsum(-1, dtype=torch.float64)
    uniform = _column(points, weights)
    # The first id whose cumulated weight exceeds the point: never one of weight 0.
    tokens: list[int] = (
        torch.searchsorted(weights, uniform * weights[:, -1:], right=True).squeeze(1).tolist()
    )
    return tokens


def _truncate(scores: Tensor, params: Sequence[SamplingParams]) -> None:
    """Apply top_k and, to what it leaves, top_p; the best of each row of `scores` is 0.

    top_p keeps the shortest list of best tokens whose weight reaches that share of the whole. The
    list is looked for among a few hundred best tokens first, then among more: sorting a whole
    vocabulary costs 20 times as much, and only flat distributions need it.
    """
    vocabulary = scores.shape[1]
    limits = [min(own.top_k or vocabulary, vocabulary) for own in params]
    pending = [i for i, own in enumerate(params) if limits[i] < vocabulary or own.top_p < 1]
    if not pending:
        return
    counts, thresholds = [vocabulary] * len(params), [-math.inf] * len(params)
    width = _WIDTH
    while pending:
        width = min(width, vocabulary)
        part = scores[pending]
        best = part.topk(width).values
        limit = _column([limits[i] for i in pending], best)
        weights = best.exp().double()
        weights[torch.arange(width, device=scores.device) >= limit] = 0
        mass = weights.cumsum(-1)
        total = torch.where(
            limit <= width, mass[:, -1:], part.exp_().sum(-1, keepdim=True, dtype=torch.float64)
        )
        wanted = total * _column([params[i].top_p for i in pending], mass)
        found = (limit <= width) | ((limit == vocabulary) & (mass[:, -1:] >= wanted))
        # A token is kept if those before it do not suffice; one of weight 0 is never drawn.
        needed = ((mass - weights < wanted) & (weights > 0)).count_nonzero(-1)
        last = best.gather(1, needed.unsqueeze(1) - 1)
        results = zip(pending, found.tolist(), needed.tolist(), last.tolist(), strict=True)
        pending = []
        for i, (ok,), count, (threshold,) in results:
            if ok:
                counts[i], thresholds[i] = count, threshold
            else:
                pending.append(i)
        width *= _WIDEN

    lowest = _column(thresholds, scores)
    scores.masked_fill_(scores < lowest, -math.inf)
    kept = (scores >= lowest).count_nonzero(-1).tolist()
    for i, excess in enumerate(kept[i] - counts[i] for i in range(len(params))):
        if excess > 0:
            equals = (scores[i] == thresholds[i]).nonzero().squeeze(1)
            scores[i, equals[-excess:]] = -math.inf


def _logprobs(logits: Tensor, wanted: Mapping[int, tuple[int, int]]) -> dict[int, TokenLogprob]:
    """Log-probabilities of a token and of the k best tokens, for rows of `logits`.

    `wanted` maps a row to (token, k); the result is by row, too.
    """
    found = {}
    for part in _chunks(list(wanted), logits):
        scores = logits[part].float()
        norms = scores.logsumexp(-1, keepdim=True)
        chosen = scores.gather(1, _column([wanted[i][0] for i in part], norms, torch.long)) - norms
        best = scores.topk(max(wanted[i][1] for i in part))
        rows = zip(
            part,
            chosen.squeeze(1).tolist(),
            best.indices.tolist(),
            (best.values - norms).tolist(),
            strict=True,
        )
        for i, logprob, ids, values in rows:
            token, k = wanted[i]
            found[i] = TokenLogprob(token, logprob, tuple(zip(ids[:k], values[:k], strict=True)))
    return found


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor [rows, 1] on the device of `like`, and of its dtype unless one is given."""
    return send(torch.tensor(values, dtype=dtype or like.dtype), like.device).unsqueeze(1)
