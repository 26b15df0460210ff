"""Keys and values beside recurrent states, for models whose layers attend, recur, or do both."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from torch import Tensor

from reft_runtime.base.attention import AttentionStep, Scoring
from reft_runtime.kv.states import StateStep, StateStorage
from reft_runtime.kv.storage import KVStorage
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.prefix_cache import BlockCopy, StateCopy
from reft_runtime.schedule.sequence import Sequence


class HybridStorage:
    """A `KVStorage` that also holds the recurrent states of its sequences.

    `kv` holds the keys and values; it keeps the order of chunks of equal length.
    """

    def __init__(self, kv: KVStorage, states: StateStorage) -> None:
        self.kv = kv
        self.states = states

    def prepare(self, chunks: SequenceOf[Chunk]) -> list[Chunk]:
        """See `KVStorage.prepare`; chunks that decode come first, in the order of their slots."""
        return self.kv.prepare(self.states.prepare(chunks))

    def attention(self, chunks: SequenceOf[Chunk]) -> HybridStep:
        """See `KVStorage.attention`; raises ValueError as `StateStorage.step`."""
        return HybridStep(self.kv.attention(chunks), self.states.step(chunks))

    def fork(self, parent: Sequence, child: Sequence, length: int) -> None:
        """See `KVStorage.fork`; the step itself has copied the states."""
        self.kv.fork(parent, child, length)

    def keep(self, copies: Iterable[BlockCopy]) -> None:
        """See `KVStorage.keep`."""
        self.kv.keep(copies)

    def keep_states(self, copies: Iterable[StateCopy]) -> None:
        """See `KVStorage.keep_states`."""
        self.states.keep(copies)

    def release(self, sequences: Iterable[Sequence]) -> None:
        """See `KVStorage.release`."""
        sequences = list(sequences)
        self.kv.release(sequences)
        self.states.release(sequences)

    def check_integrity(self, *, idle: bool = False) -> None:
        """See `KVStorage.check_integrity`."""
        self.kv.check_integrity(idle=idle)
        self.states.check_integrity(idle=idle)


class HybridStep:
    """A `RecurrentStep`, and a `RotatingStep` where its attention is one."""

    def __init__(self, attention: AttentionStep, states: StateStep) -> None:
        self.rotates: bool = getattr(attention, "rotates", False)
        self._attention = attention
        self.recur = states.recur

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        """See `AttentionStep.attend`."""
        return self._attention.attend(layer, query, key, value, scoring)

    def attend_rotated(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: tuple[Tensor, Tensor],
        scoring: Scoring,
    ) -> Tensor:
        """See `RotatingStep.attend_rotated`."""
        return self._attention.attend_rotated(layer, query, key, value, angles, scoring)  # type: ignore[attr-defined,no-any-return]
