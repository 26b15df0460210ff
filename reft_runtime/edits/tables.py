"""Interventions on the device: where their edits lie, by layer, for kernels that edit rows.

An intervention's edits of block outputs are copied to the device in one piece, and an entry of a
table says where each layer's are, so that one kernel edits the rows of many interventions. The
table lies at a fixed address, so that captured graphs can read it. The least recently used
interventions are evicted, but none that the current step uses. Entry 0 changes nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from reft_runtime.edits.arena import Arena, whole
from reft_runtime.interventions import CanonicalEdit, Positions
from reft_runtime.interventions.format.canonical import PackedEdits
from reft_runtime.kernels.staging import send

if TYPE_CHECKING:
    from reft_runtime.schedule.request import AppliedIntervention

COMPONENT = "block_output"
ENTRIES = 4096
PLACE = 5
"""Numbers of a layer's edit in the table: the addresses of V, U, b and c (below 0: none), and the
rank."""
NOWHERE = -1
_BYTES = 4
"""Bytes of one number, a float32."""

PIECE_ROWS = 16
"""Most rows of one entry that are edited together, by matrix products."""

PIECE_RANKS = 16
"""Highest rank of an entry whose rows are edited together."""

MOST_BYTES = 4 << 30
"""Most bytes to set aside for interventions: the rest of a device holds keys and values."""

RANK = 8
"""Rank of the interventions, each of all layers, for which memory is set aside."""

Key = tuple[str, tuple[int, ...] | None]
"""Digest and subspace of an intervention."""


class RowEdits(Protocol):
    """Edits rows of hidden states [T, d] in place, by one layer's table `places` [entries, PLACE].

    `index` [n] are the rows to edit, `entries` [n] and `strengths` [n] their edits.
    """

    def rows(
        self, hidden: Tensor, index: Tensor, places: Tensor, entries: Tensor, strengths: Tensor
    ) -> None:
        """Edit the rows one by one."""

    def pieces(
        self,
        hidden: Tensor,
        index: Tensor,
        pieces: Tensor,
        places: Tensor,
        entries: Tensor,
        strengths: Tensor,
    ) -> None:
        """Edit the rows in pieces of up to PIECE_ROWS rows.

        The rows of a piece have one strength and one entry, of rank PIECE_RANKS at most. `pieces`
        [pieces, 2] holds where each piece begins in `index`, and its number of rows.
        """


def table_bytes(layers: int, width: int, interventions: int) -> int:
    """Bytes to set aside for this many interventions of all layers, at most `MOST_BYTES`."""
    each = whole(layers * (2 * RANK * width + RANK) * _BYTES)
    return min(interventions * each, MOST_BYTES)


class Group(NamedTuple):
    """Edits of an intervention at the same positions, at most one a layer, and their entry."""

    positions: Positions
    layers: frozenset[int]
    rank: int
    """The highest rank of the edits."""
    entry: int


class _Held(NamedTuple):
    groups: tuple[Group, ...]
    block: Tensor
    lent: bool
    """Whether the block is a part of the memory that was set aside."""


class EditTables:
    """The interventions on a device, as many as fit the `budget` bytes that are set aside.

    More memory is taken only if a single step uses more: requests are admitted as the budget
    permits, but pieces of it may be too small, and one request alone may use more.
    """

    def __init__(
        self, layers: int, width: int, budget: int, device: torch.device, edit: RowEdits
    ) -> None:
        self.edit = edit
        self.device = device
        self.budget = budget
        self._layers, self._width = layers, width
        self._places = torch.zeros(layers, ENTRIES, PLACE, dtype=torch.long, device=device)
        self._free = list(range(ENTRIES - 1, 0, -1))
        self._arena = Arena(budget, device)
        self._held: OrderedDict[Key, _Held] = OrderedDict()
        self._in_use: set[Key] = set()
        self._plans: dict[Key, _Plan | None] = {}

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile the kernels that edit rows of a model's dtype: entry 0 leaves a row as it is."""
        rows = torch.zeros(1, self._width, dtype=dtype, device=self.device)
        first = torch.zeros(1, dtype=torch.long, device=self.device)
        strengths = torch.zeros(1, device=self.device)
        piece = torch.tensor([[0, 1]], device=self.device)
        self.edit.rows(rows, first, self.layer(0), first, strengths)
        self.edit.pieces(rows, first, piece, self.layer(0), first, strengths)

    def layer(self, layer: int) -> Tensor:
        """One layer's part of the table, int64 [entries, PLACE]."""
        return self._places[layer]

    def begin_step(self, wanted: Iterable[AppliedIntervention]) -> None:
        """Begin a step: none of `wanted` is evicted during it; what the last step used may be."""
        self._in_use = {_key(applied) for applied in wanted}

    def groups_of(self, applied: AppliedIntervention) -> tuple[Group, ...] | None:
        """An intervention's groups of edits in the order to apply them, copied here if new.

        None if its edits are not all affine ones of low rank at block outputs, or if the other
        interventions of the step leave too few entries. The groups are valid until the next step.
        Raises `torch.OutOfMemoryError` if a step uses more memory than there is.
        """
        key = _key(applied)
        if key not in self._held:
            if key in self._plans and self._plans[key] is None:
                return None
            edits = PackedEdits.of(applied.edits)
            plan = self._plan_of(key, edits)
            if plan is None:
                return None
            copied = self._copied(edits.block, plan)
            if copied is None:
                return None
            self._held[key] = copied
        self._held.move_to_end(key)
        return self._held[key].groups

    def _plan_of(self, key: Key, edits: PackedEdits) -> _Plan | None:
        if key not in self._plans:
            if len(self._plans) > 2 * ENTRIES:
                self._plans.clear()
            self._plans[key] = _Plan.of(edits, self._layers, self._width)
        return self._plans[key]

    def _room_for(self, size: int, entries: int) -> tuple[Tensor, bool] | None:
        """Memory for an intervention, and whether it is a part of what was set aside.

        Others are evicted if there is no room, or if there are too few entries. None if there are
        too few even then.
        """
        place = self._arena.take(size)
        unused = (key for key in list(self._held) if key not in self._in_use)
        while place is None or len(self._free) < entries:
            key = next(unused, None)
            if key is None:
                break
            held = self._held.pop(key)
            self._free.extend(group.entry for group in held.groups)
            if held.lent:
                self._arena.give_back(held.block)
            place = self._arena.take(size) if place is None else place
        if len(self._free) < entries:
            if place is not None:
                self._arena.give_back(place)
            return None
        if place is not None:
            return place, True
        return torch.empty(size, dtype=torch.uint8, device=self.device), False

    def _copied(self, block: Tensor, plan: _Plan) -> _Held | None:
        room = self._room_for(block.nbytes, len(plan.groups))
        if room is None:
            return None
        there, lent = room
        try:
            there[: block.nbytes].view(torch.float32).copy_(block, non_blocking=True)
            entries = self._free[len(self._free) - len(plan.groups) :]
            places = plan.places + plan.present * there.data_ptr()
            sent = send(torch.cat([torch.tensor(entries), places.flatten()]), self.device)
            numbers, addresses = sent.tensor_split([len(entries)])
            self._places.index_copy_(1, numbers, addresses.view(places.shape))
        except BaseException:
            if lent:
                self._arena.give_back(there)
            raise
        del self._free[len(self._free) - len(entries) :]
        groups = tuple(
            group._replace(entry=entry) for group, entry in zip(plan.groups, entries, strict=True)
        )
        return _Held(groups, there, lent)


