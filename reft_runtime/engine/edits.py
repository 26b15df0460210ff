"""Edits of one step: which rows of the packed hidden states change, by what, and the hooks.

Every edit has the canonical form h + s * ((h V^T + b) U), with h a row [d], V and U [r, d], b [r]
and s the strength. Hooks are registered for the sites of the step and removed after it, so a step
with nothing to edit runs the model as if there were no interventions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from reft_runtime.engine.scheduler import Chunk
from reft_runtime.engine.sequence import Sequence
from reft_runtime.interventions import CanonicalEdit

Site = tuple[int, str]
"""Layer index and component."""

BATCHED_ROWS = 32
"""Segments of more rows get a matrix product of their own instead of padding the others."""


@dataclass(slots=True)
class Segment:
    """Rows of the packed step that one sequence's edit changes at one site."""

    sequence: Sequence
    edit: CanonicalEdit
    strength: float
    rows: list[int]


@dataclass(slots=True)
class StepEdits:
    """All edits of a step.

    For each site the passes, in order: edits of the same row are in passes one after another, so
    a composition is applied in the order it was named, and a file's edits in the order it lists
    them. `failed` collects the sequences whose edit raised; the rows of all others are right.
    """

    passes: dict[Site, list[list[Segment]]] = field(default_factory=dict)
    failed: dict[Sequence, Exception] = field(default_factory=dict)

    @classmethod
    def of(cls, chunks: SequenceOf[Chunk]) -> StepEdits:
        """Find the rows to edit in a packed step (chunks in packed order)."""
        edits = cls()
        first = 0
        for chunk in chunks:
            sequence = chunk.sequence
            # Positions are the prompt's: a chunk of generated tokens has nothing to edit.
            if sequence.request.interventions and chunk.start < sequence.prompt_length:
                edits._add(chunk, first - chunk.start)
            first += chunk.length
        return edits

    def _add(self, chunk: Chunk, shift: int) -> None:
        length = chunk.sequence.prompt_length
        edited: dict[Site, list[set[int]]] = {}  # by pass, the rows of this chunk
        for applied in chunk.sequence.request.interventions:
            if not applied.strength:
                continue
            for edit in applied.edits:
                offsets = edit.positions.offsets(length, chunk.start, min(chunk.stop, length))
                if not offsets:
                    continue
                site = (edit.layer, edit.component)
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
                passes[number].append(Segment(chunk.sequence, edit, applied.strength, rows))

    def apply(self, site: Site, hidden: Tensor) -> None:
        """Edit the packed rows [T, d] of one site in place."""
        for segments in self.passes[site]:
            try:
                _apply_pass(segments, hidden)
            except Exception:
                # Some request's edit is at fault: do them one by one, and let only it fail.
                for segment in segments:
                    try:
                        _apply_pass([segment], hidden)
                    except Exception as error:
                        self.failed[segment.sequence] = error


def _apply_pass(segments: list[Segment], hidden: Tensor) -> None:
    """Compute all segments' new rows before any is written, so that a failure changes nothing."""
    short = [segment for segment in segments if len(segment.rows) <= BATCHED_ROWS]
    results = [_edit_long(s, hidden) for s in segments if len(s.rows) > BATCHED_ROWS]
    if short:
        results.append(_edit_short(short, hidden))
    for rows, edited in results:
        hidden.index_copy_(0, rows, edited.to(hidden.dtype))


def _edit_long(segment: Segment, hidden: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.tensor(segment.rows, device=hidden.device)
    old = hidden[rows].float()
    edit = segment.edit
    low_rank = torch.addmm(edit.b, old, edit.V.T)
    return rows, torch.addmm(old, low_rank, edit.U, alpha=segment.strength)


def _edit_short(segments: list[Segment], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Batched products: segments padded to the longest, ranks to the largest."""
    longest = max(len(segment.rows) for segment in segments)
    padded: list[list[int]] = []
    real: list[int] = []
    for number, segment in enumerate(segments):
        rows = segment.rows
        padded.append(rows + rows[-1:] * (longest - len(rows)))
        real.extend(range(number * longest, number * longest + len(rows)))
    index = torch.tensor(padded, device=hidden.device)
    old = hidden[index].float()  # [segments, longest, d]
    down = pad_sequence([s.edit.V for s in segments], batch_first=True)  # [segments, rank, d]
    up = pad_sequence([s.edit.U for s in segments], batch_first=True)
    bias = pad_sequence([s.edit.b for s in segments], batch_first=True)
    strength = torch.tensor([s.strength for s in segments], device=hidden.device)
    low_rank = torch.baddbmm(bias[:, None], old, down.transpose(1, 2))
    new = torch.baddbmm(old, low_rank * strength[:, None, None], up).flatten(0, 1)
    if len(real) == new.shape[0]:
        return index.flatten(), new
    kept = torch.tensor(real, device=hidden.device)
    return index.flatten()[kept], new[kept]


class EditSites:
    """The modules of a model where edits can happen."""

    def __init__(self, layers: SequenceOf[nn.Module]) -> None:
        self._modules: dict[Site, nn.Module] = {
            (index, "block_output"): layer for index, layer in enumerate(layers)
        }

    @contextmanager
    def hooked(self, edits: StepEdits) -> Iterator[None]:
        """Apply a step's edits to the forward passes made inside the `with` block."""
        handles = [
            self._modules[site].register_forward_hook(_output_hook(edits, site))
            for site in edits.passes
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _output_hook(edits: StepEdits, site: Site) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        # A block returns its hidden states [1, T, d], alone or first in a tuple; they are the
        # block's own fresh sum, so editing in place is safe.
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        edits.apply(site, hidden[0])

    return hook
