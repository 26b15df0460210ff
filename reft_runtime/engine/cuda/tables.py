"""Edits of decoded tokens at fixed addresses, so that a captured graph can apply them.

A slot holds one intervention's edits of decoded tokens at the outputs of all layers. Slot 0 changes
nothing. What is not in a slot is copied, between two steps, into the one that was used longest ago.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reft_runtime.engine.sites import Site
from reft_runtime.engine.staging import send
from reft_runtime.interventions import CanonicalEdit

if TYPE_CHECKING:
    from reft_runtime.engine.scheduler import Chunk
    from reft_runtime.engine.sequence import AppliedIntervention

RANK = 8
COMPONENT = "block_output"

Key = tuple[str, tuple[int, ...] | None]
"""Digest and subspace of an intervention."""


class LayerTable(NamedTuple):
    """Of one layer: `V`, `U` [slots, RANK, d] and `b` [slots, RANK], as far as `ranks` [slots]."""

    V: Tensor
    U: Tensor
    b: Tensor
    ranks: Tensor


EditRows = Callable[[Tensor, LayerTable, Tensor, Tensor], None]
"""Edits rows [n, d] in place, by their slots and strengths [n] in a layer's table."""


def table_bytes(layers: int, width: int, rows: int) -> int:
    """Memory of the tables for so many rows a step."""
    return 2 * layers * (rows + 1) * RANK * width * torch.float32.itemsize


class EditTables:
    """An `Editor` of up to `rows` rows, whose slots and strengths `choose` sets."""

    def __init__(
        self, layers: int, width: int, rows: int, device: torch.device, edit_rows: EditRows
    ) -> None:
        self._edit_rows = edit_rows
        slots = rows + 1
        self._V, self._U = (torch.zeros(layers, slots, RANK, width, device=device) for _ in "VU")
        self._b = torch.zeros(layers, slots, RANK, device=device)
        self._ranks = torch.zeros(layers, slots, dtype=torch.int32, device=device)
        self._slots = torch.zeros(rows, dtype=torch.long, device=device)
        self._strengths = torch.zeros(rows, device=device)
        self._free = list(range(slots - 1, 0, -1))
        self._used: OrderedDict[Key, int] = OrderedDict()

    @property
    def sites(self) -> Sequence[Site]:
        """The outputs of all layers."""
        return [(layer, COMPONENT) for layer in range(len(self._V))]

    def apply(self, site: Site, hidden: Tensor) -> None:
        """Edit the rows [n, d] of one layer in place."""
        layer, n = site[0], len(hidden)
        table = LayerTable(self._V[layer], self._U[layer], self._b[layer], self._ranks[layer])
        self._edit_rows(hidden, table, self._slots[:n], self._strengths[:n])

    def choose(self, rows: Sequence[tuple[int, float]]) -> None:
        """Slot and strength of each row of the next step."""
        for held, numbers in zip(
            (self._slots, self._strengths), zip(*rows, strict=True), strict=True
        ):
            held[: len(rows)].copy_(send(torch.tensor(numbers), held.device))

    def slots_of(self, chunks: Sequence[Chunk]) -> list[tuple[int, float]] | None:
        """Slot and strength of each decoding row, copied in where they are new.

        None where a row has edits that no slot can hold.
        """
        rows: list[tuple[Key, float] | None] = []
        wanted: dict[Key, AppliedIntervention] = {}
        for chunk in chunks:
            editing = chunk.sequence.decode_edits
            if not editing:
                rows.append(None)
                continue
            applied, key = editing[0], _key(editing[0])
            if len(editing) > 1 or not (key in self._used or _fits(applied.edits)):
                return None
            wanted[key] = applied
            rows.append((key, applied.strength))
        # Those of this step first become the latest used: none of them gives way to another.
        for key in wanted:
            if key in self._used:
                self._used.move_to_end(key)
        for applied in wanted.values():
            self.hold(applied)
        return [(0, 0.0) if row is None else (self._used[row[0]], row[1]) for row in rows]

    def hold(self, applied: AppliedIntervention) -> None:
        """Copy the edits of decoded tokens into a slot, if they are in none."""
        key = _key(applied)
        if key in self._used:
            return
        slot = self._free.pop() if self._free else self._used.popitem(last=False)[1]
        try:
            self._write(slot, [edit for edit in applied.edits if edit.positions.edits_decode])
        except BaseException:
            self._free.append(slot)
            raise
        self._used[key] = slot

    def _write(self, slot: int, edits: Sequence[CanonicalEdit]) -> None:
        parts = [_low_rank(edit) for edit in edits]
        device = self._V.device
        layers = torch.tensor([edit.layer for edit in edits], device=device)
        self._ranks[:, slot] = 0
        self._ranks[layers, slot] = torch.tensor(
            [len(b) for _, _, b in parts], dtype=torch.int32, device=device
        )
        for table, rows in zip((self._V, self._U, self._b), zip(*parts, strict=True), strict=True):
            stacked = pad_sequence(list(rows), batch_first=True).to(device)
            table[layers, slot, : stacked.shape[1]] = stacked


def _low_rank(edit: CanonicalEdit) -> tuple[Tensor, Tensor, Tensor]:
    """V, U and b; an offset is a direction that is always 1."""
    if edit.offset is None:
        return edit.V, edit.U, edit.b
    row = edit.offset[None]
    return (
        torch.cat([edit.V, torch.zeros_like(row)]),
        torch.cat([edit.U, row]),
        torch.cat([edit.b, edit.b.new_ones(1)]),
    )


def _key(applied: AppliedIntervention) -> Key:
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
