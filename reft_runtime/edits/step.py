"""Edits of one step: which rows of the packed hidden states change, and by what.

Every edit has the canonical form h + s * (g * h + c + phi(h V^T + b) U); see `CanonicalEdit`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reft_runtime.edits.editors import PackedRows
from reft_runtime.edits.sites import Site
from reft_runtime.edits.tables import EditTables
from reft_runtime.interventions import CanonicalEdit
from reft_runtime.kernels.operators import RowEdit, RowEdits, cpu_operators
from reft_runtime.kernels.staging import send
from reft_runtime.machine.memory import is_out_of_memory
from reft_runtime.outputs import TracedEdit
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.sequence import Sequence

BATCHED_ROWS = 32
"""Segments of more rows get a matrix product of their own instead of padding the others."""

_LEAST_LENGTH = 1e-12
"""A row counts as so long where a change is measured by it: JSON has no number for x / 0."""

MOVED_BYTES = 1 << 30
"""Most bytes of edits that stay on the device."""


class OnDevice:
    """Edits with their tensors on the model's device: the last used ones, up to `MOVED_BYTES`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._moved: OrderedDict[CanonicalEdit, CanonicalEdit] = OrderedDict()
        self._bytes = 0

    def __call__(self, edit: CanonicalEdit) -> CanonicalEdit:
        """Return the same edit on the device; it is copied if it is not there yet."""
        if self.device.type == "cpu":
            return edit
        if edit in self._moved:
            self._moved.move_to_end(edit)
            return self._moved[edit]
        moved = self._moved[edit] = edit.to(self.device)
        self._bytes += edit.nbytes
        while self._bytes > MOVED_BYTES and len(self._moved) > 1:
            self._bytes -= self._moved.popitem(last=False)[0].nbytes
        return moved


