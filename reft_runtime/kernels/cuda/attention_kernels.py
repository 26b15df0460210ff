"""Triton kernels that attend over pages, and that store keys and values in them.

Sizes that are known at launch are `tl.constexpr`: each set of them is compiled once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def _attend_to(
    own,
    best,
    total,
    result,
    keys,
    values,
    pages,
    at,
    high,
    at_last,
    head,
    scale,
    cap,
    KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the keys `at`; without a mask if every query sees all of them."""
    key_at, value_at = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    inside = at < high
    if MASKED:
        page = tl.load(pages + at // PAGE, mask=inside, other=0)
    else:
        page = tl.load(pages + at // PAGE)
    place = ((page * PAGE + at % PAGE) * KV_HEADS + head).to(tl.int64)
    key_places = keys + place[:, None] * KEY_DIM + key_at[None, :]
    value_places = values + place[:, None] * VALUE_ROW + value_at[None, :]
    if MASKED:
        key = tl.load(key_places, mask=inside[:, None] & (key_at < KEY_DIM)[None, :], other=0.0)
    elif KEY_DIM == KEY_WIDTH:
        key = tl.load(key_places)
    else:
        key = tl.load(key_places, mask=(key_at < KEY_DIM)[None, :], other=0.0)
    scores = tl.dot(own, tl.trans(key), input_precision="ieee") * scale
    if CAPPED:
        scores = cap * (1.0 - 2.0 / (tl.exp(2.0 * scores) + 1.0))  # cap * tanh(scores)
    if MASKED:
        seen = inside[None, :] & (at[None, :] <= at_last[:, None])
        if WINDOW:
            seen &= at[None, :] > at_last[:, None] - WINDOW
        if CHUNK:
            seen &= at[None, :] >= at_last[:, None] // CHUNK * CHUNK
        scores = tl.where(seen, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    finite = new_best
    if MASKED:
        finite = tl.where(new_best == float("-inf"), 0.0, new_best)  # where nothing is seen yet
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(best - finite)
    total = total * shrink + tl.sum(weights, 1)
    if MASKED:
        value = tl.load(
            value_places, mask=inside[:, None] & (value_at < VALUE_DIM)[None, :], other=0.0
        )
    elif VALUE_DIM == VALUE_WIDTH:
        value = tl.load(value_places)
    else:
        value = tl.load(value_places, mask=(value_at < VALUE_DIM)[None, :], other=0.0)
    result = result * shrink[:, None]
    result += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return new_best, total, result


# Small tensors that are parts of one lie at any alignment: that must not compile the kernel anew.
@triton.jit(do_not_specialize_on_alignment=["blocks", "firsts", "stops", "lanes"])
def attend(
    query,
    keys,
    values,
    out,
    parts,
    sums,
    blocks,
    firsts,
    stops,
    lanes,
    tables,
    sinks,
    scale,
    cap,
    query_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    DECODES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attend with queries; programs: (key head, block of queries, split).

    A block is (row, its first query). `scale` is the scores' scale times log2(e), because weights
    are powers of two; with `CAPPED` that factor is in `cap` instead, and `scale` is divided by the
    cap. Rows of values lie `VALUE_ROW` apart. The last blocks of a prompt see the most keys, so
    they begin first.
    """
    if EARLY:
        gdc_wait()
    head, split = tl.program_id(0), tl.program_id(2)
    if DECODES:
        row, begin = tl.program_id(1).to(tl.int64), 0
    else:
        block = tl.num_programs(1) - 1 - tl.program_id(1)
        row, begin = tl.load(blocks + 2 * block), tl.load(blocks + 2 * block + 1)
    first = tl.load(firsts + row)
    length = tl.load(firsts + row + 1) - first
    stop = tl.load(stops + row)
    pages = tables + tl.load(lanes + row) * table_stride

    lane = tl.arange(0, TOKENS * LANES)
    token, member = begin + lane // LANES, lane % LANES
    real = (token < length) & (member < GROUP)
    packed = first + token
    query_head = head * GROUP + member
    key_at, value_at = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    own = tl.load(
        query + packed[:, None] * query_stride + query_head[:, None] * KEY_DIM + key_at[None, :],
        mask=real[:, None] & (key_at < KEY_DIM)[None, :],
        other=0.0,
    )

    at_last = stop - length + token  # offsets of the queries
    earliest = stop - length + begin
    high = tl.minimum(stop, earliest + TOKENS)
    low = stop * 0
    if WINDOW:
        low = tl.maximum(low, earliest - WINDOW + 1) // KEYS * KEYS
    if CHUNK:
        low = tl.maximum(low, earliest // CHUNK * CHUNK // KEYS * KEYS)
    share = tl.cdiv(tl.cdiv(high - low, SPLITS), KEYS) * KEYS
    low += split * share
    high = tl.minimum(high, low + share)
    whole = low  # up to here every query sees every key
    if not WINDOW and not CHUNK:
        whole += tl.maximum(0, tl.minimum(earliest + 1, high) - low) // KEYS * KEYS

    best = tl.full([TOKENS * LANES], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS * LANES], tl.float32)
    if SINKS:
        # A sink is a key that is seen before all others; of several splits the first sees it.
        sink = tl.load(sinks + query_head, mask=member < GROUP, other=0.0).to(tl.float32)
        best = tl.where(split == 0, sink * 1.4426950408889634, best)
        total = tl.where(split == 0, 1.0, total)
    result = tl.zeros([TOKENS * LANES, VALUE_WIDTH], tl.float32)
    for start in range(low, whole, KEYS):
        best, total, result = _attend_to(
            own,
            best,
            total,
            result,
            keys,
            values,
            pages,
            start + tl.arange(0, KEYS),
            high,
            at_last,
            head,
            scale,
            cap,
            KV_HEADS,
            KEY_DIM,
            VALUE_DIM,
            VALUE_ROW,
            KEY_WIDTH,
            VALUE_WIDTH,
            PAGE,
            WINDOW,
            CHUNK,
            CAPPED,
            MASKED=False,
        )
    for start in range(whole, high, KEYS):
        best, total, result = _attend_to(
            own,
            best,
            total,
            result,
            keys,
            values,
            pages,
            start + tl.arange(0, KEYS),
            high,
            at_last,
            head,
            scale,
            cap,
            KV_HEADS,
            KEY_DIM,
            VALUE_DIM,
            VALUE_ROW,
            KEY_WIDTH,
            VALUE_WIDTH,
            PAGE,
            WINDOW,
            CHUNK,
            CAPPED,
            MASKED=True,
        )

    written = real[:, None] & (value_at < VALUE_DIM)[None, :]
    place = packed * (KV_HEADS * GROUP) + query_head
    if SPLITS == 1:
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]  # 0: not a real lane
        tl.store(
            out + place[:, None] * VALUE_DIM + value_at[None, :],
            result.to(out.dtype.element_ty),
            mask=written,
        )
    else:
        place = place * SPLITS + split
        tl.store(parts + place[:, None] * VALUE_DIM + value_at[None, :], result, mask=written)
        tl.store(sums + 2 * place, best, mask=real)
        tl.store(sums + 2 * place + 1, total, mask=real)


@triton.jit
def combine(
    parts,
    sums,
    out,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Add the parts of the splits, each scaled by its best score; programs: (token, query head)."""
    if EARLY:
        gdc_wait()
    place = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    split, at = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    own = place * SPLITS + split
    best, total = tl.load(sums + 2 * own), tl.load(sums + 2 * own + 1)
    scale = tl.exp2(best - tl.max(best, 0))
    part = tl.load(parts + own[:, None] * DIM + at[None, :], mask=(at < DIM)[None, :], other=0.0)
    result = tl.sum(part * scale[:, None], 0) / tl.sum(total * scale, 0)
    tl.store(out + place * DIM + at, result.to(out.dtype.element_ty), mask=at < DIM)


@triton.jit
def store(
    query,
    key,
    value,
    cos,
    sin,
    keys,
    values,
    addresses,
    query_stride,
    key_stride,
    value_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROTATE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Store keys and values at their addresses in the pages; programs: (token, key head).

    With `ROTATE` the key is rotated first and, in place, the queries that share it.
    """
    if EARLY:
        gdc_wait()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    address = tl.load(addresses + token) * KV_HEADS + head
    own = key + token * key_stride + head * KEY_DIM
    place = keys + address * KEY_DIM
    if ROTATE:
        half: tl.constexpr = KEY_DIM // 2
        at = tl.arange(0, HALF_WIDTH)
        inside = at < half
        angles = token * KEY_DIM + at
        cos_low = tl.load(cos + angles, mask=inside, other=0.0).to(tl.float32)
        cos_high = tl.load(cos + angles + half, mask=inside, other=0.0).to(tl.float32)
        sin_low = tl.load(sin + angles, mask=inside, other=0.0).to(tl.float32)
        sin_high = tl.load(sin + angles + half, mask=inside, other=0.0).to(tl.float32)
        low = tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(own + half + at, mask=inside, other=0.0).to(tl.float32)
        kind = keys.dtype.element_ty
        tl.store(place + at, (low * cos_low - high * sin_low).to(kind), mask=inside)
        tl.store(place + half + at, (high * cos_high + low * sin_high).to(kind), mask=inside)

        member = tl.arange(0, LANES)
        sharing = query + token * query_stride + (head * GROUP + member[:, None]) * KEY_DIM
        wanted = (member < GROUP)[:, None] & inside[None, :]
        low = tl.load(sharing + at[None, :], mask=wanted, other=0.0).to(tl.float32)
        high = tl.load(sharing + half + at[None, :], mask=wanted, other=0.0).to(tl.float32)
        new_low = low * cos_low[None, :] - high * sin_low[None, :]
        new_high = high * cos_high[None, :] + low * sin_high[None, :]
        kind = query.dtype.element_ty
        tl.store(sharing + at[None, :], new_low.to(kind), mask=wanted)
        tl.store(sharing + half + at[None, :], new_high.to(kind), mask=wanted)
    else:
        at = tl.arange(0, KEY_WIDTH)
        row = tl.load(own + at, mask=at < KEY_DIM, other=0.0)
        tl.store(place + at, row.to(keys.dtype.element_ty), mask=at < KEY_DIM)
    at = tl.arange(0, VALUE_WIDTH)
    row = tl.load(
        value + token * value_stride + head * VALUE_DIM + at, mask=at < VALUE_DIM, other=0.0
    )
    tl.store(
        values + address * VALUE_ROW + at, row.to(values.dtype.element_ty), mask=at < VALUE_DIM
    )
