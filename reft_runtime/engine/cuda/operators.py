"""The small operators between matrix products as Triton kernels; sums are float32."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from reft_runtime.engine.cuda import kernels
from reft_runtime.engine.cuda.tables import PLACE

NUMBERS_AT_ONCE = 32768
"""Of a matrix, in the registers of a program."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonOperators:
    """`Operators` on a CUDA device."""

    def supports(self, *tensors: Tensor) -> bool:
        """See `Operators.supports`."""
        dtype = tensors[0].dtype
        return dtype in _DTYPES and all(t.dtype == dtype and t.is_contiguous() for t in tensors)

    def packs(self, *heads: Tensor) -> bool:
        """See `Operators.packs`."""
        dtype = heads[0].dtype
        return dtype in _DTYPES and all(
            t.dtype == dtype and t.stride()[1:] == (t.shape[2], 1) for t in heads
        )

    def rms_norm(self, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """See `Operators.rms_norm`."""
        out = torch.empty_like(rows)
        width = weight.shape[0]
        kernels.norm[(rows.numel() // width,)](
            rows, rows, weight, rows, out, epsilon, ADD=False, **_row(width)
        )
        return out

    def add_rms_norm(
        self, rows: Tensor, more: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """See `Operators.add_rms_norm`."""
        total, out = torch.empty_like(rows), torch.empty_like(rows)
        width = weight.shape[0]
        kernels.norm[(rows.numel() // width,)](
            rows, more, weight, total, out, epsilon, ADD=True, **_row(width)
        )
        return total, out

    def silu_mul(self, both: Tensor) -> Tensor:
        """See `Operators.silu_mul`."""
        width = both.shape[-1] // 2
        out = both.new_empty(*both.shape[:-1], width)
        block = 1024
        kernels.silu_mul[(both.numel() // (2 * width), triton.cdiv(width, block))](
            both, out, WIDTH=width, BLOCK=block
        )
        return out

    def rotate_(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
        """See `Operators.rotate_`."""
        tokens, heads, width = query.shape
        kv_heads = key.shape[1]
        kernels.rotate[(tokens, heads + kv_heads)](
            query,
            key,
            cos,
            sin,
            query.stride(0),
            key.stride(0),
            HEADS=heads,
            HALF=width // 2,
            BLOCK=triton.next_power_of_2(width // 2),
        )


def edit_rows(
    rows: Tensor, index: Tensor, places: Tensor, slots: Tensor, strengths: Tensor
) -> None:
    """See `tables.EditRows`."""
    sizes = _row(rows.shape[1])
    ranks = max(1, min(8, NUMBERS_AT_ONCE // sizes["BLOCK"]))
    kernels.edit_rows[(len(index),)](
        rows, index, places, slots, strengths, PLACE=PLACE, RANKS=ranks, **sizes
    )


def _row(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": max(1, min(16, block // 256))}
