"""Triton kernels of the small operators between matrix products; `operators` launches them."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def norm(
    rows,
    more,
    weight,
    total,
    out,
    epsilon,
    ADD: tl.constexpr,
    ONCE: tl.constexpr,
    FROM_ONE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """RMSNorm of rows; with `ADD`, of `rows` + `more`, stored in `total`; programs: (row,).

    With `ONCE` nothing is rounded before the weight is applied. With `FROM_ONE` neither, and the
    weight is how far a factor is from one.
    """
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
    normal = row * scale
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if FROM_ONE:
        factor += 1.0
    elif not ONCE:
        normal = normal.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + place, (normal * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul(both, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """silu(gate) * up of rows [gate | up]; programs: (row, piece of it)."""
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
    query_head_stride,
    key_stride,
    key_head_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotate heads in place; programs: (token, head), key heads after query heads.

    Tokens and heads lie as far apart as the strides say.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < HALF
    if head < HEADS:
        own = query + token * query_stride + head * query_head_stride
    else:
        own = key + token * key_stride + (head - HEADS) * key_head_stride
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
