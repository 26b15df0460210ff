"""Triton kernels that pick a token for every row of logits.

`engine/triton_selection.py` launches them. A row is worked on in chunks of ids, one program each.
Weights are whole numbers, SCALE times exp(score): their sums are exact in any order, so that a
row's token cannot depend on what else is in the batch, nor on how the work is split. A score is
expressed by its distance below the row's best, 0 and up: the bits of such numbers are in the order
of their values.

The thresholds of top_k and top_p are found by bisection: passes over the chunks narrow an interval
of distances, then the few that are left in it are gathered, and one program per row bisects their
bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The settings of a row, float64, in the order of `Settings`.
SOURCE = tl.constexpr(0)
PLACE = tl.constexpr(1)
LANE = tl.constexpr(2)
MASK = tl.constexpr(3)
FIRST_ITEM = tl.constexpr(4)
STOP_ITEM = tl.constexpr(5)
NEWEST = tl.constexpr(6)
NEWEST_AT = tl.constexpr(7)
POINT = tl.constexpr(8)
REPETITION = tl.constexpr(9)
PRESENCE = tl.constexpr(10)
FREQUENCY = tl.constexpr(11)
INVERSE = tl.constexpr(12)
REACH = tl.constexpr(13)
LIMIT = tl.constexpr(14)
SHARE = tl.constexpr(15)
BEST = tl.constexpr(16)
FIELDS = tl.constexpr(17)

INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.4028234663852886e38)
BEYOND = tl.constexpr(0x7FFFFFFF)
"""Larger than the bits of every distance."""
ITEMS = tl.constexpr(256)
MARGIN = tl.constexpr(2.0**-16)
"""Relative margin for the float32 sums that narrow an interval; they are far more exact."""
SPAN = tl.constexpr(16.0)
"""Largest distance in the interval that the first pass divides; beyond it weights are tiny."""


@triton.jit
def scores_of(logits, edited, setting, at, stride, VOCABULARY: tl.constexpr):
    """Float32 scores of some ids of a row, -inf beyond the vocabulary."""
    place = tl.load(setting + PLACE).to(tl.int64)
    inside = at < VOCABULARY
    if place >= 0:
        score = tl.load(edited + place * VOCABULARY + at, mask=inside, other=-INFINITY)
    else:
        source = tl.load(setting + SOURCE).to(tl.int64)
        score = tl.load(logits + source * stride + at, mask=inside, other=-INFINITY)
        score = score.to(tl.float32)
    return score


@triton.jit
def distances_of(scores, best, setting):
    """How far scores are below the best, after temperature; infinite if min_p drops them."""
    distance = (best - scores) * tl.load(setting + INVERSE).to(tl.float32)
    return tl.where(distance > tl.load(setting + REACH).to(tl.float32), INFINITY, distance)


@triton.jit
def best_of(tops, row, which, CHUNKS: tl.constexpr, WIDE: tl.constexpr):
    """A row's largest logit (`which` 0) or score (1); +inf if the row holds +inf or NaN."""
    chunk = tl.arange(0, WIDE)
    found = tl.load(tops + (row * 2 + which) * CHUNKS + chunk, mask=chunk < CHUNKS, other=-INFINITY)
    return tl.max(found, 0)


@triton.jit
def is_finite(number):
    """Whether a row's best score is finite, so that a token can be drawn."""
    return (number > -INFINITY) & (number < INFINITY)


@triton.jit
def share_of(total, setting):
    """The least whole weight that reaches top_p of a total."""
    wanted = total.to(tl.float64) * tl.load(setting + SHARE)
    least = wanted.to(tl.int64)
    least += (least.to(tl.float64) < wanted).to(tl.int64)
    return tl.maximum(tl.minimum(least, total), 1)


