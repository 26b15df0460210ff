"""The other ranks of a model that several processes compute, as rank 0's engine sees them."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from reft_runtime.errors import EngineDead
from reft_runtime.kv.choice import Places
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.prefix_cache import BlockCopy
from reft_runtime.schedule.sequence import Sequence


class Followers(Protocol):
    """Ranks that repeat what this one does: without them no forward pass comes to its end.

    Every method but `broken` sends, does not wait for an answer, and raises `EngineDead` if a rank
    has ended. What is sent is done in the order in which it was sent.
    """

    def seen_by(self, places: Places) -> Places:
        """The prefix cache's places for this rank's storage; what is read of them is sent too."""

    def step(self, chunks: SequenceOf[Chunk], rows: SequenceOf[int]) -> None:
        """Compute a packed step; `rows` are the rows whose logits are wanted."""

    def keep(self, copies: Iterable[BlockCopy]) -> None:
        """See `KVStorage.keep`."""

    def release(self, sequences: Iterable[Sequence]) -> None:
        """See `KVStorage.release`."""

    def broken(self, error: Exception) -> EngineDead:
        """Say why a step failed that was sent: no rank can go on after it."""
