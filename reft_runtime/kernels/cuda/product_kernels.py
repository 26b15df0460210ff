"""Triton kernels of matrix products with few rows, which only read weights as fast as they can."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def product(
    inputs,
    weight,
    out,
    rows,
    width,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Multiply `inputs` [rows, depth] with a `weight` [width, depth], in parts of the depth.

    Programs: (columns of the result, part of the depth). `out` is float32 [SPLITS, rows, width],
    the parts of the sum. With `GATED` the weight is [2 width, depth], that of a gate above that of
    as many other columns, and `out` [rows, width] is silu(gate) * other, each rounded as if it were
    computed alone.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row, at = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    part = depth // SPLITS
    first = tl.program_id(1) * part
    own = weight + column.to(tl.int64)[:, None] * depth + first + at[None, :]
    given = inputs + row[None, :] * depth + first + at[:, None]
    real = (row < rows)[None, :]
    inside = (column < width)[:, None]
    result = tl.zeros([COLUMNS, ROWS], tl.float32)
    other = tl.zeros([COLUMNS, ROWS], tl.float32)
    below = width.to(tl.int64) * depth
    if EARLY:
        gdc_wait()
    for _ in range(0, part, DEPTH):
        some = tl.load(given, mask=real, other=0.0)
        result = tl.dot(tl.load(own, mask=inside, other=0.0), some, result, input_precision="ieee")
        if GATED:
            more = tl.load(own + below, mask=inside, other=0.0)
            other = tl.dot(more, some, other, input_precision="ieee")
        own += DEPTH
        given += DEPTH
    place = row[None, :] * width + column[:, None]
    if GATED:
        kind = out.dtype.element_ty
        gate = result.to(kind).to(tl.float32)
        active = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
        result = active * other.to(kind).to(tl.float32)
    else:
        place += tl.program_id(1) * rows * width
    tl.store(out + place, result.to(out.dtype.element_ty), mask=real & inside)


@triton.jit
def add_parts(
    rows,
    parts,
    weight,
    out,
    epsilon,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Add `parts` [SPLITS, count, WIDTH] to `rows`; with `NORM` also write their RMSNorm to `out`.

    Programs: (row,).
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    if EARLY:
        gdc_wait()
    own = rows + row * WIDTH + at
    total = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(SPLITS):
        part = parts + (split * count + row) * WIDTH + at
        total += tl.load(part, mask=inside, other=0.0)
    rounded = total.to(rows.dtype.element_ty)
    tl.store(own, rounded, mask=inside)
    if NORM:
        total = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(total * total, 0) / WIDTH + epsilon)
        normal = (total * scale).to(out.dtype.element_ty).to(tl.float32)
        factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * WIDTH + at, (normal * factor).to(out.dtype.element_ty), mask=inside)
