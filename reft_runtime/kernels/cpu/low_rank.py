"""The CPU's operator for low-rank edits of single rows."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from reft_runtime.kernels.cpu.compiled import CompiledOperators

_ARGUMENTS = {"edit_rows": [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int]}


class RowEdit(NamedTuple):
    """An edit of one row h of width d: h + `strength` * (h Vᵀ + b) U.

    `V` and `U` are [rank, d], `b` is [rank]; all are contiguous float32 tensors on a CPU.
    """

    row: int
    V: Tensor
    b: Tensor
    U: Tensor
    strength: float


class RowEdits:
    """Edits of different rows, told as the library wants them; it keeps their tensors."""

    def __init__(self, edits: Sequence[RowEdit]) -> None:
        self.edits = tuple(edits)
        self.width = edits[0].V.shape[1]
        self.last = max(edit.row for edit in edits)
        for edit in edits:
            rank = len(edit.b)
            if not edit.V.shape == edit.U.shape == (rank, self.width) or edit.row < 0:
                shapes = [tuple(tensor.shape) for tensor in edit[1:4]]
                raise ValueError(f"edit_rows: row {edit.row}, shapes disagree: {shapes}")
            for tensor in edit[1:4]:
                if tensor.dtype != torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
                    raise ValueError("edit_rows: V, b and U are contiguous float32 on a CPU")
        self.ranks = max(len(edit.b) for edit in edits)
        self.told = torch.tensor(
            [[e.row, e.V.data_ptr(), e.b.data_ptr(), e.U.data_ptr(), len(e.b)] for e in edits]
        )
        self.strengths = torch.tensor([edit.strength for edit in edits], dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.edits)

    def fit(self, rows: int, width: int) -> bool:
        """Whether they are edits of some of these rows."""
        return width == self.width and self.last < rows


class LowRankKernels(CompiledOperators):
    """Operators of low-rank edits."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._bind(_ARGUMENTS)
        for name in ("widest_edited", "largest_rank"):
            getattr(library, name).restype = c_int64
        self._widest_edited: int = library.widest_edited()
        self._largest_rank: int = library.largest_rank()

    def edit_rows_(self, hidden: Tensor, edits: RowEdits) -> bool:
        """Edit rows of `hidden` [T, d] in place, in float32, rounded once; no row is edited twice.

        Returns False, and changes nothing, for tensors that it does not take. Raises ValueError if
        shapes disagree.
        """
        rows, width = hidden.shape
        if not edits.fit(rows, width):
            raise ValueError(
                f"edit_rows: row {edits.last}, {edits.width} wide, of {tuple(hidden.shape)}"
            )
        if not self.edits_rows(edits) or not self.supports(hidden):
            return False
        self._functions["edit_rows", hidden.dtype](
            hidden.data_ptr(),
            edits.told.data_ptr(),
            edits.strengths.data_ptr(),
            len(edits),
            width,
            torch.get_num_threads(),
        )
        return True

    def edits_rows(self, edits: RowEdits) -> bool:
        """Whether the operator takes rows so wide, and edits of such ranks."""
        return edits.width <= self._widest_edited and edits.ranks <= self._largest_rank
