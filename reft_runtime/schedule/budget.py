"""The KV budget in blocks.

It is logical: it decides who is admitted and who is preempted. Where the tensors lie is the
storage's business (`kv/`).
"""

from __future__ import annotations

from dataclasses import replace

from reft_runtime.schedule.blocks import BLOCK_TOKENS, blocks_for
from reft_runtime.schedule.prefix_cache import PrefixCache
from reft_runtime.schedule.sequence import Sequence
from reft_runtime.schedule.snapshots import Snapshots
from reft_runtime.stats import PrefixCacheStats


class BlockBudget:
    """Counts the blocks that each sequence holds, out of a fixed total.

    Blocks that no sequence holds are for the prefix `cache`, if there is one, until a sequence
    needs them. A model with recurrent layers has `snapshots` beside it, which take no blocks.
    """

    def __init__(
        self,
        total_tokens: int,
        cache: PrefixCache | None = None,
        snapshots: Snapshots | None = None,
    ) -> None:
        self.total = total_tokens // BLOCK_TOKENS
        self.cache = cache
        self.snapshots = snapshots
        self._held: dict[Sequence, int] = {}
        self._used = 0

    @property
    def used(self) -> int:
        """Blocks held by all sequences."""
        return self._used

    @property
    def free(self) -> int:
        """Blocks that no sequence holds."""
        return self.total - self._used

    def held(self, sequence: Sequence) -> int:
        """Blocks held by one sequence."""
        return self._held.get(sequence, 0)

    def reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Let `sequence` hold blocks for `tokens` tokens in all; False if there are too few."""
        held = self._held.get(sequence, 0)
        more = blocks_for(tokens) - held
        if more <= 0:
            return True
        if more > self.free:
            return False
        self._held[sequence] = held + more
        self._used += more
        if self.cache is not None:
            self.cache.shrink(self.free)
        return True

    def has_room(self, sequence: Sequence, tokens: int) -> bool:
        """Whether `sequence` could hold blocks for `tokens` tokens in all."""
        return blocks_for(tokens) - self._held.get(sequence, 0) <= self.free

    def release(self, sequence: Sequence) -> None:
        """Take back every block of `sequence`; nothing happens if it holds none."""
        self._used -= self._held.pop(sequence, 0)

    def reuse_stats(self) -> PrefixCacheStats | None:
        """A snapshot of the prefix cache's counters; None if there is no cache."""
        if self.cache is None:
            return None
        snapshots = None if self.snapshots is None else self.snapshots.stats()
        return replace(self.cache.stats(), snapshots=snapshots)

    def check_integrity(self) -> None:
        """Raise AssertionError unless what is held adds up to what is used."""
        held = sum(self._held.values())
        if held != self._used or not 0 <= self._used <= self.total:
            raise AssertionError(f"KV budget: {held} held, {self._used} used, {self.total} in all")
        if self.cache is not None:
            self.cache.check_integrity(self.free)
        if self.snapshots is not None:
            self.snapshots.check_integrity(self._held)
