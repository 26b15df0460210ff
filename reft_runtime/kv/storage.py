"""The one interface of keys and values, whatever memory they lie in."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from reft_runtime.base.attention import AttentionStep
from reft_runtime.schedule.prefix_cache import BlockCopy
from reft_runtime.schedule.scheduler import Chunk
from reft_runtime.schedule.sequence import Sequence


class KVStorage(Protocol):
    """Where the keys and values of sequences are; the budget of blocks bounds how many there are.

    `kv_rows` is for CPUs, `kv_pages` for devices.
    """

    def prepare(self, chunks: SequenceOf[Chunk]) -> list[Chunk]:
        """Make room for a step, and bring in the kept blocks that its chunks reuse.

        Gives the chunks in the order to pack their tokens in.
        """

    def attention(self, chunks: SequenceOf[Chunk]) -> AttentionStep:
        """Attention of the packed tokens of a step, as `prepare` gave its chunks."""

    def fork(self, parent: Sequence, child: Sequence, length: int) -> None:
        """Give `child`, which had room in this step, the first `length` tokens of `parent`."""

    def keep(self, copies: Iterable[BlockCopy]) -> None:
        """Let the prefix cache's places hold blocks of sequences; of several for one the last."""

    def release(self, sequences: Iterable[Sequence]) -> None:
        """Free what sequences have, of those that have anything."""

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise AssertionError if the books disagree, or if `idle` and anything is in use."""
