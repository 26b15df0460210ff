"""The one interface of keys and values, whatever memory they lie in."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from reft_runtime.base.attention import AttentionStep
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.prefix_cache import BlockCopy, StateCopy
from reft_runtime.schedule.sequence import Sequence


class KVStorage(Protocol):
    """Where the keys and values of sequences are; the budget of blocks bounds how many there are.

    `RowStorage` is for CPUs, `PageStorage` for devices.
    """

    def prepare(self, chunks: SequenceOf[Chunk]) -> list[Chunk]:
        """Make room for a step, and bring in the kept blocks and states that its chunks reuse.

        Returns the chunks in the order in which their tokens are to be packed.
        """

    def attention(self, chunks: SequenceOf[Chunk]) -> AttentionStep:
        """Return the attention of a step, whose chunks are in the order of `prepare`."""

    def fork(self, parent: Sequence, child: Sequence, length: int) -> None:
        """Give `child`, for which this step made room, the first `length` tokens of `parent`."""

    def keep(self, copies: Iterable[BlockCopy]) -> None:
        """Let the prefix cache's places hold blocks of sequences; a place holds the last given."""

    def keep_states(self, copies: Iterable[StateCopy]) -> None:
        """Copy the recurrent states of sequences, as they are now, to places; see `StateCopy`.

        A storage without states is given none.
        """

    def release(self, sequences: Iterable[Sequence]) -> None:
        """Free the keys and values of sequences; those that have none are ignored."""

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise AssertionError if the bookkeeping disagrees, or if `idle` and anything is used."""
