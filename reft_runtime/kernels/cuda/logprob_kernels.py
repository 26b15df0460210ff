"""Triton kernels for log-probabilities, which are those of the raw logits."""

from __future__ import annotations

import triton
import triton.language as tl

from reft_runtime.kernels.cuda.sampling_kernels import (
    BEST,
    BEYOND,
    FIELDS,
    INFINITY,
    SOURCE,
    best_of,
    is_finite,
)

TOPS = tl.constexpr(32)
"""Room for the list of a chunk's best tokens."""


@triton.jit
def best_few(
    logits,
    settings,
    tops,
    totals,
    values,
    ids,
    stride,
    VOCABULARY: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Sum the weights of raw logits, and list the best that a row asks for; programs: (row, chunk).

    `values` and `ids` are [rows, chunks, TOPS]; the id -1 ends a list. If a row asks for k tokens,
    no more than there are chunks, none of them is below the k-th largest of the chunks' maxima:
    few chunks have to look for more than one or two.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    setting = settings + row * FIELDS
    wanted = tl.load(setting + BEST).to(tl.int32)
    best = best_of(tops, row, 0, CHUNKS, WIDE)
    if is_finite(best) & (wanted >= 0):
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        alive = at < VOCABULARY
        source = tl.load(setting + SOURCE).to(tl.int64)
        logit = tl.load(logits + source * stride + at, mask=alive, other=-INFINITY)
        logit = logit.to(tl.float32)
        own = row * CHUNKS + chunk
        tl.store(totals + own, tl.sum((tl.exp(-(best - logit)) * SCALE).to(tl.int64), 0))

        other = tl.arange(0, WIDE)
        place = tops + row * 2 * CHUNKS + other
        top = tl.load(place, mask=other < CHUNKS, other=-INFINITY)
        better = tl.sum((top[None, :] > top[:, None]).to(tl.int32), 1)
        least = tl.min(tl.where(better < wanted, top, INFINITY), 0)
        least = tl.where(wanted <= CHUNKS, least, -INFINITY)

        found = tl.cast(0, tl.int32)
        value = tl.max(logit, 0)
        while (found < wanted) & (value >= least):
            token = tl.min(tl.where(alive & (logit == value), at, VOCABULARY), 0)
            if token < VOCABULARY:
                tl.store(values + own * TOPS + found, value)
                tl.store(ids + own * TOPS + found, token)
                alive = alive & (at != token)
                value = tl.max(tl.where(alive, logit, -INFINITY), 0)
                found += 1
            else:
                value = tl.cast(float("nan"), tl.float32)
        tl.store(ids + own * TOPS + found, -1)


@triton.jit
def report(
    logits,
    settings,
    tops,
    totals,
    values,
    ids,
    tokens,
    found_values,
    found_ids,
    stride,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    MOST: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Write a row's log-probabilities [1 + MOST], its token's first, and ids [MOST].

    Programs: (row,).
    """
    row = tl.program_id(0).to(tl.int64)
    setting = settings + row * FIELDS
    wanted = tl.load(setting + BEST).to(tl.int32)
    token = tl.load(tokens + row)
    if (wanted >= 0) & (token >= 0):
        chunk, rank = tl.arange(0, WIDE), tl.arange(0, TOPS)
        real = chunk < CHUNKS
        total = tl.sum(tl.load(totals + row * CHUNKS + chunk, mask=real, other=0), 0)
        log = tl.log(total.to(tl.float32) * (1.0 / SCALE))
        norm = best_of(tops, row, 0, CHUNKS, WIDE) + log
        own = logits + tl.load(setting + SOURCE).to(tl.int64) * stride + token
        tl.store(found_values + row * (1 + MOST), tl.load(own).to(tl.float32) - norm)

        places = (row * CHUNKS + chunk)[:, None] * TOPS + rank[None, :]
        listed = tl.load(ids + places, mask=real[:, None], other=-1)
        # What stands behind the end of a list was never written.
        ended = tl.cumsum((listed < 0).to(tl.int32), 1) > 0
        alive = real[:, None] & (ended == 0)
        value = tl.load(values + places, mask=alive, other=-INFINITY)
        for at in range(wanted):
            best = tl.max(tl.max(tl.where(alive, value, -INFINITY), 1), 0)
            other = tl.where(alive & (value == best), listed, BEYOND)
            first = tl.min(tl.min(other, 1), 0)
            tl.store(found_values + row * (1 + MOST) + 1 + at, best - norm)
            tl.store(found_ids + row * MOST + at, first)
            alive = alive & (listed != first)
