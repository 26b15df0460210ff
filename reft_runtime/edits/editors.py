"""Editors that apply `EditTables` to a step: to rows at fixed addresses, and to packed rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reft_runtime.edits.sites import Site
from reft_runtime.edits.tables import COMPONENT, PIECE_RANKS, PIECE_ROWS, EditTables, Group
from reft_runtime.kernels.staging import send, to_device

if TYPE_CHECKING:
    from reft_runtime.schedule.plan import Chunk

ALONE = 4
"""Up to this many rows of a request and entry are edited one by one, more of them in pieces."""


class FixedRows:
    """An `Editor` of up to `rows` rows, one token each.

    Their entries and strengths are set for each step at fixed addresses, so that a captured graph
    can edit.
    """

    def __init__(self, tables: EditTables, layers: int, rows: int) -> None:
        device = tables.device
        self._tables = tables
        self._layers = layers
        self._index = torch.arange(rows, device=device)
        self._entries = torch.zeros(rows, dtype=torch.long, device=device)
        self._strengths = torch.zeros(rows, device=device)

    @property
    def sites(self) -> Sequence[Site]:
        """The outputs of all layers."""
        return [(layer, COMPONENT) for layer in range(self._layers)]

    def choose(self, rows: Sequence[tuple[int, float]]) -> None:
        """Set the entry and strength of each row of the next step."""
        for held, numbers in zip(
            (self._entries, self._strengths), zip(*rows, strict=True), strict=True
        ):
            held[: len(rows)].copy_(send(torch.tensor(numbers), held.device))

    def apply(self, site: Site, hidden: Tensor) -> None:
        """Edit the rows [n, d] of one layer in place."""
        n = len(hidden)
        self._tables.edit.rows(
            hidden,
            self._index[:n],
            self._tables.layer(site[0]),
            self._entries[:n],
            self._strengths[:n],
        )

    def entries_of(self, chunks: Sequence[Chunk]) -> list[tuple[int, float]] | None:
        """Entry and strength of each row, given chunks of one generated token each.

        None if a row has edits that cannot be applied this way: of another kind, or one after
        another.
        """
        self._tables.begin_step(a for chunk in chunks for a in chunk.sequence.decode_edits)
        rows: list[tuple[int, float]] = []
        for chunk in chunks:
            index = chunk.start - chunk.sequence.prompt_length
            own: list[tuple[int, float]] = []
            for applied in chunk.sequence.decode_edits:
                groups = self._tables.groups_of(applied)
                if groups is None:
                    return None
                own += [
                    (group.entry, applied.strength)
                    for group in groups
                    if group.positions.generated(index, index + 1)
                ]
            if len(own) > 1:
                return None
            rows += own or [(0, 0.0)]
        return rows


@dataclass(slots=True)
class _Rows:
    """Rows of one pass, their entries and strengths, and the pieces that they form, if any."""

    rows: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)

    def add(self, rows: Sequence[int], entry: int, strength: float) -> None:
        self.rows += rows
        self.entries += [entry] * len(rows)
        self.strengths += [strength] * len(rows)

    def add_pieces(self, rows: Sequence[int], entry: int, strength: float) -> None:
        for start in range(0, len(rows), PIECE_ROWS):
            piece = rows[start : start + PIECE_ROWS]
            self.pieces += (len(self.rows), len(piece))
            self.add(piece, entry, strength)

    def sent(self, device: torch.device) -> tuple[Tensor, ...]:
        lists = self.rows, self.pieces, self.entries
        rows, pieces, entries = to_device(lists, device)
        return rows, pieces.view(-1, 2), entries, send(torch.tensor(self.strengths), device)


@dataclass(slots=True)
class _Pass:
    layers: set[int] = field(default_factory=set)
    alone: _Rows = field(default_factory=_Rows)
    together: _Rows = field(default_factory=_Rows)


class PackedRows:
    """The rows of a packed step that the tables edit, in passes one after another.

    Requests whose edits are of another kind are left to `StepEdits`.
    """

    def __init__(self, tables: EditTables, chunks: Iterable[Chunk]) -> None:
        self._tables = tables
        self._passes: list[_Pass] = []
        self._sent: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] | None = None
        tables.begin_step(a for chunk in chunks for a in chunk.sequence.request.interventions)

    @property
    def sites(self) -> Sequence[Site]:
        """The outputs of the layers that have something to edit."""
        layers = set[int]().union(*(each.layers for each in self._passes))
        return [(layer, COMPONENT) for layer in sorted(layers)]

    def add(self, chunk: Chunk, shift: int) -> bool:
        """Take over all edits of a chunk; if that is not possible, take over none and return False.

        `shift` added to an offset in the sequence gives the packed row.
        """
        request = chunk.sequence.request
        if request.trace:
            return False
        wanted: list[tuple[Group, float, list[int]]] = []
        for applied in request.interventions:
            if not applied.strength:
                continue
            groups = self._tables.groups_of(applied)
            if groups is None:
                return False
            for group in groups:
                offsets = group.positions.offsets(len(request.prompt), chunk.start, chunk.stop)
                if offsets:
                    wanted.append((group, applied.strength, [o + shift for o in offsets]))
        passes: list[int] = []
        for number, (group, strength, rows) in enumerate(wanted):
            after = [
                before
                for before, (earlier, _, others) in zip(passes, wanted[:number], strict=True)
                if not earlier.layers.isdisjoint(group.layers) and not set(others).isdisjoint(rows)
            ]
            passes.append(max(after, default=-1) + 1)
            if passes[-1] == len(self._passes):
                self._passes.append(_Pass())
            own = self._passes[passes[-1]]
            own.layers |= group.layers
            if len(rows) > ALONE and group.rank <= PIECE_RANKS:
                own.together.add_pieces(rows, group.entry, strength)
            else:
                own.alone.add(rows, group.entry, strength)
        return True

    def apply(self, site: Site, hidden: Tensor) -> None:
        """Edit the packed rows [T, d] of one layer in place."""
        if self._sent is None:
            device = self._tables.device
            self._sent = [(p.alone.sent(device), p.together.sent(device)) for p in self._passes]
        layer, component = site
        edit, places = self._tables.edit, self._tables.layer(layer)
        for each, (alone, together) in zip(self._passes, self._sent, strict=True):
            if layer not in each.layers or component != COMPONENT:
                continue
            rows, _, entries, strengths = alone
            if len(rows):
                edit.rows(hidden, rows, places, entries, strengths)
            rows, pieces, entries, strengths = together
            if len(rows):
                edit.pieces(hidden, rows, pieces, places, entries, strengths)
