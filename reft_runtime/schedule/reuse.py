"""What a prompt's next chunk reuses, where it ends, and what is kept of it. Knows no tensors.

Before each chunk of a prompt the prefix cache is asked for the blocks that come next. A prompt
whose next block is being computed for another prompt skips the step instead of computing it, too.
It waits only for a chunk of the same step: so whenever one prompt waits another one advances, and
if that one fails, is aborted or preempted, it is not in the next step and no prompt waits for it.

Of a model with recurrent layers (`Snapshots`) blocks are reused only up to the last of them that
has a snapshot. Snapshots are taken where a chunk ends, at block boundaries where one can be found:
at the last one before a prompt's end, and where a prompt parts from blocks that are kept, because
what two prompts begin with a third one may begin with, too. Chunks are cut to end there. In between
long prompts leave some as their chunks happen to end. Where the blocks are kept and a prompt of the
same step is on its way to the missing snapshot, the others wait for that as for a block.
"""

from __future__ import annotations

from collections.abc import Iterable

from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.prefix_cache import BlockCopy, StateCopy
from reft_runtime.schedule.sequence import Sequence, Status

LEAST_GAIN = 64
"""Least tokens between snapshots. A chunk that is cut for one costs its prompt a further step, in
which the weights are read again; to compute fewer tokens than this takes hardly longer."""

SPARSE = 512
"""Least tokens between snapshots that no prompt is known to need, so that a long prompt which
comes in many small chunks does not evict those that are."""


