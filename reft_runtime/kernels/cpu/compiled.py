"""The functions of the compiled library, by name and dtype."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reft_runtime.machine.dtypes import DTYPES, name_of


class CompiledOperators:
    """What all operators of the library share: their functions, and which tensors they take."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._functions: dict[tuple[str, torch.dtype], Any] = {}
        self._dtypes = {
            dtype for name, dtype in DTYPES.items() if hasattr(library, f"rms_norm_{name}")
        }

    def _bind(self, arguments: Mapping[str, list[Any]]) -> None:
        """Find functions of these names for every dtype, with these types of arguments."""
        for operator, types in arguments.items():
            for dtype in self._dtypes:
                function = getattr(self._library, f"{operator}_{name_of(dtype)}")
                function.argtypes = types
                fails = operator.startswith(("attend", "multiply"))
                function.restype = ctypes.c_int if fails else None
                self._functions[operator, dtype] = function

    def supports(self, *tensors: Tensor) -> bool:
        """See `Operators.supports`; the tensors must be on a CPU."""
        dtype = tensors[0].dtype
        for tensor in tensors:
            if tensor.dtype != dtype or not tensor.is_contiguous():
                return False
            if tensor.requires_grad or not tensor.is_cpu:
                return False
        return dtype in self._dtypes

    def packs(self, *heads: Tensor) -> bool:
        """Whether these are heads [T, heads, dim], those of a token side by side, for an operator.

        Dtype, gradient and device are as for `supports`.
        """
        return self.rotates(*heads) and all(each.stride(1) == each.shape[2] for each in heads)

    def rotates(self, *heads: Tensor) -> bool:
        """See `Operators.rotates`; the tensors must be on a CPU."""
        dtype = heads[0].dtype
        for tensor in heads:
            _, between, within = tensor.stride()
            if within != 1 or between < tensor.shape[2]:
                return False
            if tensor.dtype != dtype or tensor.requires_grad or not tensor.is_cpu:
                return False
        return dtype in self._dtypes
