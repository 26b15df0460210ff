"""Triton kernels: what runs on the device; `attention` and `operators` beside this launch them.

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
    KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the keys `at`; without a mask where every query sees all of them."""
    key_at, value_at = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    inside = at < high
    if MASKED:
        page = tl.load(pages + at // PAGE, mask=inside, other=0)
    else:
        page = tl.load(pages + at // PAGE)
    place = ((page * PAGE + at % PAGE) * KV_HEADS + head).to(tl.int64)
    key_places = keys + place[:, None] * KEY_DIM + key_at[None, :]
    value_places = values + place[:, None] * VALUE_DIM + value_at[None, :]
    if MASKED:
        key = tl.load(key_places, mask=inside[:, None] & (key_at < KEY_DIM)[None, :], other=0.0)
    elif KEY_DIM == KEY_WIDTH:
        key = tl.load(key_places)
    else:
        key = tl.load(key_places, mask=(key_at < KEY_DIM)[None, :], other=0.0)
    scores = tl.dot(own, tl.trans(key), input_precision="ieee") * scale
    if MASKED:
        seen = inside[None, :] & (at[None, :] <= at_last[:, None])
        if WINDOW:
            seen &= at[None, :] > at_last[:, None] - WINDOW
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


# Small tensors that are parts of one lie at any alignment: no reason to compile anew.
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
    scale,
    query_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    DECODES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs: (head of keys, block of queries, split). A block is (row, its first query).

    `scale` is that of the scores times log2(e): weights are powers of two. Of a prompt's blocks
    the last ones see the most keys, so they begin first.
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
    share = tl.cdiv(tl.cdiv(high - low, SPLITS), KEYS) * KEYS
    low += split * share
    high = tl.minimum(high, low + share)
    whole = low  # up to here every query sees every key
    if not WINDOW:
        whole += tl.maximum(0, tl.minimum(earliest + 1, high) - low) // KEYS * KEYS

    best = tl.full([TOKENS * LANES], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS * LANES], tl.float32)
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
            KV_HEADS,
            KEY_DIM,
            VALUE_DIM,
            KEY_WIDTH,
            VALUE_WIDTH,
            PAGE,
            WINDOW,
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
            KV_HEADS,
            KEY_DIM,
            VALUE_DIM,
            KEY_WIDTH,
            VALUE_WIDTH,
            PAGE,
            WINDOW,
            MASKED=True,
        )

    written = real[:, None] & (value_at < VALUE_DIM)[None, :]
    place = packed * (KV_HEADS * GROUP) + query_head
    if SPLITS == 1:
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]  # of lanes not real
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
    """Programs: (token, query head). Adds the splits' parts, each scaled by its own best score."""
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
def norm(
    rows,
    more,
    weight,
    total,
    out,
    epsilon,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program a row."""
    if EARLY:
        gdc_wait()
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + at
    row = tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        row += tl.load(more + place, mask=inside, other=0.0).to(tl.float32)
        rounded = row.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        row = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, 0) / WIDTH + epsilon)
    normal = (row * scale).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (normal * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul(both, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Programs: (row, piece of it)."""
    if EARLY:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    gate = tl.load(both + row * 2 * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * WIDTH + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + at, (active * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    query,
    key,
    cos,
    sin,
    query_stride,
    key_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs: (token, head), the heads of keys after those of queries."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < HALF
    if head < HEADS:
        own = query + token * query_stride + head * (2 * HALF)
    else:
        own = key + token * key_stride + (head - HEADS) * (2 * HALF)
    angles = token * (2 * HALF) + at
    low = tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(own + HALF + at, mask=inside, other=0.0).to(tl.float32)
    cos_low = tl.load(cos + angles, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + angles + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + angles, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + angles + HALF, mask=inside, other=0.0).to(tl.float32)
    kind = query.dtype.element_ty
    tl.store(own + at, (low * cos_low - high * sin_low).to(kind), mask=inside)
    tl.store(own + HALF + at, (high * cos_high + low * sin_high).to(kind), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["index", "slots", "strengths"])
def edit_rows(
    rows,
    index,
    places,
    slots,
    strengths,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACE: tl.constexpr,
    RANKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program a row: h + strength * (c + U^T (V h + b)), `RANKS` rank rows at a time.

    `places` [slots, PLACE] says where V, U, b and c of a slot are, and what its rank is.
    """
    if EARLY:
        gdc_wait()
    number = tl.program_id(0).to(tl.int64)
    place = places + tl.load(slots + number) * PLACE
    offset, rank = tl.load(place + 3), tl.load(place + 4).to(tl.int32)
    if (rank > 0) | (offset > 0):
        at = tl.arange(0, BLOCK)
        inside = at < WIDTH
        own = rows + tl.load(index + number) * WIDTH + at
        old = tl.load(own, mask=inside, other=0.0).to(tl.float32)
        change = tl.zeros([BLOCK], tl.float32)
        V = tl.multiple_of(tl.load(place), 16).to(tl.pointer_type(tl.float32))
        U = tl.multiple_of(tl.load(place + 1), 16).to(tl.pointer_type(tl.float32))
        b = tl.load(place + 2).to(tl.pointer_type(tl.float32))
        for first in range(0, rank, RANKS):
            i = first + tl.arange(0, RANKS)
            there = (i < rank)[:, None] & inside[None, :]
            down = tl.load(V + i[:, None] * WIDTH + at[None, :], mask=there, other=0.0)
            up = tl.load(U + i[:, None] * WIDTH + at[None, :], mask=there, other=0.0)
            low = tl.sum(down * old[None, :], 1) + tl.load(b + i, mask=i < rank, other=0.0)
            change += tl.sum(up * low[:, None], 0)
        if offset > 0:
            c = tl.multiple_of(offset, 16).to(tl.pointer_type(tl.float32))
            change += tl.load(c + at, mask=inside, other=0.0)
        new = old + tl.load(strengths + number) * change
        tl.store(own, new.to(rows.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["index", "pieces", "slots", "strengths"])
def edit_pieces(
    rows,
    index,
    pieces,
    places,
    slots,
    strengths,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program a piece: as `edit_rows`, for up to `ROWS` rows of one slot of at most `RANKS`.

    `pieces` [n, 2] are the first of a piece's rows in `index`, and their number.
    """
    if EARLY:
        gdc_wait()
    piece = pieces + 2 * tl.program_id(0)
    first, count = tl.load(piece), tl.load(piece + 1)
    place = places + tl.load(slots + first) * PLACE
    offset, rank = tl.load(place + 3), tl.load(place + 4).to(tl.int32)
    if (rank > 0) | (offset > 0):
        number, i = tl.arange(0, ROWS), tl.arange(0, RANKS)
        real = number < count
        own = rows + tl.load(index + first + number, mask=real, other=0)[:, None] * WIDTH
        strength = tl.load(strengths + first)
        V = tl.multiple_of(tl.load(place), 16).to(tl.pointer_type(tl.float32))
        U = tl.multiple_of(tl.load(place + 1), 16).to(tl.pointer_type(tl.float32))
        b = tl.load(place + 2).to(tl.pointer_type(tl.float32))
        low = tl.zeros([ROWS, RANKS], tl.float32)
        for start in range(0, WIDTH, STEP):
            at = start + tl.arange(0, STEP)[None, :]
            old = tl.load(own + at, mask=real[:, None] & (at < WIDTH), other=0.0).to(tl.float32)
            down = tl.load(
                V + i[:, None] * WIDTH + at, mask=(i < rank)[:, None] & (at < WIDTH), other=0.0
            )
            low = tl.dot(old, tl.trans(down), low, input_precision="ieee")
        low += tl.load(b + i, mask=i < rank, other=0.0)[None, :]
        for start in range(0, WIDTH, STEP):
            at = start + tl.arange(0, STEP)[None, :]
            old = tl.load(own + at, mask=real[:, None] & (at < WIDTH), other=0.0).to(tl.float32)
            up = tl.load(
                U + i[:, None] * WIDTH + at, mask=(i < rank)[:, None] & (at < WIDTH), other=0.0
            )
            change = tl.dot(low, up, input_precision="ieee")
            if offset > 0:
                c = tl.multiple_of(offset, 16).to(tl.pointer_type(tl.float32))
                change += tl.load(c + at, mask=at < WIDTH, other=0.0)
            new = (old + strength * change).to(rows.dtype.element_ty)
            tl.store(own + at, new, mask=real[:, None] & (at < WIDTH))


@triton.jit
def store(
    query,
    key,
    value,
    cos,
    sin,
    keys,
    values,
    slots,
    query_stride,
    key_stride,
    value_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROTATE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs: (token, head of keys). Puts a key and a value in their place in the pages.

    With `ROTATE` rotates the key before, and in place the queries that share it.
    """
    if EARLY:
        gdc_wait()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token) * KV_HEADS + head
    own = key + token * key_stride + head * KEY_DIM
    place = keys + slot * KEY_DIM
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
    tl.store(values + slot * VALUE_DIM + at, row.to(values.dtype.element_ty), mask=at < VALUE_DIM)
