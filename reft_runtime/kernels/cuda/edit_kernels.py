"""Triton kernels that edit rows of hidden states by the tables of `edits/tables.py`."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit(do_not_specialize_on_alignment=["index", "entries", "strengths"])
def edit_rows(
    rows,
    index,
    places,
    entries,
    strengths,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACE: tl.constexpr,
    RANKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Edit a row to h + strength * (c + U^T (V h + b)); programs: (row,).

    `RANKS` ranks are computed at a time. `places` [entries, PLACE] holds the addresses of V, U, b
    and c of an entry, and its rank.
    """
    if EARLY:
        gdc_wait()
    number = tl.program_id(0).to(tl.int64)
    place = places + tl.load(entries + number) * PLACE
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


@triton.jit(do_not_specialize_on_alignment=["index", "pieces", "entries", "strengths"])
def edit_pieces(
    rows,
    index,
    pieces,
    places,
    entries,
    strengths,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Like `edit_rows` for pieces of up to `ROWS` rows; programs: (piece,).

    The rows of a piece have one strength and one entry, of rank `RANKS` at most. `pieces` [n, 2]
    holds where each piece begins in `index`, and its number of rows.
    """
    if EARLY:
        gdc_wait()
    piece = pieces + 2 * tl.program_id(0)
    first, count = tl.load(piece), tl.load(piece + 1)
    place = places + tl.load(entries + first) * PLACE
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
