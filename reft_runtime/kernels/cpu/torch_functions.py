"""torch's own functions for compiled code, as pointers: tensors and packed products.

They are those of the code that torch's compiler (Inductor) makes ahead of time: a C interface that
`libtorch_cpu` exports (`torch/csrc/inductor/aoti_torch/c`).
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import c_int32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EXACT_ROWS = 64
"""Products of up to this many rows have code for exactly so many."""

GRAIN = 32
"""Larger ones are of a multiple of this."""

LEAST_BLOCK = 128
"""One thread's products of fewer rows take longer by the row."""

LARGEST_BLOCK = 384
"""One thread's products of more rows gain nothing, and their results leave the core's cache."""


def padded_rows(rows: int) -> int:
    """How many rows a product is computed of.

    oneDNN compiles code for each number of rows that it meets, some milliseconds for each layer's
    products, and prompts have any length.
    """
    return rows if rows <= EXACT_ROWS else -(-rows // GRAIN) * GRAIN


def row_blocks(rows: int, threads: int) -> int:
    """In how many blocks a step's rows are computed, each by one thread; 1: by all threads at once.

    torch computes some products of many rows by one thread, however many it may take. Blocks have
    `LEAST_BLOCK` rows at least, and `LARGEST_BLOCK` at most.
    """
    if rows < threads * LEAST_BLOCK:
        return 1
    return threads * -(-rows // (threads * LARGEST_BLOCK))


class TorchFunctions(ctypes.Structure):
    """`TorchFunctions` of decoder_layer.h, for one dtype."""

    _fields_ = (
        ("from_blob", c_void_p),
        ("data_of", c_void_p),
        ("drop", c_void_p),
        ("linear", c_void_p),
        ("dtype", c_int32),
        ("cpu", c_int32),
    )


@cache
def _library() -> ctypes.CDLL | None:
    """The library that torch's CPU operators are in; None if it is not where it was."""
    for suffix in (".so", ".dylib"):
        path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu{suffix}"
        if path.exists():
            return ctypes.CDLL(str(path))
    return None


@cache
def torch_functions(dtype: str) -> TorchFunctions | None:
    """The functions for tensors of a dtype, by its name; None if this torch lacks one of them."""
    library = _library()
    if library is None or not hasattr(_aoti(), "unsafe_alloc_void_ptr_from_tensor"):
        return None
    try:
        pointers = [
            ctypes.cast(getattr(library, f"aoti_torch_{name}"), c_void_p)
            for name in (
                "create_tensor_from_blob",
                "get_data_ptr",
                "delete_tensor_object",
                "cpu__linear_pointwise",
            )
        ]
        kind = getattr(library, f"aoti_torch_dtype_{dtype}")()
        device = library.aoti_torch_device_type_cpu()
    except AttributeError:
        return None
    return TorchFunctions(*pointers, kind, device)


class Handles:
    """Tensors as the functions know them, for as long as this object lives."""

    def __init__(self) -> None:
        self._held: list[int] = []
        self._free = weakref.finalize(self, _free, self._held)

    def of(self, tensor: Tensor) -> int:
        """A handle of a tensor, which lives as long."""
        capsule = _aoti().unsafe_alloc_void_ptr_from_tensor(tensor)
        address = ctypes.pythonapi.PyCapsule_GetPointer
        address.restype, address.argtypes = c_void_p, [ctypes.py_object, ctypes.c_char_p]
        handle: int = address(capsule, None)
        self._held.append(handle)
        return handle


def _free(handles: list[int]) -> None:
    library = _library()
    assert library is not None
    for handle in handles:
        library.aoti_torch_delete_tensor_object(c_void_p(handle))


def _aoti() -> Any:
    return getattr(torch._C, "_aoti", None)
