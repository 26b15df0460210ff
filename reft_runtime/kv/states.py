"""The recurrent states of sequences: for each state of each mixer one tensor, a slot each.

Slots are dense: the running sequences have the first ones, and a slot that comes free is filled
with the state of the last. So the states of sequences that decode together mostly lie side by side,
and a mixer's own code changes them in place. A sequence that begins never reads what its slot held.

A state can not go back: once a step has advanced some mixers, it must not be repeated on what they
hold. So the number of tokens that each state has seen is kept, and a chunk that does not begin
there is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from reft_runtime.base.packed_delta import Part
from reft_runtime.base.recurrent import MixerCall, MixerStates, Rows, StateCache, StateKey, join
from reft_runtime.kernels.staging import send
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.prefix_cache import StateCopy
from reft_runtime.schedule.sequence import Sequence


class StateStorage:
    """Slots for the states of `slots` sequences, and `places` for kept states.

    `mixers` are the states of each mixer, in order.
    """

    def __init__(
        self,
        mixers: SequenceOf[MixerStates],
        device: torch.device,
        slots: int,
        places: int = 0,
    ) -> None:
        def tensors(count: int) -> list[dict[StateKey, Tensor]]:
            return [
                {
                    key: torch.empty(count, *shape.sizes, dtype=shape.dtype, device=device)
                    for key, shape in mixer.shapes.items()
                }
                for mixer in mixers
            ]

        self.mixers = mixers
        self.states = tensors(slots)
        self.device = device
        self._kept = tensors(places)
        self._order: list[Sequence] = []  # the sequence of each slot
        self._slots: dict[Sequence, int] = {}
        self._seen: dict[Sequence, int] = {}  # tokens that a sequence's states have seen
        self._kept_seen = [0] * places

    def slot(self, sequence: Sequence) -> int:
        """The slot of a sequence, valid until sequences are released."""
        return self._slots[sequence]

    @torch.inference_mode()
    def prepare(self, chunks: SequenceOf[Chunk]) -> list[Chunk]:
        """Give the sequences of a step and their forks slots, and bring in kept states.

        Returns the chunks, those that decode in the order of their slots.
        """
        for chunk in chunks:
            for sequence in (chunk.sequence, *chunk.forks):
                if sequence not in self._slots:
                    self._slots[sequence] = len(self._order)
                    self._order.append(sequence)
                    self._seen[sequence] = 0
            if chunk.restored is not None:
                self._copy(self._kept, chunk.restored, self.states, self._slots[chunk.sequence])
                self._seen[chunk.sequence] = self._kept_seen[chunk.restored]
        return sorted(chunks, key=lambda c: (not _decodes(c), self._slots[c.sequence]))

    def step(self, chunks: SequenceOf[Chunk]) -> StateStep:
        """The recurrent part of a step; from now on its sequences' states count as advanced.

        Raises ValueError if a chunk does not begin where its sequence's state ends.
        """
        for chunk in chunks:
            if chunk.start and self._seen[chunk.sequence] != chunk.start:
                raise ValueError(
                    f"recurrent states: {self._seen[chunk.sequence]} tokens seen, and a chunk"
                    f" begins at {chunk.start}"
                )
        for chunk in chunks:
            self._seen[chunk.sequence] = chunk.stop
            for fork in chunk.forks:
                self._seen[fork] = chunk.shared
        return StateStep(self, chunks)

    def copy(self, mixer: int, source: int, targets: Iterable[int]) -> None:
        """Copy the states of one mixer from one slot to others."""
        for target in targets:
            for tensor in self.states[mixer].values():
                tensor[target].copy_(tensor[source])

    @torch.inference_mode()
    def keep(self, copies: Iterable[StateCopy]) -> None:
        """Copy the states of sequences, as they are now, to places."""
        for copy in copies:
            self._copy(self.states, self._slots[copy.sequence], self._kept, copy.place)
            self._kept_seen[copy.place] = self._seen[copy.sequence]

    @torch.inference_mode()
    def release(self, sequences: Iterable[Sequence]) -> None:
        """Free the slots of sequences; those that have none are ignored."""
        leaving = [sequence for sequence in sequences if sequence in self._slots]
        # The last slots come free first: then nothing moves into them.
        for sequence in sorted(leaving, key=self.slot, reverse=True):
            slot, last = self._slots.pop(sequence), self._order.pop()
            del self._seen[sequence]
            if last is not sequence:
                self._copy(self.states, self._slots[last], self.states, slot)
                self._order[slot] = last
                self._slots[last] = slot

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise AssertionError if the bookkeeping disagrees, or if `idle` and a slot is used."""
        if self._slots != {sequence: slot for slot, sequence in enumerate(self._order)}:
            raise AssertionError("recurrent states: slots are lost or given twice")
        for sequence, seen in self._seen.items():
            if seen != sequence.computed:
                raise AssertionError(
                    f"recurrent states: {seen} tokens seen, {sequence.computed} computed"
                )
        if idle and self._order:
            raise AssertionError(f"recurrent states: {len(self._order)} slots are still used")

    def _copy(
        self,
        sources: SequenceOf[Mapping[StateKey, Tensor]],
        source: int,
        targets: SequenceOf[Mapping[StateKey, Tensor]],
        target: int,
    ) -> None:
        for one, other in zip(sources, targets, strict=True):
            for key, tensor in one.items():
                other[key][target].copy_(tensor[source])


