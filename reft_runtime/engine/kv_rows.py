"""Keys and values on a CPU: one contiguous row a sequence, rows of like capacity in one slab.

A contiguous row is 2 to 4 times cheaper to attend than gathered pages. Slabs are kept dense (the
last row moves into a freed place), so that a decode step attends a slice and copies nothing, and
grouped by capacity, so that a short row does not pay for a long one. A row that outgrows its slab
moves to the next, with twice the capacity.

A row's unused rest is attended under a mask, and 0 x NaN is NaN: what a row leaves behind must be
finite. It is where a token came out of it; any other row (failed, or left before its prompt was
whole) is wiped where it stood.

Blocks that the prefix cache keeps lie in a pool of their own: rows come and go, and a block is
copied out of a row and into others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from reft_runtime.engine.attention import LayerShape
from reft_runtime.engine.blocks import BLOCK_TOKENS
from reft_runtime.engine.prefix_cache import BlockCopy
from reft_runtime.engine.row_attention import RowAttentionStep
from reft_runtime.engine.scheduler import Chunk
from reft_runtime.engine.sequence import Sequence

MIN_CAPACITY = 128
MIN_ROWS = 4


class Slab:
    """Rows of one capacity: for every layer keys and values [rows, kv_heads, capacity, dim]."""

    def __init__(self, shapes: SequenceOf[LayerShape], capacity: int, dtype: torch.dtype) -> None:
        self.capacity = capacity
        self.rows: list[Sequence] = []
        self.keys: list[Tensor] = [
            torch.zeros(0, s.kv_heads, capacity, s.key_dim, dtype=dtype) for s in shapes
        ]
        self.values: list[Tensor] = [
            torch.zeros(0, s.kv_heads, capacity, s.value_dim, dtype=dtype) for s in shapes
        ]

    def resize(self, rows: int) -> None:
        """Make place for `rows` rows, keeping what is computed of those in use."""
        computed = [sequence.computed for sequence in self.rows]
        used = max((slot + 1 for slot, length in enumerate(computed) if length), default=0)
        length = max(computed, default=0)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                # Zeros, because a masked entry that is not finite would still spoil a softmax sum.
                tensors[layer] = new = old.new_zeros(rows, *old.shape[1:])
                new[:used, :, :length] = old[:used, :, :length]

    def copy(self, source: Slab, source_slot: int, slot: int, length: int) -> None:
        """Copy the first `length` tokens of a row of `source` (may be this slab) to `slot`."""
        for into, out_of in ((self.keys, source.keys), (self.values, source.values)):
            for new, old in zip(into, out_of, strict=True):
                new[slot, :, :length] = old[source_slot, :, :length]

    def wipe(self, slot: int) -> None:
        """Zero a row."""
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()


class BlockPool:
    """Kept blocks: for every layer keys and values [blocks, kv_heads, BLOCK_TOKENS, dim]."""

    def __init__(self, shapes: SequenceOf[LayerShape], blocks: int, dtype: torch.dtype) -> None:
        # Uninitialised: the system gives memory page by page, as blocks are first written.
        self.keys = [
            torch.empty(blocks, s.kv_heads, BLOCK_TOKENS, s.key_dim, dtype=dtype) for s in shapes
        ]
        self.values = [
            torch.empty(blocks, s.kv_heads, BLOCK_TOKENS, s.value_dim, dtype=dtype) for s in shapes
        ]


class RowStorage:
    """Places the rows of all sequences; the budget of blocks bounds how many there are.

    `max_tokens` is the longest row, `max_blocks` the most that a prefix cache may keep.
    """

    def __init__(
        self,
        shapes: SequenceOf[LayerShape],
        dtype: torch.dtype,
        max_tokens: int,
        max_blocks: int = 0,
    ) -> None:
        self.shapes = tuple(shapes)
        self.dtype = dtype
        self.max_tokens = max_tokens
        self._pool = BlockPool(shapes, max_blocks, dtype)
        self._slabs: dict[int, Slab] = {}
        self._places: dict[Sequence, tuple[Slab, int]] = {}

    def ensure(self, sequence: Sequence, tokens: int) -> None:
        """Give a sequence a row with room for `tokens` tokens; this may move other rows too.

        What is `computed` of a row moves with it, and no more.
        """
        found = self._places.get(sequence)
        if found is not None and found[0].capacity >= tokens:
            return
        slab = self._slab(tokens)
        slot = self._append(slab, sequence)
        self._places[sequence] = slab, slot
        if found is not None:
            slab.copy(found[0], found[1], slot, sequence.computed)
            self._vacate(*found, sequence)

    def where(self, sequence: Sequence) -> tuple[Slab, int]:
        """Slab and slot of a sequence's row, until rows are next given or freed."""
        return self._places[sequence]

    def fork(self, parent: Sequence, child: Sequence, length: int) -> None:
        """Give `child` a copy of the first `length` tokens of `parent`'s row."""
        self.ensure(child, length)
        slab, slot = self._places[child]
        source, source_slot = self._places[parent]
        slab.copy(source, source_slot, slot, length)

    @torch.inference_mode()
    def keep(self, copies: Iterable[BlockCopy]) -> None:
        """Copy blocks of rows to their slots; of several for one slot the last one."""
        latest = {copy.slot: copy for copy in copies}
        for row, kept in self._tensors(latest.values()):
            kept.copy_(row)

    @torch.inference_mode()
    def reuse(self, copies: Iterable[BlockCopy]) -> None:
        """Copy kept blocks to the rows of their sequences, which have room for them."""
        for row, kept in self._tensors(copies):
            row.copy_(kept)

    def _tensors(self, copies: Iterable[BlockCopy]) -> Iterator[tuple[Tensor, Tensor]]:
        """By layer, and by run of blocks: where they are in a row, and in the pool.

        Both are views [blocks, kv_heads, BLOCK_TOKENS, dim]. Blocks of one sequence that follow
        each other, in slots that do, are copied at once.
        """
        for copy, count in _runs(copies):
            slab, row = self._places[copy.sequence]
            for own, pool in zip(
                (*slab.keys, *slab.values), (*self._pool.keys, *self._pool.values), strict=True
            ):
                tokens = own[row].narrow(1, copy.block * BLOCK_TOKENS, count * BLOCK_TOKENS)
                blocks = tokens.view(len(tokens), count, BLOCK_TOKENS, -1).transpose(0, 1)
                yield blocks, pool.narrow(0, copy.slot, count)

    def prepare(self, chunks: SequenceOf[Chunk]) -> list[Chunk]:
        """See `KVStorage.prepare`; decoding chunks come first, by slab and slot.

        So their queries meet a slice of the slab.
        """
        for chunk in chunks:
            # Room for the whole prompt at once: a row that grows chunk by chunk is copied often.
            for sequence in (chunk.sequence, *chunk.forks):
                self.ensure(sequence, len(sequence.tokens))
        # Only now: a row that moves takes along what was computed before alone.
        self.reuse(copy for chunk in chunks for copy in chunk.reused)

        def place(chunk: Chunk) -> tuple[bool, int, int]:
            slab, slot = self._places[chunk.sequence]
            return chunk.length > 1, slab.capacity, slot

        return sorted(chunks, key=place)

    def attention(self, chunks: SequenceOf[Chunk]) -> RowAttentionStep:
        """See `KVStorage.attention`."""
        return RowAttentionStep(chunks, self.where)

    @torch.inference_mode()
    def release(self, sequences: Iterable[Sequence]) -> None:
        """Free the rows of sequences, of those that have one."""
        placed = [sequence for sequence in sequences if sequence in self._places]
        # Later slots first: a dense slab then has no hole to fill when many end together.
        for sequence in sorted(placed, key=lambda s: -self._places[s][1]):
            self._vacate(*self._places.pop(sequence), sequence)

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise AssertionError if places and slabs disagree, or if `idle` and a row is in use."""
        placed = sum(len(slab.rows) for slab in self._slabs.values())
        for sequence, (slab, slot) in self._places.items():
            if slab.rows[slot] is not sequence:
                raise AssertionError("KV rows: a sequence is not where it was placed")
        if placed != len(self._places) or (idle and placed):
            raise AssertionError(f"KV rows: {placed} in slabs, {len(self._places)} placed")

    def _slab(self, tokens: int) -> Slab:
        capacity = MIN_CAPACITY
        while capacity < tokens:
            capacity *= 2
        # The longest class is cut to what a row can be at most.
        capacity = max(min(capacity, self.max_tokens), tokens)
        if capacity not in self._slabs:
            self._slabs[capacity] = Slab(self.shapes, capacity, self.dtype)
        return self._slabs[capacity]

    def _append(self, slab: Slab, sequence: Sequence) -> int:
        allocated = slab.keys[0].shape[0]
        if len(slab.rows) == allocated:
            # Memory of classes that nobody uses any more goes before new memory comes.
            for capacity in [c for c, s in self._slabs.items() if not s.rows and s is not slab]:
                del self._slabs[capacity]
            slab.resize(max(MIN_ROWS, 2 * allocated))
        slab.rows.append(sequence)
        return len(slab.rows) - 1

    def _vacate(self, slab: Slab, slot: int, leaving: Sequence) -> None:
        if not leaving.decoding:
            slab.wipe(slot)
        last = slab.rows.pop()
        end = len(slab.rows)
        if slot == end:
            return
        slab.copy(slab, end, slot, last.computed)
        if not last.decoding:
            slab.wipe(end)
        slab.rows[slot] = last
        self._places[last] = slab, slot


def _runs(copies: Iterable[BlockCopy]) -> list[tuple[BlockCopy, int]]:
    """Consecutive blocks and slots of one sequence: the first of them, and how many."""
    runs: list[tuple[BlockCopy, int]] = []
    for copy in copies:
        if runs:
            first, count = runs[-1]
            if copy == BlockCopy(first.sequence, first.block + count, first.slot + count):
                runs[-1] = first, count + 1
                continue
        runs.append((copy, 1))
    return runs
