"""Matrix products on a device, with the operators around them in a layer.

With few rows a product is as fast as its weights can be read: there Triton's kernels reach more of
the memory's bandwidth than cuBLAS does, and one kernel does the sum over the parts of a split
depth, the residual and the norm. cuBLAS does all other products, and adds the residual in the
product itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from reft_runtime.kernels.cuda import layer_kernels as kernels
from reft_runtime.kernels.cuda import product_kernels
from reft_runtime.kernels.norms import NormForm

FEW_ROWS = 32
"""Most rows with which Triton's kernels are faster than cuBLAS on an H100."""

LEAST = 16
"""Least rows and columns of a matrix product (`tl.dot`)."""

PROGRAMS = 100
"""Least number of programs, so that an H100's 132 processors have work; more only cost sums."""


class Tile(NamedTuple):
    """Columns and depth of a program's steps, and in how many parts the depth is split."""

    columns: int
    depth: int
    splits: int


def tile_for(width: int, depth: int, *, gated: bool) -> Tile | None:
    """The tile of a product with a weight [width, depth], or [2 width, depth] if it is gated.

    None if the depth is no multiple of what a step takes.
    """
    columns = 32 if gated else 64
    programs = triton.cdiv(width, columns)
    found = None
    for splits in (1,) if gated else (1, 2, 4, 8):
        step = next((s for s in (128, 64) if depth % (splits * s) == 0), None)
        if step is None:
            break
        found = Tile(columns, step, splits)
        if programs * splits >= PROGRAMS:
            break
    return found


@cache
def early() -> dict[str, Any]:
    """Options for kernels to be set up while the kernel before them ends (Hopper and newer)."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


def gated_product(rows: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up [T, d] of rows [T, k] and a weight [2 d, k] with the gate's rows first."""
    width, depth = weight.shape[0] // 2, weight.shape[1]
    tile = _tile(rows, width, depth, gated=True)
    if tile is None:
        return silu_mul(rows @ weight.t())
    out = rows.new_empty(len(rows), width)
    _launch(rows, weight, out, width, tile, gated=True)
    return out


def add_product_(rows: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """rows [T, d] += inputs [T, k] @ weight [d, k]ᵀ; returns the rows."""
    tile = _tile(inputs, *weight.shape, gated=False)
    if tile is None:
        return rows.addmm_(inputs, weight.t())
    _add_parts(rows, inputs, weight, tile, None, 0.0)
    return rows


def add_product_and_norm(
    rows: Tensor, inputs: Tensor, weight: Tensor, norm: Tensor, epsilon: float
) -> Tensor:
    """`add_product_`; returns the RMSNorm of its rows with the weight `norm` [d]."""
    tile = _tile(inputs, *weight.shape, gated=False)
    if tile is None:
        return rms_norm(rows.addmm_(inputs, weight.t()), norm, epsilon)
    return _add_parts(rows, inputs, weight, tile, norm, epsilon)


def rms_norm(
    rows: Tensor,
    weight: Tensor,
    epsilon: float,
    form: NormForm = NormForm.LLAMA,
) -> Tensor:
    """See `Operators.rms_norm`."""
    out = torch.empty_like(rows)
    width = weight.shape[0]
    kernels.norm[(rows.numel() // width,)](
        rows,
        rows,
        weight,
        rows,
        out,
        epsilon,
        ADD=False,
        ONCE=form is NormForm.OLMO2,
        FROM_ONE=form is NormForm.GEMMA,
        **row_block(width),
        **early(),
    )
    return out


def silu_mul(both: Tensor) -> Tensor:
    """See `Operators.silu_mul`."""
    width = both.shape[-1] // 2
    out = both.new_empty(*both.shape[:-1], width)
    block = 1024
    kernels.silu_mul[(both.numel() // (2 * width), triton.cdiv(width, block))](
        both, out, WIDTH=width, BLOCK=block, **early()
    )
    return out


def row_block(width: int) -> dict[str, int]:
    """Sizes of a program that works on a whole row."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": max(1, min(16, block // 256))}


def _tile(rows: Tensor, width: int, depth: int, *, gated: bool) -> Tile | None:
    if len(rows) > FEW_ROWS or rows.itemsize != 2:
        return None
    return tile_for(width, depth, gated=gated)


def _launch(
    inputs: Tensor, weight: Tensor, out: Tensor, width: int, tile: Tile, *, gated: bool
) -> None:
    inputs = inputs.contiguous()
    product_kernels.product[(triton.cdiv(width, tile.columns), tile.splits)](
        inputs,
        weight,
        out,
        len(inputs),
        width,
        weight.shape[1],
        ROWS=max(LEAST, triton.next_power_of_2(len(inputs))),
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        SPLITS=tile.splits,
        GATED=gated,
        num_warps=4,
        num_stages=5,
        **early(),
    )


def _add_parts(
    rows: Tensor, inputs: Tensor, weight: Tensor, tile: Tile, norm: Tensor | None, epsilon: float
) -> Tensor:
    count, width = rows.shape
    parts = torch.empty(tile.splits, count, width, dtype=torch.float32, device=rows.device)
    _launch(inputs, weight, parts, width, tile, gated=False)
    out = rows if norm is None else torch.empty_like(rows)
    product_kernels.add_parts[(count,)](
        rows,
        parts,
        rows if norm is None else norm,
        out,
        epsilon,
        count,
        SPLITS=tile.splits,
        NORM=norm is not None,
        **row_block(width),
        **early(),
    )
    return out
