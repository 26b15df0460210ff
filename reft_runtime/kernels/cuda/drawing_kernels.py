"""Triton kernels that find thresholds among the few scores left, and draw.

`engine/triton_selection.py` launches them. `sampling_kernels` has the kernels that run before them,
the functions that both share, and the meaning of weights and distances.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reft_runtime.kernels.cuda.sampling_kernels import (
    BEYOND,
    FIELDS,
    INFINITY,
    INVERSE,
    LIMIT,
    POINT,
    SHARE,
    best_of,
    distances_of,
    is_finite,
    scores_of,
    share_of,
)


@triton.jit
def _upto(
    left,
    lengths,
    row,
    limit,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Count the distances left whose bits are at most `limit`.

    Returns their number, their weight, the largest of their bits, and the least bits beyond.
    """
    chunk = tl.arange(0, WIDE)
    length = tl.load(lengths + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=0)
    count, mass = tl.zeros([WIDE], tl.int32), tl.zeros([WIDE], tl.int64)
    last, following = tl.full([WIDE], -1, tl.int32), tl.full([WIDE], BEYOND, tl.int32)
    for start in range(0, tl.max(length, 0), AT_ONCE):
        at = start + tl.arange(0, AT_ONCE)
        real = at[None, :] < length[:, None]
        places = (row * CHUNKS + chunk)[:, None] * CHUNK + at[None, :]
        distance = tl.load(left + places, mask=real, other=INFINITY)
        bits = tl.where(real, distance.to(tl.int32, bitcast=True), BEYOND)
        within = bits <= limit
        count += tl.sum(within.to(tl.int32), 1)
        weight = (tl.exp(-distance) * SCALE).to(tl.int64)
        mass += tl.sum(tl.where(within, weight, 0), 1)
        last = tl.maximum(last, tl.max(tl.where(within, bits, -1), 1))
        following = tl.minimum(following, tl.min(tl.where(within, BEYOND, bits), 1))
    return tl.sum(count.to(tl.int64), 0), tl.sum(mass, 0), tl.max(last, 0), tl.min(following, 0)


@triton.jit
def _search(
    left,
    lengths,
    row,
    low,
    high,
    wanted,
    BY_COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SCALE: tl.constexpr,
):
    """The least bits in (low, high] that, with all below, reach `wanted` in number or weight.

    Also returns the number and the weight of the distances below them. Only bits that occur are
    tried: coarse numbers have few.
    """
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        count, mass, last, following = _upto(
            left, lengths, row, middle, CHUNK, CHUNKS, WIDE, AT_ONCE, SCALE
        )
        found = count if BY_COUNT else mass
        high = tl.where(found >= wanted, last, high)
        low = tl.where(found >= wanted, low, following - 1)
    count, mass, _, _ = _upto(left, lengths, row, high - 1, CHUNK, CHUNKS, WIDE, AT_ONCE, SCALE)
    return high, count, mass


