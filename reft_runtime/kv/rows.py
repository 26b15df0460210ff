"""Keys and values on a CPU: each sequence has one contiguous row, in memory of its own.

Attention over a contiguous row costs a half to a quarter of that over gathered pages. A row has
room for more tokens than it holds, but takes memory only for those it holds, page by page (see
`machine/memory.py`): so rows and kept blocks take what the budget counts. A row that outgrows its
room moves to one of twice the size, layer by layer, and frees each layer as it goes. Nothing is
shared between rows: no sequence sees what another one's row holds, finite or not.

Blocks that the prefix cache keeps lie in a pool: rows come and go, and a block is copied out of one
row and into others. The row of a sequence that has ended is freed while its blocks are copied, and
a block that is evicted frees the memory of its place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from reft_runtime.base.attention import LayerShape
from reft_runtime.kv.row_attention import TOGETHER_FROM, RowAttentionStep
from reft_runtime.kv.slabs import BlockPool, Layout, Row
from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.prefix_cache import BlockCopy, StateCopy
from reft_runtime.schedule.sequence import Sequence, Status

MIN_CAPACITY = 128


class RowStorage:
    """The KV rows of all sequences; the budget of blocks bounds how much they hold.

    `max_tokens` is the length of the longest row, `max_blocks` the most blocks that a prefix cache
    may keep. `freed` returns the cache's places that came free since the last call.
    """

    def __init__(
        self,
        shapes: SequenceOf[LayerShape],
        dtype: torch.dtype,
        max_tokens: int,
        max_blocks: int = 0,
        freed: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.dtype = dtype
        self.max_tokens = max_tokens
        self._layout = Layout.of(shapes)
        self._pool = BlockPool(self._layout, max_blocks, dtype)
        self._freed = freed
        self._rows: dict[Sequence, Row] = {}

    @torch.inference_mode()
    def ensure(self, sequence: Sequence, tokens: int) -> None:
        """Give a sequence a row with room for `tokens` tokens.

        A row that moves takes along the sequence's `computed` tokens, and no more. Raises
        `MemoryError` if memory runs out; then nothing has changed.
        """
        old = self._rows.get(sequence)
        if old is not None and old.capacity >= tokens:
            return
        new = Row(self._layout, self._capacity(tokens), self.dtype)
        self._rows[sequence] = new
        if old is not None:
            for index in range(len(self._layout.parts)):
                new.part(index)[:, : sequence.computed] = old.part(index)[:, : sequence.computed]
                old.drop(index)

    def where(self, sequence: Sequence) -> Row:
        """Return a sequence's row, valid until the sequence is given room or released."""
        return self._rows[sequence]

    @torch.inference_mode()
    def fork(self, parent: Sequence, child: Sequence, length: int) -> None:
        """Give `child` a copy of the first `length` tokens of `parent`'s row."""
        self.ensure(child, length)
        own, source = self._rows[child], self._rows[parent]
        for index in range(len(self._layout.parts)):
            own.part(index)[:, :length] = source.part(index)[:, :length]

    @torch.inference_mode()
    def keep(self, copies: Iterable[BlockCopy]) -> None:
        """Copy blocks of rows to their places; if several are for one place, only the last one.

        Rows of sequences that do not run any more are not used after this: each part of them is
        freed when it is copied, so that a long row and its blocks do not both take memory.
        """
        runs = _runs({copy.place: copy for copy in copies}.values())
        leaving = {c.sequence for c, _ in runs if c.sequence.status is not Status.RUNNING}
        for index in range(len(self._layout.parts)):
            for copy, count in runs:
                blocks = self._blocks(index, copy, count)
                self._pool.part(index, copy.place, count).copy_(blocks)
            for sequence in leaving:
                self._rows[sequence].drop(index)

    @torch.inference_mode()
    def reuse(self, copies: Iterable[BlockCopy]) -> None:
        """Copy kept blocks to the rows of their sequences, which have room for them."""
        for copy, count in _runs(copies):
            for index in range(len(self._layout.parts)):
                blocks = self._blocks(index, copy, count)
                blocks.copy_(self._pool.part(index, copy.place, count))

    def prepare(self, chunks: SequenceOf[Chunk]) -> list[Chunk]:
        """See `KVStorage.prepare`; short chunks come first: their tokens attend one by one."""
        freed = set(self._freed())
        reused = [copy for chunk in chunks for copy in chunk.reused]
        needed = freed.intersection(copy.place for copy in reused)
        self._pool.drop(freed - needed)
        for chunk in chunks:
            # Room for the whole prompt at once: a row that grows chunk by chunk is copied often.
            for sequence in (chunk.sequence, *chunk.forks):
                self.ensure(sequence, len(sequence.tokens))
        # Only now: a row that moves takes along only what was computed before.
        self.reuse(reused)
        self._pool.drop(needed)
        return sorted(chunks, key=lambda chunk: (chunk.length >= TOGETHER_FROM, chunk.length > 1))

    def attention(self, chunks: SequenceOf[Chunk]) -> RowAttentionStep:
        """See `KVStorage.attention`."""
        return RowAttentionStep(chunks, self.where, self._layout)

    def keep_states(self, copies: Iterable[StateCopy]) -> None:
        """See `KVStorage.keep_states`: there are no states here."""
        if any(True for _ in copies):
            raise ValueError("a storage of keys and values keeps no recurrent states")

    def release(self, sequences: Iterable[Sequence]) -> None:
        """Free the rows of the sequences that have one."""
        for sequence in sequences:
            self._rows.pop(sequence, None)

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise AssertionError if a row is too small for what it holds, or if `idle` and in use."""
        for sequence, row in self._rows.items():
            if sequence.computed > row.capacity:
                raise AssertionError(f"KV rows: {sequence.computed} tokens in {row.capacity}")
        if idle and self._rows:
            raise AssertionError(f"KV rows: {len(self._rows)} sequences still have one")

    def _capacity(self, tokens: int) -> int:
        capacity = MIN_CAPACITY
        while capacity < tokens:
            capacity *= 2
        # No row needs more room than the longest sequence.
        return max(min(capacity, self.max_tokens), tokens)

    def _blocks(self, index: int, copy: BlockCopy, count: int) -> Tensor:
        """`count` blocks of one part of a row, from `copy.block` on, as a view.

        Its shape is [count, heads, BLOCK_TOKENS, dim].
        """
        part = self._rows[copy.sequence].part(index)
        tokens = part.narrow(1, copy.block * BLOCK_TOKENS, count * BLOCK_TOKENS)
        return tokens.view(len(tokens), count, BLOCK_TOKENS, part.shape[2]).transpose(0, 1)


def _runs(copies: Iterable[BlockCopy]) -> list[tuple[BlockCopy, int]]:
    """Runs of consecutive blocks and places of one sequence: first copy and length of each."""
    runs: list[tuple[BlockCopy, int]] = []
    for copy in copies:
        if runs:
            first, count = runs[-1]
            if copy == BlockCopy(first.sequence, first.block + count, first.place + count):
                runs[-1] = first, count + 1
                continue
        runs.append((copy, 1))
    return runs