class _Plan(NamedTuple):
    """How to enter packed edits in the table; the edits themselves are not held.

    `places` [layers, groups, PLACE] holds addresses as if the block began at 0. `present`, of the
    same shape, is 1 for those to which the block's address is to be added, else 0.
    """

    groups: list[Group]
    places: Tensor
    present: Tensor

    @classmethod
    def of(cls, edits: PackedEdits, layers: int, width: int) -> _Plan | None:
        parts = _parts(edits, width)
        if parts is None:
            return None
        start = edits.block.data_ptr()
        places = torch.full((layers, len(parts), PLACE), NOWHERE, dtype=torch.long)
        places[..., -1] = 0
        for number, part in enumerate(parts):
            told = [
                [
                    *(
                        NOWHERE if tensor is None else tensor.data_ptr() - start
                        for tensor in (edit.V, edit.U, edit.b, edit.offset)
                    ),
                    edit.rank,
                ]
                for edit in part.edits.values()
            ]
            places[list(part.edits), number] = torch.tensor(told)
        present = (places != NOWHERE).long()
        present[..., -1] = 0
        groups = [
            Group(
                part.positions, frozenset(part.edits), max(e.rank for e in part.edits.values()), 0
            )
            for part in parts
        ]
        return cls(groups, places, present)


class _Part(NamedTuple):
    positions: Positions
    edits: dict[int, CanonicalEdit]


def _key(applied: AppliedIntervention) -> Key:
    return applied.digest, applied.subspace


def _parts(edits: Sequence[CanonicalEdit], width: int) -> list[_Part] | None:
    """Edits in groups, to be applied one group after another; None if one is of another kind.

    An edit whose shapes disagree is of another kind, too: a kernel does not check them.
    """
    parts: list[_Part] = []
    for edit in edits:
        fits = (
            edit.V.shape == edit.U.shape == (edit.rank, width)
            and edit.b.ndim == 1
            and (edit.offset is None or edit.offset.shape == (width,))
        )
        if not fits or edit.component != COMPONENT or edit.learned or edit.gain is not None:
            return None
        # The edit comes after all earlier edits of its layer.
        later = len(parts)
        while later and edit.layer not in parts[later - 1].edits:
            later -= 1
        for part in parts[later:]:
            if part.positions == edit.positions:
                part.edits[edit.layer] = edit
                break
        else:
            parts.append(_Part(edit.positions, {edit.layer: edit}))
    return parts