@triton.jit
def _at_border(
    left,
    lengths,
    row,
    border,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Weight of the distances left before a border, and number of those at it, by chunk."""
    chunk = tl.arange(0, WIDE)
    length = tl.load(lengths + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=0)
    mass, equals = tl.zeros([WIDE], tl.int64), tl.zeros([WIDE], tl.int64)
    for start in range(0, tl.max(length, 0), AT_ONCE):
        at = start + tl.arange(0, AT_ONCE)
        real = at[None, :] < length[:, None]
        places = (row * CHUNKS + chunk)[:, None] * CHUNK + at[None, :]
        distance = tl.load(left + places, mask=real, other=INFINITY)
        bits = distance.to(tl.int32, bitcast=True)
        weight = (tl.exp(-distance) * SCALE).to(tl.int64)
        mass += tl.sum(tl.where(real & (bits < border), weight, 0), 1)
        equals += tl.sum((real & (bits == border)).to(tl.int64), 1)
    return mass, equals


@triton.jit
def choose(
    logits,
    edited,
    settings,
    tops,
    firsts,
    totals,
    masses,
    numbers,
    left,
    lengths,
    bounds,
    tokens,
    stride,
    VOCABULARY: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Choose a row's token, the best or drawn, -1 if the row is not finite; programs: (row,)."""
    row = tl.program_id(0).to(tl.int64)
    setting = settings + row * FIELDS
    chunk = tl.arange(0, WIDE)
    real = chunk < CHUNKS
    own = row * CHUNKS + chunk
    best = best_of(tops, row, 1, CHUNKS, WIDE)
    token = tl.cast(-1, tl.int64)
    if is_finite(best) & (best_of(tops, row, 0, CHUNKS, WIDE) < INFINITY):
        top = tl.load(tops + (row * 2 + 1) * CHUNKS + chunk, mask=real, other=-INFINITY)
        first = tl.load(firsts + own, mask=real & (top == best), other=VOCABULARY)
        token = tl.min(first, 0).to(tl.int64)
        if tl.load(setting + INVERSE).to(tl.float32) > 0:
            # What lies before the border is kept, and the first few of what lies at it.
            border, few = tl.cast(BEYOND, tl.int32), tl.cast(0, tl.int64)
            mass = tl.load(masses + own, mask=real, other=0)
            kept = tl.zeros([WIDE], tl.int64)
            each = tl.cast(0, tl.int64)
            limit = tl.load(setting + LIMIT).to(tl.int64)
            by_count = limit < VOCABULARY
            by_weight = tl.load(setting + SHARE) < 1
            if by_count | by_weight:
                low, border = tl.load(bounds + 2 * row), tl.load(bounds + 2 * row + 1)
                low = tl.where(low < 0, -1, low.to(tl.int32, bitcast=True))
                border = border.to(tl.int32, bitcast=True)
                sure = tl.sum(mass, 0)
                total = tl.sum(tl.load(totals + own, mask=real, other=0), 0)
                if by_count:
                    number = tl.load(numbers + own, mask=real, other=0).to(tl.int64)
                    length = tl.load(lengths + own, mask=real, other=0).to(tl.int64)
                    wanted = tl.minimum(limit - tl.sum(number, 0), tl.sum(length, 0))
                    total = sure
                    if wanted > 0:
                        border, count, weight = _search(
                            left, lengths, row, low, border, wanted,
                            True, CHUNK, CHUNKS, WIDE, AT_ONCE, SCALE,
                        )  # fmt: skip
                        few = wanted - count
                        each = tl.exp(-border.to(tl.float32, bitcast=True))
                        each = (each * SCALE).to(tl.int64)
                        total = sure + weight + few * each
                    else:
                        border = low + 1
                if by_weight:
                    wanted = share_of(total, setting) - sure
                    border, count, weight = _search(
                        left, lengths, row, low, border, wanted,
                        False, CHUNK, CHUNKS, WIDE, AT_ONCE, SCALE,
                    )  # fmt: skip
                    each = (tl.exp(-border.to(tl.float32, bitcast=True)) * SCALE).to(tl.int64)
                    few = (wanted - weight + each - 1) // tl.maximum(each, 1)
                weight, equals = _at_border(
                    left, lengths, row, border, CHUNK, CHUNKS, WIDE, AT_ONCE, SCALE
                )
                kept = few - (tl.cumsum(equals, 0) - equals)
                kept = tl.maximum(tl.minimum(kept, equals), 0)
                mass += weight + kept * each

            # The first id whose cumulated weight exceeds the point, by chunk and in the chunk.
            upto = tl.cumsum(mass, 0)
            total = tl.sum(mass, 0)
            point = (total.to(tl.float64) * tl.load(setting + POINT)).to(tl.int64)
            point = tl.minimum(point, total - 1)
            where = tl.sum((upto <= point).to(tl.int32), 0)
            point -= tl.sum(tl.where(chunk < where, mass, 0), 0)
            few = tl.sum(tl.where(chunk == where, kept, 0), 0)
            at = where * CHUNK + tl.arange(0, CHUNK)
            score = scores_of(logits, edited, setting, at, stride, VOCABULARY)
            distance = distances_of(score, best, setting)
            bits = distance.to(tl.int32, bitcast=True)
            equal = bits == border
            drawn = (bits < border) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= few))
            weights = tl.where(drawn, (tl.exp(-distance) * SCALE).to(tl.int64), 0)
            passed = (tl.cumsum(weights, 0) <= point).to(tl.int32)
            token = (where * CHUNK + tl.sum(passed, 0)).to(tl.int64)
    tl.store(tokens + row, token)
