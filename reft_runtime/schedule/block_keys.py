"""The keys under which a block's keys and values may be reused. Knows no tensors."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as SequenceOf

from reft_runtime.interventions.format.positions import Positions
from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.request import AppliedIntervention, Request


class BlockKeys:
    """Keys of one sequence's full blocks, in order, made as far as they are asked for.

    Two blocks have the same key only if their keys and values are equal: a key chains the block's
    token ids, the edits that fall in it (digest, strength, subspace, sites, offsets; in order) and
    the key before it; the chain starts at the request's salt. So the blocks before the first
    edited token have the base model's keys; `base` is the number of these among the keys made.
    """

    def __init__(self, request: Request) -> None:
        self.base = 0
        self._made: list[bytes] = []
        self._first = hashlib.sha256(b"reft-kv" + request.salt).digest()
        self._prompt_length = len(request.prompt)
        self._edits = [
            edits
            for applied in request.interventions
            if applied.strength
            for edits in _by_positions(applied)
        ]

    def upto(self, blocks: int, tokens: SequenceOf[int]) -> list[bytes]:
        """Keys of the first `blocks` blocks; `tokens` must fill them, and must never change."""
        while len(self._made) < blocks:
            start = len(self._made) * BLOCK_TOKENS
            stop = start + BLOCK_TOKENS
            edits = [
                (what, offsets)
                for positions, what in self._edits
                if (offsets := positions.offsets(self._prompt_length, start, stop))
            ]
            if not edits and self.base == len(self._made):
                self.base += 1
            content = array("q", tokens[start:stop]).tobytes() + repr(edits).encode()
            before = self._made[-1] if self._made else self._first
            self._made.append(hashlib.sha256(before + content).digest())
        return self._made[:blocks]

    def copy(self, tokens: int) -> BlockKeys:
        """A copy for a sequence that begins with the same `tokens` and may go on with others."""
        made = self._made[: tokens // BLOCK_TOKENS]
        other = object.__new__(BlockKeys)
        other.__dict__ |= self.__dict__ | {"_made": made, "base": min(self.base, len(made))}
        return other


def _by_positions(applied: AppliedIntervention) -> list[tuple[Positions, str]]:
    """Distinct positions of an intervention's edits, each with what is done there."""
    places: dict[Positions, list[tuple[int, int, str]]] = {}
    for index, edit in enumerate(applied.edits):
        places.setdefault(edit.positions, []).append((index, edit.layer, edit.component))
    return [
        (positions, repr((applied.digest, applied.strength, applied.subspace, where)))
        for positions, where in places.items()
    ]
