"""Products with weights as they are; see `product.h`."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from reft_runtime.kernels.cpu.compiled import CompiledOperators

_P, _I = c_void_p, c_int64


class ProductKernels(CompiledOperators):
    """Multiplies, where the CPU has matrix tiles."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._has_tiles = bool(library.can_multiply())
        self._bind({"multiply": [_P, _I, _P, _P, _P, _I, _I, c_int]})

    def multiplies(self, weight: Tensor) -> bool:
        """Whether `multiply` takes a weight [out, in]."""
        return (
            self._has_tiles
            and weight.dtype in self._dtypes
            and weight.is_cpu
            and weight.layout == torch.strided
            and weight.is_contiguous()
            and weight.numel() > 0
        )

    def multiply(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Rows [..., in] times the weight transposed, plus the bias [out] if there is one.

        As exact as the dtype is. Raises ValueError if shapes or dtypes disagree, and MemoryError.
        """
        outs, width = weight.shape
        if rows.shape[-1] != width or rows.dtype != weight.dtype:
            raise ValueError(f"multiply: rows {tuple(rows.shape)} for {tuple(weight.shape)}")
        if bias is not None and (bias.shape != (outs,) or bias.dtype != weight.dtype):
            raise ValueError(f"multiply: a bias {tuple(bias.shape)} for {tuple(weight.shape)}")
        rows, bias = rows.contiguous(), None if bias is None else bias.contiguous()
        out = rows.new_empty(*rows.shape[:-1], outs)
        count = out.numel() // outs
        if count and self._functions["multiply", weight.dtype](
            rows.data_ptr(),
            count,
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            width,
            outs,
            torch.get_num_threads(),
        ):
            raise MemoryError("multiply: out of memory")
        return out