class Sent:
    """Numbers on the device, sent once per step: most files edit the same rows at many layers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[tuple[type, tuple[float, ...]], Tensor] = {}  # 1 and 1.0 are equal

    def __call__(self, numbers: Iterable[float]) -> Tensor:
        """Return the numbers, at least one, as a tensor [n], int64 or float32."""
        found = tuple(numbers)
        key = type(found[0]), found
        if key not in self._known:
            self._known[key] = send(torch.tensor(found), self._device)
        return self._known[key]


@dataclass(slots=True)
class Segment:
    """Rows of the packed step that one sequence's edit changes at one site.

    `shift` added to an offset in the sequence gives the packed row. `source` is the index of the
    intervention in the request, and that of the edit in its file.
    """

    sequence: Sequence
    edit: CanonicalEdit
    strength: float
    rows: list[int]
    shift: int
    source: tuple[int, int]


@dataclass(slots=True)
class StepEdits:
    """All edits of a step.

    `passes` holds the passes of each site, in order. Edits of the same row are in passes one after
    another, so that interventions are applied in the order in which the request names them, and
    edits in the order in which their file lists them. `failed` collects the sequences whose edit
    raised; the rows of all others are right. `traces` holds the traces of sequences that ask for
    one.
    """

    sent: Sent
    same: Callable[[Site], Site]
    """Returns one site for all that name the same place, so that their edits share its passes."""
    rows: PackedRows | None = None
    """Rows that the device's tables edit, before all passes; their requests are in no pass."""
    passes: dict[Site, list[list[Segment]]] = field(default_factory=dict)
    failed: dict[Sequence, Exception] = field(default_factory=dict)
    traces: dict[Sequence, list[TracedEdit]] = field(default_factory=dict)
    _of_rows: dict[tuple[Site, int], RowEdits] = field(default_factory=dict)
    """The passes of sites that are nothing but short segments, as edits of rows."""

    @property
    def sites(self) -> SequenceOf[Site]:
        """The sites with something to edit."""
        return tuple(dict.fromkeys((*self.passes, *(self.rows.sites if self.rows else ()))))

    @classmethod
    def of(
        cls,
        chunks: SequenceOf[Chunk],
        on_device: OnDevice,
        same: Callable[[Site], Site],
        tables: EditTables | None = None,
    ) -> StepEdits:
        """Find the rows to edit in a packed step (chunks in packed order).

        `same` is `EditSites.same`.
        """
        rows = None if tables is None else PackedRows(tables, chunks)
        edits = cls(Sent(on_device.device), same, rows)
        first = 0
        for chunk in chunks:
            sequence = chunk.sequence
            # Most edits are of prompt positions: their decode steps have nothing to look at.
            if sequence.decode_edits or (
                sequence.request.interventions and chunk.start < sequence.prompt_length
            ):
                shift = first - chunk.start
                if edits.rows is None or not edits.rows.add(chunk, shift):
                    edits._add(chunk, shift, on_device)
            first += chunk.length
        return edits

    def again(self) -> StepEdits:
        """The edits of a further step in which the same rows are edited alike."""
        return replace(self, failed={}, traces={})

    def _add(self, chunk: Chunk, shift: int, on_device: OnDevice) -> None:
        length = chunk.sequence.prompt_length
        edited: dict[Site, list[set[int]]] = {}  # by pass, the rows of this chunk
        for intervention, applied in enumerate(chunk.sequence.request.interventions):
            if not chunk.sequence.request.touches(applied):
                continue
            for index, edit in enumerate(applied.edits):
                offsets = edit.positions.offsets(length, chunk.start, chunk.stop)
                if not offsets:
                    continue
                site = self.same((edit.layer, edit.component))
                rows = [offset + shift for offset in offsets]
                earlier = edited.setdefault(site, [])
                number = len(earlier)
                while number and earlier[number - 1].isdisjoint(rows):
                    number -= 1
                if number == len(earlier):
                    earlier.append(set())
                earlier[number].update(rows)
                passes = self.passes.setdefault(site, [])
                if number == len(passes):
                    passes.append([])
                passes[number].append(
                    Segment(
                        chunk.sequence,
                        on_device(edit),
                        applied.strength,
                        rows,
                        shift,
                        (intervention, index),
                    )
                )

    def apply(self, site: Site, hidden: Tensor) -> None:
        """Edit the packed rows [T, d] of one site in place."""
        if self.rows is not None:
            self.rows.apply(site, hidden)
        for number, segments in enumerate(self.passes.get(site, ())):
            try:
                edits = self._as_row_edits(site, number, hidden.shape[1]) if hidden.is_cpu else None
                if edits is None or not _edit_rows(hidden, edits):
                    self._apply_pass(segments, hidden)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                # One request's edit is at fault: apply them one by one, so that it fails alone.
                for segment in segments:
                    try:
                        self._apply_pass([segment], hidden)
                    except Exception as error:
                        if is_out_of_memory(error):
                            raise
                        self.failed[segment.sequence] = error

    def row_edits(self, site: Site, width: int) -> RowEdits | None:
        """What `apply` does to a site's rows, if that is no more than to edit single rows.

        None where the CPU's operator does not take the edits; then `apply` tells whose are at
        fault.
        """
        if self.rows is not None or len(self.passes.get(site, ())) != 1:
            return None
        try:
            return self._as_row_edits(site, 0, width)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None

    def _as_row_edits(self, site: Site, number: int, width: int) -> RowEdits | None:
        """A pass over rows so wide on a CPU as edits of rows, which are kept.

        None where it is more than that, or the operator does not take them. Raises ValueError if an
        edit's shapes disagree.
        """
        known_as, operators = (site, number), cpu_operators()
        if known_as not in self._of_rows:
            segments = self.passes[site][number]
            if operators is None or any(_traced(one) or not _batches(one) for one in segments):
                return None
            found = _row_edits(segments)
            if found.width != width or not operators.edits_rows(found):
                return None
            self._of_rows[known_as] = found
        return self._of_rows[known_as]

    def _apply_pass(self, segments: list[Segment], hidden: Tensor) -> None:
        """Compute all segments' new rows before any is written: a failure changes nothing."""
        changing = [segment for segment in segments if segment.strength]  # others are only read
        short = [segment for segment in changing if _batches(segment)]
        results = [_edit_alone(s, hidden, self.sent) for s in changing if not _batches(s)]
        traced = [segment for segment in segments if _traced(segment)]
        before = [hidden[segment.rows].float() for segment in traced]
        by_rows = hidden.is_cpu and cpu_operators() is not None
        if short and not (by_rows and _edit_rows(hidden, _row_edits(short))):
            results.append(_edit_together(short, hidden, self.sent))
        for rows, edited in results:
            hidden.index_copy_(0, rows, edited.to(hidden.dtype))
        for segment, old in zip(traced, before, strict=True):
            self._trace(segment, old, hidden[segment.rows].float())

    def _trace(self, segment: Segment, old: Tensor, new: Tensor) -> None:
        sizes = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(_LEAST_LENGTH)
        positions = tuple(row - segment.shift for row in segment.rows)
        site = segment.edit.layer, segment.edit.component
        along: list[tuple[tuple[float, ...], ...]] = []
        if segment.sequence.request.trace == "along":
            read = segment.edit.coordinates(torch.stack((old, new))).tolist()
            along = [tuple(map(tuple, rows)) for rows in read]
        traced = TracedEdit(*segment.source, *site, positions, tuple(sizes.tolist()), *along)
        self.traces.setdefault(segment.sequence, []).append(traced)