class PrefixReuse:
    """Looks prompts up in the prefix cache, and enters what was computed of them."""

    def __init__(self, budget: BlockBudget) -> None:
        self._budget = budget
        self._cache = budget.cache
        self._snapshots = budget.snapshots

    def next_chunk(self, sequence: Sequence, prompts: Iterable[Chunk]) -> Chunk | None:
        """What is left of a prompt after what it may reuse, to be cut by `cut`.

        None if it waits in this step for one of its `prompts`, the chunks that are planned already.
        """
        chunk = Chunk(sequence, sequence.computed, sequence.remaining)
        keys = self._keys(sequence)
        if self._cache is None or not keys:
            return chunk
        first = chunk.start // BLOCK_TOKENS
        found = self._cache.find(keys[first:])
        block = first + len(found)
        if block < min(len(keys), self._budget.free) and any(
            _will_keep(other.sequence, block, keys[block]) for other in prompts
        ):
            return None
        if self._snapshots is not None:
            last = self._snapshots.find(keys[first:block])
            count, chunk.restored = last or (0, None)
            found = found[:count]
        chunk.reused = [BlockCopy(sequence, at, place) for at, place in enumerate(found, first)]
        chunk.start = max(chunk.start, (first + len(found)) * BLOCK_TOKENS)
        chunk.length = len(sequence.tokens) - chunk.start
        if self._snapshots is not None:
            missing = keys[chunk.start // BLOCK_TOKENS : block]
            if any(self._will_snapshot(other, missing) for other in prompts):
                return None
            chunk.boundary = self._boundary(chunk, block * BLOCK_TOKENS, len(keys) * BLOCK_TOKENS)
        return chunk

    def cut(self, chunk: Chunk, limit: int) -> None:
        """Let a prompt's chunk end after at most `limit` tokens, at a block boundary if it can."""
        sequence = chunk.sequence
        stop = min(chunk.stop, chunk.start + limit)
        if self._snapshots is not None:
            if sequence.unforked:
                stop = min(stop, sequence.prompt_length)  # a state cannot be copied as it was
            last = len(self._keys(sequence)) * BLOCK_TOKENS
            whole = stop // BLOCK_TOKENS * BLOCK_TOKENS
            if chunk.boundary is not None and chunk.boundary <= stop:
                stop = chunk.boundary
            elif stop < len(sequence.tokens) and chunk.start + BLOCK_TOKENS <= whole <= last:
                stop = whole
                if self._may_keep(sequence, whole, SPARSE):
                    chunk.boundary = whole
        chunk.length = stop - chunk.start

    def keep(self, sequence: Sequence) -> list[BlockCopy]:
        """Enter the computed blocks of a sequence in the prefix cache.

        Returns the copies that the caller must make. Blocks with edits are entered only once a
        token has come out of them: then they are finite. So are the snapshots taken before.
        """
        if self._cache is None:
            return []
        keys = sequence.block_keys(sequence.computed)
        base = sequence.keys.base
        if not sequence.decoding:
            keys = keys[:base]
        elif self._snapshots is not None:
            self._snapshots.publish(sequence)
        placed = self._cache.add(keys, base, self._budget.free)
        return [BlockCopy(sequence, block, place) for block, place in placed]

    def keep_state(self, sequence: Sequence) -> list[StateCopy]:
        """Take a snapshot of a sequence if it stands on a boundary where one is missing.

        Returns the copy that the caller must make, if any.
        """
        boundary = sequence.computed
        if (
            self._snapshots is None
            or not self._keys(sequence)
            or boundary % BLOCK_TOKENS
            or not self._may_keep(sequence, boundary, LEAST_GAIN)
        ):
            return []
        finite = sequence.decoding or sequence.keys.base * BLOCK_TOKENS >= boundary
        if not finite and sequence.status is not Status.RUNNING:
            return []  # no token will come out of it
        place = self._snapshots.take(sequence, finite=finite)
        return [] if place is None else [StateCopy(sequence, place)]

    def leaves(self, sequence: Sequence) -> None:
        """Note that a sequence has ended, or was preempted after its blocks were kept."""
        if self._snapshots is not None:
            if sequence.decoding:
                self._snapshots.publish(sequence)
            self._snapshots.drop(sequence)

    def _keys(self, sequence: Sequence) -> list[bytes]:
        """Keys of the blocks that a sequence may reuse, or whose snapshots others like it may."""
        tokens = sequence.reusable
        if self._snapshots is not None:
            if self._cache is None or not self._snapshots.places:
                return []
            if sequence.unforked:  # it must pass the prompt's end
                tokens = min(tokens, sequence.prompt_length - 1)
        return sequence.block_keys(tokens)

    def _boundary(self, chunk: Chunk, *planned: int) -> int | None:
        """The first of some boundaries behind a chunk's start where a snapshot is to be taken."""
        return next(
            (
                boundary
                for boundary in planned
                if boundary > chunk.start and self._may_keep(chunk.sequence, boundary, LEAST_GAIN)
            ),
            None,
        )

    def _may_keep(self, sequence: Sequence, boundary: int, apart: int) -> bool:
        """Whether a snapshot is missing at a boundary of a sequence, and will be finite one day."""
        return (
            self._snapshots is not None
            and self._snapshots.is_worth(sequence, boundary, apart)
            and (
                sequence.request.sampling.max_tokens != 0
                or sequence.keys.base * BLOCK_TOKENS >= boundary
            )
        )

    def _will_snapshot(self, chunk: Chunk, missing: list[bytes]) -> bool:
        """Whether a prompt that is being computed brings a snapshot behind one of these keys."""
        assert self._snapshots is not None
        coming = set(self._snapshots.pending(chunk.sequence))
        if chunk.boundary is not None:
            coming.add(chunk.sequence.block_keys(chunk.boundary)[-1])
        return not coming.isdisjoint(missing)


def _will_keep(sequence: Sequence, block: int, key: bytes) -> bool:
    """Whether a prompt that is being computed brings the block with this key into the cache."""
    if block >= len(sequence.tokens) // BLOCK_TOKENS:
        return False
    keys = sequence.block_keys((block + 1) * BLOCK_TOKENS)
    no_token = sequence.request.sampling.max_tokens == 0
    return keys[block] == key and not (no_token and block >= sequence.keys.base)
