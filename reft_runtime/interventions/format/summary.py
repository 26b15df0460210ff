"""What listings and searches show of a file, from its header."""

from __future__ import annotations

import math
from dataclasses import dataclass

from reft_runtime.interventions.format.canonical import EDIT_BYTES
from reft_runtime.interventions.format.header import Header
from reft_runtime.interventions.format.kinds import KINDS

_BYTES = 4
"""Bytes of one number in canonical form, a float32."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A file in few words; `kinds` and `positions` come in the order of its edits, each once."""

    description: str
    kinds: tuple[str, ...]
    positions: tuple[str, ...]
    layers: tuple[int, ...]
    parameters: int
    """How many numbers all its tensors hold, as they are stored."""

    directions: int
    """How many directions every edit has at least; a request's `subspace` chooses among these."""

    memory_bytes: int
    """At most so many bytes of memory do its edits take in canonical form."""


def summarise(header: Header) -> Summary:
    """The summary of the file that has this header."""
    edits = header.manifest.edits
    ranks = [_rank(header, number) for number in range(len(edits))]
    return Summary(
        description=header.manifest.description,
        kinds=tuple(dict.fromkeys(edit.kind for edit in edits)),
        positions=tuple(map(str, dict.fromkeys(edit.positions for edit in edits))),
        layers=tuple(sorted({edit.layer for edit in edits})),
        parameters=sum(math.prod(info.shape) for info in header.tensors.values()),
        directions=min(ranks, default=0),
        memory_bytes=sum(_memory(header, number, rank) for number, rank in enumerate(ranks)),
    )


def _memory(header: Header, number: int, rank: int) -> int:
    """At most so many bytes does the canonical form of an edit take: see `canonical_edit`."""
    edit, width = header.manifest.edits[number], header.manifest.width_of(number)
    if not rank:
        return 2 * width * _BYTES + EDIT_BYTES  # a gain and an offset
    linear = edit.act in (None, "linear") and edit.dtype == "float32"
    return (rank if linear else 2 * rank) * (2 * width + 1) * _BYTES + EDIT_BYTES


_RANKED = {
    kind: [
        (name, spec.shape.index("r"))
        for name, spec in found.tensors.items()
        if "r" in spec.shape and not spec.optional
    ][:1]
    for kind, found in KINDS.items()
}
"""By kind, a tensor that every edit of it has, and the axis of it that is as long as the rank."""


def _rank(header: Header, number: int) -> int:
    """Rank of an edit, 0 where its kind has no directions."""
    for name, axis in _RANKED[header.manifest.edits[number].kind]:
        return header.tensors[f"edits.{number}.{name}"].shape[axis]
    return 0