class StateStep:
    """The recurrent part of a step. Its first chunks decode, in the order of their slots."""

    def __init__(self, storage: StateStorage, chunks: SequenceOf[Chunk]) -> None:
        self._storage = storage
        decoding = [storage.slot(chunk.sequence) for chunk in chunks if _decodes(chunk)]
        self._decodes = len(decoding)
        self._alone = chunks[self._decodes :]
        first = decoding[0] if decoding else 0
        self._together: slice | Tensor = slice(first, first + self._decodes)
        if decoding and decoding[-1] - first + 1 != self._decodes:
            self._together = send(torch.tensor(decoding), storage.device)

    def recur(self, mixer: int, call: MixerCall) -> Rows:
        """See `RecurrentStep.recur`."""
        if call.packed is not None and all(c.shared == c.stop for c in self._alone if c.forks):
            return self._at_once(mixer, call, call.packed)
        parts: list[Rows] = []
        states = self._storage.states[mixer]
        if self._decodes:
            own = {key: tensor[self._together] for key, tensor in states.items()}
            parts.append(call.together(0, self._decodes, StateCache(own, begins=False)))
            if isinstance(self._together, Tensor):
                for key, tensor in states.items():
                    tensor.index_copy_(0, self._together, own[key])
        first = self._decodes
        for chunk in self._alone:
            slot = self._storage.slot(chunk.sequence)
            own = {key: tensor[slot : slot + 1] for key, tensor in states.items()}
            # Forks get the state behind what they share, which may be inside the chunk.
            shared = max(chunk.start, chunk.shared) if chunk.forks else chunk.stop
            before, behind = first + shared - chunk.start, first + chunk.length
            parts += self._in_order(mixer, call, first, before, own, begins=not chunk.start)
            self._storage.copy(mixer, slot, [self._storage.slot(fork) for fork in chunk.forks])
            parts += self._in_order(mixer, call, before, behind, own, begins=not shared)
            first = behind
        return join(parts)

    def _at_once(self, mixer: int, call: MixerCall, packed: Callable[..., Rows]) -> Rows:
        """Run a mixer once for all sequences."""
        states = self._storage.states[mixer]
        parts = []
        own = {key: tensor[self._together] for key, tensor in states.items()}
        if self._decodes:
            parts.append(Part(0, self._decodes, own))
        first = self._decodes
        for chunk in self._alone:
            slot = self._storage.slot(chunk.sequence)
            one = {key: tensor[slot : slot + 1] for key, tensor in states.items()}
            parts.append(Part(first, first + chunk.length, one, begins=not chunk.start))
            first += chunk.length
        made = packed(parts, **call.others, **call.rows)
        if isinstance(self._together, Tensor):
            for key, tensor in states.items():
                tensor.index_copy_(0, self._together, own[key])
        for chunk in self._alone:
            slot = self._storage.slot(chunk.sequence)
            self._storage.copy(mixer, slot, [self._storage.slot(fork) for fork in chunk.forks])
        return made

    def _in_order(
        self,
        mixer: int,
        call: MixerCall,
        first: int,
        stop: int,
        states: Mapping[StateKey, Tensor],
        *,
        begins: bool,
    ) -> list[Rows]:
        """Run a mixer for consecutive tokens of one sequence: at once, where its code can do it."""
        at_once = begins or self._storage.mixers[mixer].continues
        length = stop - first if at_once else 1
        return [
            call.alone(at, at + length, StateCache(states, begins=begins))
            for at in range(first, stop, max(1, length))
        ]


def _decodes(chunk: Chunk) -> bool:
    """Whether a chunk is one token of a sequence that has a state, which nobody copies."""
    return chunk.length == 1 and chunk.start > 0 and not chunk.forks
