"""The one form in which every kind of edit is applied."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reft_runtime.interventions.positions import Positions


@dataclass(frozen=True, slots=True, eq=False)
class CanonicalEdit:
    """One low-rank affine edit of the rows h at `positions` of one layer's `component`.

    With strength s it is h + s * ((h Vᵀ + b) U). `V` and `U` are [r, d], `b` is [r]; all three are
    contiguous float32 tensors on the CPU.
    """

    layer: int
    component: str
    positions: Positions
    V: Tensor
    b: Tensor
    U: Tensor

    @property
    def rank(self) -> int:
        """Number of directions, r."""
        return self.b.shape[0]
