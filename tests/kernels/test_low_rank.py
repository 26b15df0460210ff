"""The operator for low-rank edits of rows gives what `CanonicalEdit.edited` gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reft_runtime.interventions import CanonicalEdit, Positions
from reft_runtime.kernels.cpu import Kernels
from reft_runtime.kernels.operators import RowEdit, RowEdits


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def edit(rank: int, width: int) -> CanonicalEdit:
    V, b, U = random(rank, width, seed=1), random(rank, seed=2), random(rank, width, seed=3)
    return CanonicalEdit(0, "block_output", Positions(first=1), V, b, U)


def row_edit(row: int, made: CanonicalEdit, strength: float = 1.0) -> RowEdit:
    return RowEdit(row, made.V, made.b, made.U, strength)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 256, 576, 1000])
def test_rows(operators: Kernels, width: int, dtype: torch.dtype) -> None:
    hidden = random(9, width).to(dtype)
    wanted, edits = hidden.clone(), []
    for row, rank, strength in ((8, 1, 1.0), (0, 4, -0.5), (3, 9, 2.0), (5, 64, 0.01)):
        made = edit(rank, width)
        wanted[row] = made.edited(hidden[row : row + 1], strength)[0].to(dtype)
        edits.append(row_edit(row, made, strength))
    told = RowEdits(edits)
    again = hidden.clone()
    for found in (hidden, again):
        assert operators.edit_rows_(found, told)
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    untouched = [1, 2, 4, 6, 7]
    assert torch.equal(hidden[untouched], wanted[untouched])


def test_what_it_does_not_take(operators: Kernels) -> None:
    hidden = random(4, 8)
    before = hidden.clone()
    assert not operators.edit_rows_(hidden.T.contiguous().T, RowEdits([row_edit(0, edit(2, 8))]))
    assert not operators.edit_rows_(hidden, RowEdits([row_edit(0, edit(4096, 8))]))
    assert not operators.edit_rows_(hidden.double(), RowEdits([row_edit(0, edit(2, 8))]))
    for row, width in ((4, 8), (0, 9)):
        with pytest.raises(ValueError, match="edit_rows"):
            operators.edit_rows_(hidden, RowEdits([row_edit(row, edit(2, width))]))
    assert torch.equal(hidden, before)


def test_edits_that_are_none() -> None:
    made = edit(2, 8)
    for wrong in (
        row_edit(-1, made),
        row_edit(0, replace(made, b=random(3))),
        row_edit(0, replace(made, V=made.V.double())),
        row_edit(0, replace(made, U=random(8, 2).T)),
    ):
        with pytest.raises(ValueError, match="edit_rows"):
            RowEdits([wrong])
