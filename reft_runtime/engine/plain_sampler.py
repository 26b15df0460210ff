"""Picks tokens by torch's own operators: without a compiler, and on other devices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from reft_runtime.kernels.operators import Picking, Picks
from reft_runtime.kernels.staging import send

_CHUNK = 2**18
"""Logits a core works on at once: their float32 and float64 copies stay in its cache."""

_DEVICE_CHUNK = 2**25
"""Logits worked on at once on a device, where launches count; copies take half a gigabyte."""

_WIDTH = 256
"""Best tokens of a row among which its top_k and top_p thresholds are looked for first."""

_WIDEN = 32
"""Factor by which the number of tokens looked at grows when it did not suffice."""

_NOTHING = -1
"""In the place of a token: the row holds NaN or +inf, or nothing is left."""


def pick(logits: Tensor, rows: Sequence[Picking]) -> Picks:
    """Pick a token for each row of `logits` [rows, vocabulary], which are left as they are."""
    tokens = _best(logits)
    worked = [
        i
        for i, row in enumerate(rows)
        if tokens[i] >= 0 and (row.temperature or row.allowed is not None or row.added or row.seen)
    ]
    for part in _chunks(worked, logits):
        picked = _pick(logits[part].float(), [rows[i] for i in part])
        for i, token in zip(part, picked, strict=True):
            tokens[i] = token
    wanted = {
        i: (token if row.scored is None else row.scored, row.logprobs)
        for i, (token, row) in enumerate(zip(tokens, rows, strict=True))
        if token >= 0 and row.logprobs is not None
    }
    values, ids = _logprobs(logits, wanted)
    return Picks(
        tokens,
        [values.get(i, []) for i in range(len(rows))],
        [ids.get(i, []) for i in range(len(rows))],
    )


def _chunks(indices: Sequence[int], logits: Tensor) -> list[Sequence[int]]:
    size = _CHUNK * torch.get_num_threads() if logits.is_cpu else _DEVICE_CHUNK
    rows = max(1, size // logits.shape[1])
    return [indices[start : start + rows] for start in range(0, len(indices), rows)]


def _best(logits: Tensor) -> list[int]:
    """The best token of each row, `_NOTHING` where the row is not finite.

    One pass suffices: NaN and +inf are maximal, and the largest is -inf only when all are.
    """
    best, tokens = logits.max(-1)
    return [
        token if ok else _NOTHING
        for token, ok in zip(tokens.tolist(), best.isfinite().tolist(), strict=True)
    ]


def _pick(scores: Tensor, rows: Sequence[Picking]) -> list[int]:
    """Tokens of rows that need more than the maximum of their logits; overwrites `scores`."""
    for row_scores, row in zip(scores, rows, strict=True):
        _edit(row_scores, row)
    tokens = _best(scores)
    drawn = [i for i, row in enumerate(rows) if tokens[i] >= 0 and row.temperature]
    if drawn:
        # An index makes a copy, which is not needed where every row is drawn.
        part = scores if len(drawn) == len(rows) else scores[drawn]
        for i, token in zip(drawn, draw(part, [rows[i] for i in drawn]), strict=True):
            tokens[i] = token
    return tokens


def _edit(scores: Tensor, row: Picking) -> None:
    """Bias, ban and penalise the tokens of one row [vocabulary], in place."""
    device = scores.device
    if row.allowed is not None:
        words = row.allowed.numpy().view(np.uint8)
        bits = np.unpackbits(words, count=len(scores), bitorder="little")
        scores.masked_fill_(send(torch.from_numpy(bits == 0), device), -math.inf)
    if row.added is not None:
        ids, amounts = (torch.tensor(each, device=device) for each in row.added)
        scores[ids] += amounts.float()
    if row.seen is not None:
        ids, times = (torch.tensor(each, device=device) for each in row.seen)
        seen = scores[ids]
        # The clamp keeps a tiny penalty's quotient finite.
        seen = torch.where(seen > 0, seen / row.repetition, seen * row.repetition)
        seen.clamp_(max=torch.finfo(torch.float32).max)
        amounts = row.presence + row.frequency * times.float()
        scores[ids] = torch.where(times > 0, seen - amounts, seen)


def draw(scores: Tensor, rows: Sequence[Picking]) -> list[int]:
    """Draw a token from each row of `scores` [rows, vocabulary]; overwrites them.

    The largest of each row is finite.
    """
    # The best becomes 0 before anything divides, so that no temperature can overflow.
    scores -= scores.amax(-1, keepdim=True)
    scores /= _column([own.temperature for own in rows], scores)
    if any(own.min_p > 0 for own in rows):
        lowest = _column([own.min_p for own in rows], scores).log()
        scores.masked_fill_(scores < lowest, -math.inf)
    _truncate(scores, rows)

    weights = scores.exp_().cumsum(-1, dtype=torch.float64)
    uniform = _column([own.point for own in rows], weights)
    # The first id whose cumulated weight exceeds the point: never one of weight 0.
    tokens: list[int] = (
        torch.searchsorted(weights, uniform * weights[:, -1:], right=True).squeeze(1).tolist()
    )
    return tokens


def _truncate(scores: Tensor, rows: Sequence[Picking]) -> None:
    """Apply top_k and, to what it leaves, top_p; the best of each row of `scores` is 0.

    top_p keeps the shortest list of best tokens whose weight reaches that share of the whole. The
    list is looked for among a few hundred best tokens first, then among more: sorting a whole
    vocabulary costs 20 times as much, and only flat distributions need it.
    """
    vocabulary = scores.shape[1]
    limits = [min(own.top_k or vocabulary, vocabulary) for own in rows]
    pending = [i for i, own in enumerate(rows) if limits[i] < vocabulary or own.top_p < 1]
    if not pending:
        return
    counts, thresholds = [vocabulary] * len(rows), [-math.inf] * len(rows)
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
        wanted = total * _column([rows[i].top_p for i in pending], mass)
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
    for i, excess in enumerate(kept[i] - counts[i] for i in range(len(rows))):
        if excess > 0:
            equals = (scores[i] == thresholds[i]).nonzero().squeeze(1)
            scores[i, equals[-excess:]] = -math.inf


def _logprobs(
    logits: Tensor, wanted: Mapping[int, tuple[int, int]]
) -> tuple[dict[int, list[float]], dict[int, list[int]]]:
    """Log-probabilities of a token and of the k best tokens, for rows of `logits`; and their ids.

    `wanted` maps a row to (token, k); the results are by row, too.
    """
    values: dict[int, list[float]] = {}
    ids: dict[int, list[int]] = {}
    for part in _chunks(list(wanted), logits):
        scores = logits[part].float()
        norms = scores.logsumexp(-1, keepdim=True)
        chosen = scores.gather(1, _column([wanted[i][0] for i in part], norms, torch.long))
        best = scores.topk(min(scores.shape[1], max(wanted[i][1] for i in part)))
        values |= zip(part, (torch.cat((chosen, best.values), 1) - norms).tolist(), strict=True)
        ids |= zip(part, best.indices.tolist(), strict=True)
    return values, ids


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor [rows, 1] on the device of `like`, and of its dtype unless one is given."""
    return send(torch.tensor(values, dtype=dtype or like.dtype), like.device).unsqueeze(1)
