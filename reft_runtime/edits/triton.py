"""Launches the kernels that edit rows by `EditTables` on a CUDA device."""

from __future__ import annotations

from torch import Tensor

from reft_runtime.edits.tables import PIECE_RANKS, PIECE_ROWS, PLACE
from reft_runtime.kernels.cuda import edit_kernels
from reft_runtime.kernels.cuda.products import early, row_block

NUMBERS_AT_ONCE = 32768
"""Most numbers of a matrix that a program holds in registers at once."""


class TritonEdits:
    """`tables.RowEdits` on a CUDA device."""

    def rows(
        self, hidden: Tensor, index: Tensor, places: Tensor, entries: Tensor, strengths: Tensor
    ) -> None:
        """See `RowEdits.rows`."""
        sizes = row_block(hidden.shape[1])
        ranks = max(1, min(8, NUMBERS_AT_ONCE // sizes["BLOCK"]))
        edit_kernels.edit_rows[(len(index),)](
            hidden, index, places, entries, strengths, PLACE=PLACE, RANKS=ranks, **sizes, **early()
        )

    def pieces(
        self,
        hidden: Tensor,
        index: Tensor,
        pieces: Tensor,
        places: Tensor,
        entries: Tensor,
        strengths: Tensor,
    ) -> None:
        """See `RowEdits.pieces`."""
        edit_kernels.edit_pieces[(len(pieces),)](
            hidden,
            index,
            pieces,
            places,
            entries,
            strengths,
            WIDTH=hidden.shape[1],
            STEP=128,
            PLACE=PLACE,
            ROWS=PIECE_ROWS,
            RANKS=PIECE_RANKS,
            **early(),
        )