@triton.jit
def _narrowed(
    edges,
    ends,
    sums,
    totals,
    setting,
    row,
    VOCABULARY: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    STEPS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """The part (low, high] of a pass's interval in which the threshold surely lies."""
    chunk, step = tl.arange(0, WIDE), tl.arange(0, STEPS)
    real = chunk < CHUNKS
    limit = tl.load(setting + LIMIT).to(tl.int64)
    total = tl.sum(tl.load(totals + row * CHUNKS + chunk, mask=real, other=0), 0)
    wanted = limit.to(tl.float32)
    if limit >= VOCABULARY:
        wanted = share_of(total, setting).to(tl.float32) * (1.0 / SCALE)
    places = (row * STEPS + step)[:, None] * CHUNKS + chunk[None, :]
    within = tl.sum(tl.load(sums + places, mask=real[None, :], other=0), 1)
    edge = tl.load(edges + row * STEPS + step)
    low = tl.max(tl.where(within * (1.0 + MARGIN) < wanted, edge, -1.0), 0)
    high = tl.min(tl.where(within * (1.0 - MARGIN) >= wanted, edge, tl.load(ends + row)), 0)
    return low, high


# Parts of a larger tensor lie at any alignment: that must not compile the kernel anew.
@triton.jit(do_not_specialize_on_alignment=["items", "before"])
def scan(
    logits,
    edited,
    counts,
    before,
    items,
    masks,
    settings,
    tops,
    lows,
    firsts,
    stride,
    VOCABULARY: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Edit scores; find the largest, its id, and the smallest; programs: (row, chunk).

    `masks` have a bit for each id that is allowed, in words of 32, lowest first. `items` are pairs
    of an id and what is added to its score, by id in each row. `counts` of a
    lane are twice the times that an id was generated, plus 1 if it is in the prompt; the newest
    token, if it is not counted yet, is counted here.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    setting = settings + row * FIELDS
    begin = chunk * CHUNK
    at = begin + tl.arange(0, CHUNK)
    inside = at < VOCABULARY
    source = tl.load(setting + SOURCE).to(tl.int64)
    score = tl.load(logits + source * stride + at, mask=inside, other=-INFINITY).to(tl.float32)
    safe = tl.where(score == score, score, INFINITY)
    tl.store(tops + row * 2 * CHUNKS + chunk, tl.max(safe, 0))

    place = tl.load(setting + PLACE).to(tl.int64)
    if place >= 0:
        mask = tl.load(setting + MASK).to(tl.int64)
        if mask >= 0:
            words = masks + mask * ((VOCABULARY + 31) // 32)
            word = tl.load(words + (at >> 5), mask=inside, other=0)
            score = tl.where(((word >> (at & 31)) & 1) != 0, score, -INFINITY)
        first = tl.load(setting + FIRST_ITEM).to(tl.int64)
        stop = tl.load(setting + STOP_ITEM).to(tl.int64)
        low, high = first, first
        for start in range(first, stop, ITEMS):
            item = start + tl.arange(0, ITEMS)
            ids = tl.load(items + 2 * item, mask=item < stop, other=LARGEST)
            low += tl.sum((ids < begin).to(tl.int64), 0)
            high += tl.sum((ids < begin + CHUNK).to(tl.int64), 0)
        for item in range(low, high):
            token = tl.load(items + 2 * item).to(tl.int32)
            score += tl.where(at == token, tl.load(items + 2 * item + 1).to(tl.float32), 0.0)

        lane = tl.load(setting + LANE).to(tl.int64)
        if lane >= 0:
            own = counts + lane * VOCABULARY + at
            count = tl.load(own, mask=inside, other=0)
            newest = tl.load(setting + NEWEST).to(tl.int64)
            newest_at = tl.load(setting + NEWEST_AT).to(tl.int64)
            if newest_at >= 0:
                newest = tl.load(before + newest_at)
            made = at == newest
            count += tl.where(made, 2, 0)
            tl.debug_barrier()  # all have read before one writes
            tl.store(own, count, mask=inside & made)
            penalty = tl.load(setting + REPETITION).to(tl.float32)
            shrunk = tl.where(score > 0, tl.div_rn(score, penalty), score * penalty)
            # A tiny penalty's quotient stays finite; scores that were not finite stay as they are.
            shrunk = tl.where((shrunk > LARGEST) & (score < INFINITY), LARGEST, shrunk)
            score = tl.where(count > 0, shrunk, score)
            times = (count >> 1).to(tl.float32)
            less = tl.load(setting + PRESENCE).to(tl.float32)
            less += tl.load(setting + FREQUENCY).to(tl.float32) * times
            score = tl.where(times > 0, score - less, score)
        tl.store(edited + place * VOCABULARY + at, score, mask=inside)
        safe = tl.where(score == score, score, INFINITY)

    top = tl.max(safe, 0)
    tl.store(tops + (row * 2 + 1) * CHUNKS + chunk, top)
    tl.store(firsts + row * CHUNKS + chunk, tl.min(tl.where(safe == top, at, VOCABULARY), 0))
    tl.store(lows + row * CHUNKS + chunk, tl.min(tl.where(safe > -INFINITY, safe, INFINITY), 0))


@triton.jit(do_not_specialize=["rows"])
def narrow(
    logits,
    edited,
    settings,
    tops,
    lows,
    totals,
    edges,
    ends,
    sums,
    stride,
    rows,
    VOCABULARY: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    STEPS: tl.constexpr,
    SCALE: tl.constexpr,
    PASS: tl.constexpr,
):
    """Divide the interval of a threshold into STEPS parts; programs: (row, chunk).

    `sums` [passes, rows, STEPS, chunks] are the count (for top_k) or the weight (for top_p) of the
    distances that are not beyond each edge.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    setting = settings + row * FIELDS
    by_count = tl.load(setting + LIMIT).to(tl.int64) < VOCABULARY
    best = best_of(tops, row, 1, CHUNKS, WIDE)
    drawn = is_finite(best) & (tl.load(setting + INVERSE).to(tl.float32) > 0)
    if drawn & (by_count | (tl.load(setting + SHARE) < 1)):
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        score = scores_of(logits, edited, setting, at, stride, VOCABULARY)
        distance = distances_of(score, best, setting)
        weight = tl.exp(-distance)
        other = tl.arange(0, WIDE)
        lowest = tl.load(lows + row * CHUNKS + other, mask=other < CHUNKS, other=INFINITY)
        span = (best - tl.min(lowest, 0)) * tl.load(setting + INVERSE).to(tl.float32)
        if PASS == 0:
            whole = tl.sum((weight * SCALE).to(tl.int64), 0)
            tl.store(totals + row * CHUNKS + chunk, whole)
            low, high = tl.cast(-1.0, tl.float32), tl.cast(INFINITY, tl.float32)
            top = tl.minimum(span, SPAN)
        else:
            last = (PASS - 1) * rows
            low, high = _narrowed(
                edges + last * STEPS,
                ends + last,
                sums + last * STEPS * CHUNKS,
                totals,
                setting,
                row,
                VOCABULARY,
                CHUNKS,
                WIDE,
                STEPS,
                SCALE,
            )
            top = tl.minimum(span, high)
        base = tl.maximum(low, 0.0)
        own = PASS * rows + row
        tl.store(ends + own, high)
        measure = tl.where(by_count, 1.0, weight)
        for step in tl.static_range(STEPS):
            edge = low
            if step > 0:
                edge = base + (top - base) * (step / STEPS)
            tl.store(edges + own * STEPS + step, edge)
            within = tl.sum(tl.where(distance <= edge, measure, 0.0), 0)
            tl.store(sums + (own * STEPS + step) * CHUNKS + chunk, within)


@triton.jit(do_not_specialize_on_alignment=["ends"])
def gather(
    logits,
    edited,
    settings,
    tops,
    totals,
    edges,
    ends,
    sums,
    masses,
    numbers,
    left,
    lengths,
    bounds,
    stride,
    VOCABULARY: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    STEPS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Sum up what is surely kept, and list the distances that may be; programs: (row, chunk).

    `bounds` [rows, 2] are the interval (low, high] of the threshold. `left` [rows, chunks, CHUNK]
    holds the distances in it, and `lengths` [rows, chunks] says how many.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    setting = settings + row * FIELDS
    best = best_of(tops, row, 1, CHUNKS, WIDE)
    if is_finite(best) & (tl.load(setting + INVERSE).to(tl.float32) > 0):
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        score = scores_of(logits, edited, setting, at, stride, VOCABULARY)
        distance = distances_of(score, best, setting)
        by_count = tl.load(setting + LIMIT).to(tl.int64) < VOCABULARY
        by_weight = tl.load(setting + SHARE) < 1
        low, high = tl.cast(INFINITY, tl.float32), tl.cast(INFINITY, tl.float32)
        length = tl.cast(0, tl.int32)
        if by_count | by_weight:
            low, high = _narrowed(
                edges, ends, sums, totals, setting, row, VOCABULARY, CHUNKS, WIDE, STEPS, SCALE
            )
            # The interval is that of top_k; top_p may end the list anywhere before it.
            low = tl.where(by_count & by_weight, -1.0, low)
            # Infinite distances weigh nothing and are never drawn: they need not be listed.
            open = (distance > low) & (distance <= high) & (distance < INFINITY)
            open = open.to(tl.int32)
            length = tl.sum(open, 0)
            place = (row * CHUNKS + chunk) * CHUNK + tl.cumsum(open, 0) - 1
            tl.store(left + place, distance, mask=open > 0)
        kept = (distance <= low) & (at < VOCABULARY)
        own = row * CHUNKS + chunk
        weight = (tl.exp(-distance) * SCALE).to(tl.int64)
        tl.store(masses + own, tl.sum(tl.where(kept, weight, 0), 0))
        tl.store(numbers + own, tl.sum(kept.to(tl.int32), 0))
        tl.store(lengths + own, length)
        tl.store(bounds + 2 * row, low)
        tl.store(bounds + 2 * row + 1, high)
