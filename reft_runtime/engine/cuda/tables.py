"""Edits of decoded tokens at fixed addresses, so that a captured graph can apply them.

A slot holds one intervention's edits of decoded tokens at the outputs of all layers; layers that
it leaves alone have zeros there. Slot 0 changes nothing. A version that is not in a slot is copied,
between two steps, into the one that was used longest ago.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reft_runtime.engine.sites import Site
from reft_runtime.interventions import CanonicalEdit

if TYPE_CHECKING:
    from reft_runtime.engine.scheduler import Chunk
    from reft_runtime.engine.sequence import AppliedIntervention

RANK = 8
SLOTS = 64
COMPONENT = "block_output"

EditRows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""Edits rows [n, d] in place, by V and U [slots, RANK, d], b [slots, RANK], and the slots and
strengths [n] of the rows."""


class EditTables:
    """An `Editor` of rows whose slots and strengths `choose` sets."""

    def __init__(
        self, layers: int, width: int, rows: int, device: torch.device, edit_rows: EditRows
    ) -> None:
        self._edit_rows = edit_rows
        slots = 1 + min(SLOTS, rows)
        self._V, self._U = (torch.zeros(layers, slots, RANK, width, device=device) for _ in "VU")
        self._b = torch.zeros(layers, slots, RANK, device=device)
        self._slots = torch.zeros(rows, dtype=torch.long, device=device)
        self._strengths = torch.zeros(rows, device=device)
        self._free = list(range(slots - 1, 0, -1))
        self._used: OrderedDict[tuple[str, tuple[int, ...] | None], int] = OrderedDict()

    @property
    def sites(self) -> Sequence[Site]:
        """The outputs of all layers."""
        return [(layer, COMPONENT) for layer in range(len(self._V))]

    def apply(self, site: Site, hidden: Tensor) -> None:
        """Edit the rows [n, d] of one layer in place."""
        layer, n = site[0], len(hidden)
        self._edit_rows(
            hidden,
            self._V[layer],
            self._U[layer],
            self._b[layer],
            self._slots[:n],
            self._strengths[:n],
        )

    def choose(self, rows: Sequence[tuple[int, float]]) -> None:
        """Slot and strength of each row of the next step."""
        slots, strengths = zip(*rows, strict=True)
        self._slots[: len(rows)].copy_(torch.tensor(slots), non_blocking=True)
        self._strengths[: len(rows)].copy_(torch.tensor(strengths), non_blocking=True)

    def slots_of(self, chunks: Sequence[Chunk]) -> list[tuple[int, float]] | None:
        """Slot and strength of each decoding row, copied in where they are new.

        None where a row has edits that no slot can hold, or there are more than there are slots.
        """
        found: list[AppliedIntervention | None] = []
        for chunk in chunks:
            editing = [
                applied
                for applied in chunk.sequence.request.interventions
                if applied.strength and any(e.positions.edits_decode for e in applied.edits)
            ]
            if len(editing) > 1 or not all(_fits(applied.edits) for applied in editing):
                return None
            found.append(editing[0] if editing else None)
        wanted = {_key(applied): applied for applied in found if applied is not None}
        if len(wanted) > self._V.shape[1] - 1:
            return None
        for key in wanted:
            if key in self._used:
                self._used.move_to_end(key)
        for key, applied in wanted.items():
            if key not in self._used:
                slot = self._free.pop() if self._free else self._used.popitem(last=False)[1]
                self._write(slot, applied.edits)
                self._used[key] = slot
        return [
            (0, 0.0) if applied is None else (self._used[_key(applied)], applied.strength)
            for applied in found
        ]

    def _write(self, slot: int, edits: Sequence[CanonicalEdit]) -> None:
        for table in (self._V, self._U, self._b):
            table[:, slot] = 0
        for edit in edits:
            if edit.positions.edits_decode:
                self._V[edit.layer, slot, : edit.rank].copy_(edit.V, non_blocking=True)
                self._U[edit.layer, slot, : edit.rank].copy_(edit.U, non_blocking=True)
                self._b[edit.layer, slot, : edit.rank].copy_(edit.b, non_blocking=True)
                if edit.offset is not None:  # as a direction that is always 1
                    self._U[edit.layer, slot, edit.rank].copy_(edit.offset, non_blocking=True)
                    self._b[edit.layer, slot, edit.rank] = 1


def _key(applied: AppliedIntervention) -> tuple[str, tuple[int, ...] | None]:
    return applied.digest, applied.subspace


def _fits(edits: Sequence[CanonicalEdit]) -> bool:
    """Whether a slot can hold the edits of decoded tokens among these."""
    decoding = [edit for edit in edits if edit.positions.edits_decode]
    return len({edit.layer for edit in decoding}) == len(decoding) and all(
        edit.component == COMPONENT
        and edit.rank + (edit.offset is not None) <= RANK
        and not edit.learned
        and edit.gain is None
        for edit in decoding
    )


def edit_rows(
    rows: Tensor, V: Tensor, U: Tensor, b: Tensor, slots: Tensor, strengths: Tensor
) -> None:
    """`EditRows` by torch's own operators: the reference."""
    old = rows.float()
    low_rank = torch.einsum("nd,nrd->nr", old, V[slots]) + b[slots]
    rows.copy_(old + strengths[:, None] * torch.einsum("nr,nrd->nd", low_rank, U[slots]))