def _batches(segment: Segment) -> bool:
    """Whether a segment is a short affine low-rank edit, which goes through batched products."""
    edit = segment.edit
    return (
        len(segment.rows) <= BATCHED_ROWS
        and edit.rank > 0
        and not edit.learned
        and edit.gain is None
        and edit.offset is None
    )


def _traced(segment: Segment) -> bool:
    return segment.sequence.request.trace and segment.sequence.leads


def _row_edits(short: list[Segment]) -> RowEdits:
    """Short segments on a CPU as edits of rows. Raises ValueError if an edit's shapes disagree."""
    return RowEdits(
        [
            RowEdit(row, s.edit.V, s.edit.b, s.edit.U, float(s.strength))
            for s in short
            for row in s.rows
        ]
    )


def _edit_rows(hidden: Tensor, edits: RowEdits) -> bool:
    """Edit rows by the CPU's operator; False, and nothing is changed, where it cannot do that."""
    operators = cpu_operators()
    return operators is not None and operators.edit_rows_(hidden, edits)


def _edit_alone(segment: Segment, hidden: Tensor, sent: Sent) -> tuple[Tensor, Tensor]:
    """The indices of a segment's packed rows, and the rows edited in float32; any kind of edit."""
    rows = sent(segment.rows)
    return rows, segment.edit.edited(hidden[rows], segment.strength)


def _edit_together(segments: list[Segment], hidden: Tensor, sent: Sent) -> tuple[Tensor, Tensor]:
    """Like `_edit_alone` for several segments, by batched products.

    Segments are padded to the longest, ranks to the largest.
    """
    longest = max(len(segment.rows) for segment in segments)
    padded: list[int] = []
    real: list[int] = []
    for number, segment in enumerate(segments):
        rows = segment.rows
        padded += rows + rows[-1:] * (longest - len(rows))
        real.extend(range(number * longest, number * longest + len(rows)))
    index = sent(padded).view(len(segments), longest)
    old = hidden[index].float()  # [segments, longest, d]
    down = _stack([s.edit.V for s in segments])  # [segments, rank, d]
    up = _stack([s.edit.U for s in segments])
    bias = _stack([s.edit.b for s in segments])
    strength = sent(float(s.strength) for s in segments)
    low_rank = torch.baddbmm(bias[:, None], old, down.transpose(1, 2))
    new = torch.baddbmm(old, low_rank * strength[:, None, None], up).flatten(0, 1)
    if len(real) == new.shape[0]:
        return index.flatten(), new
    kept = sent(real)
    return index.flatten()[kept], new[kept]


def _stack(parts: list[Tensor]) -> Tensor:
    """Stack along a new first dimension; smaller ranks get rows of zeros."""
    if len({part.shape for part in parts}) == 1:
        return torch.stack(parts)  # several times faster than padding
    return pad_sequence(parts, batch_first=True)
