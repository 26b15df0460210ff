"""What picks tokens as on a device, in the place of its kernels."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from reft_runtime.engine import plain_sampler
from reft_runtime.engine.device_sampler import NOBODY, Batch, Chosen, Select, Settings
from reft_runtime.kernels.operators import Picking
from reft_runtime.sampling import MAX_LOGPROBS


def bits_of(ids: Iterable[int], vocabulary: int = 600) -> Tensor:
    """The bits of some ids, as a grammar writes those that it allows."""
    bits = torch.zeros(-(-vocabulary // 32), dtype=torch.int64)
    for token in ids:
        bits[token // 32] |= 1 << token % 32
    return bits.int()


def triton_select(chunk: int | None = None) -> Select:
    """The kernels of devices; without one in Triton's interpreter, which takes seconds."""
    from reft_runtime.engine.triton_selection import CHUNK, TritonSelection

    return TritonSelection(chunk or CHUNK)


def plain_select(batch: Batch) -> Chosen:
    """`Select` by torch's own operators, a row at a time; it draws as the CPU's sampler does."""
    logits = batch.logits.float()
    rows = [Settings(*numbers) for numbers in batch.settings.tolist()]
    tokens = torch.tensor([_token(logits[int(row.source)], row, batch) for row in rows])
    if not batch.needs.logprobs:
        return Chosen(tokens)
    values = torch.zeros(len(tokens), 1 + MAX_LOGPROBS)
    ids = torch.zeros(len(tokens), MAX_LOGPROBS, dtype=torch.int32)
    for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
        if row.best != NOBODY and token >= 0:
            scores = logits[int(row.source)].log_softmax(-1)
            best = scores.topk(int(row.best))
            values[i, 0] = scores[token]
            values[i, 1 : 1 + int(row.best)], ids[i, : int(row.best)] = best
    return Chosen(tokens, values, ids)


def _token(logits: Tensor, row: Settings, batch: Batch) -> int:
    scores = _edited(logits, row, batch)
    if not logits.max().isfinite() or not scores.max().isfinite():
        return -1
    if not row.inverse:
        return int(scores.argmax())
    picking = Picking(
        temperature=1 / row.inverse,
        top_k=int(row.limit),
        top_p=row.share,
        min_p=math.exp(-row.reach),
        point=row.point,
    )
    [token] = plain_sampler.draw(scores[None].clone(), [picking])
    return token


def _edited(scores: Tensor, row: Settings, batch: Batch) -> Tensor:
    scores = scores.clone()
    if row.mask != NOBODY:
        assert batch.masks is not None
        for at in range(len(scores)):
            if not int(batch.masks[int(row.mask)][at // 32]) >> at % 32 & 1:
                scores[at] = -math.inf
    for item in batch.items[int(row.first_item) : int(row.stop_item)]:
        scores[int(item[0])] += item[1].float()
    if row.lane != NOBODY:
        assert batch.counts is not None
        counts = batch.counts[int(row.lane)]
        newest = int(row.newest)
        if row.newest_at != NOBODY:
            assert batch.before is not None
            newest = int(batch.before[int(row.newest_at)])
        if newest >= 0:
            counts[newest] += 2
        penalised = torch.where(scores > 0, scores / row.repetition, scores * row.repetition)
        penalised.clamp_(max=torch.finfo(torch.float32).max)
        scores = torch.where(counts > 0, penalised, scores)
        times = (counts // 2).float()
        scores = torch.where(times > 0, scores - (row.presence + row.frequency * times), scores)
    return scores
