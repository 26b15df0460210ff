"""Keys and values on a device: pages of one block each, held by reference.

A sequence has a list of pages; a page may stand in many lists. So a prefix hit, a kept block and
a further choice of a request cost one number and no copy. Only whole blocks are shared, and a whole
block is never written again; a fork gets a copy of a block that is not yet whole.

The lists also lie on the device, each in a lane of one table, and only changes are sent there. The
first page and the last lane belong to nobody: rows that only pad a batch use them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from itertools import chain

import torch
from torch import Tensor

from reft_runtime.base.attention import LayerShape
from reft_runtime.kernels.staging import to_device
from reft_runtime.kv.page_attention import (
    PageAttentionStep,
    PageBatch,
    PageKernel,
    RowInPages,
)
from reft_runtime.schedule.blocks import BLOCK_TOKENS, blocks_for
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.prefix_cache import BlockCopy, StateCopy
from reft_runtime.schedule.sequence import Sequence

NOBODYS_PAGE = 0


class PageStorage:
    """Pages for `blocks` blocks: for every layer keys and values [pages, BLOCK_TOKENS, heads, dim].

    Layers may share them, and values may be the first numbers of keys; see `LayerShape`.

    At most `max_rows` sequences of `max_tokens` tokens have pages at once. The budget of blocks
    bounds what they and the prefix cache hold together. `vacant` returns the cache's places that
    hold no kept block; their pages are taken back when pages run short.
    """

    def __init__(
        self,
        shapes: SequenceOf[LayerShape],
        dtype: torch.dtype,
        device: torch.device,
        blocks: int,
        max_rows: int,
        max_tokens: int,
        kernel: PageKernel,
        vacant: Callable[[], Iterable[int]] = tuple,
    ) -> None:
        self.kernel = kernel
        self.spare_lane = max_rows
        self.tables = torch.full(
            (max_rows + 1, blocks_for(max_tokens)), NOBODYS_PAGE, dtype=torch.long, device=device
        )
        pages = 1 + blocks

        def pool(heads: int, dim: int) -> Tensor:
            return torch.zeros(pages, BLOCK_TOKENS, heads, dim, dtype=dtype, device=device)

        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._pools: list[Tensor] = []
        for shape in shapes:
            if shape.source is not None:
                self.keys.append(self.keys[shape.source])
                self.values.append(self.values[shape.source])
                continue
            own = [pool(shape.kv_heads, shape.key_dim)]
            if not shape.values_in_keys:
                own.append(pool(shape.kv_heads, shape.value_dim))
            self.keys.append(own[0])
            self.values.append(own[-1][..., : shape.value_dim])
            self._pools += own
        self._vacant = vacant
        self._users = [1] + [0] * blocks
        self._free = list(range(blocks, 0, -1))
        self._lists: dict[Sequence, list[int]] = {}
        self._lanes: dict[Sequence, int] = {}
        self._free_lanes = list(range(max_rows))[::-1]
        self._changes: dict[tuple[int, int], int] = {}  # page by lane and column
        self._kept: dict[int, int] = {}  # page by the cache's place

    def prepare(self, chunks: SequenceOf[Chunk]) -> list[Chunk]:
        """See `KVStorage.prepare`; decoding chunks come first."""
        # Reused blocks come first: once they are in a sequence's list, their pages stay in use.
        for chunk in chunks:
            self.reuse(chunk.reused)
        for chunk in chunks:
            self._ensure(chunk.sequence, chunk.stop)
            for fork in chunk.forks:
                self._ensure(fork, chunk.shared)
        self._send_changes()
        return sorted(chunks, key=lambda chunk: chunk.length > 1)

    def attention(self, chunks: SequenceOf[Chunk]) -> PageAttentionStep:
        """See `KVStorage.attention`."""
        batch = PageBatch.of([self.row(c) for c in chunks], self.tables, self.kernel.query_block)
        return PageAttentionStep(self.keys, self.values, batch, self.kernel)

    def row(self, chunk: Chunk) -> RowInPages:
        """The addresses and the lane of a chunk's tokens."""
        pages, lane = self._lists[chunk.sequence], self._lanes[chunk.sequence]
        return RowInPages.of(pages, chunk.start, chunk.stop, lane)

    def address(self, chunk: Chunk) -> tuple[int, int]:
        """Address and lane (see `RowInPages`) of a chunk of one token."""
        page = self._lists[chunk.sequence][chunk.start // BLOCK_TOKENS]
        address = page * BLOCK_TOKENS + chunk.start % BLOCK_TOKENS
        return address, self._lanes[chunk.sequence]

    def fork(self, parent: Sequence, child: Sequence, length: int) -> None:
        """See `KVStorage.fork`."""
        whole, rest = divmod(length, BLOCK_TOKENS)
        pages, own = self._lists[parent], self._lists[child]
        for column in range(whole):
            self._put(child, column, self._share(pages[column]))
        if rest:
            for tensor in self._pools:
                tensor[own[whole], :rest] = tensor[pages[whole], :rest]

    def keep(self, copies: Iterable[BlockCopy]) -> None:
        """See `KVStorage.keep`."""
        for copy in copies:
            page = self._share(self._lists[copy.sequence][copy.block])
            self._let_go(copy.place)
            self._kept[copy.place] = page

    def reuse(self, copies: Iterable[BlockCopy]) -> None:
        """Put kept blocks in the lists of sequences, in order; replaced pages are given back."""
        for copy in copies:
            self._put(copy.sequence, copy.block, self._share(self._kept[copy.place]))

    def keep_states(self, copies: Iterable[StateCopy]) -> None:
        """See `KVStorage.keep_states`: there are no states here."""
        if any(True for _ in copies):
            raise ValueError("a storage of keys and values keeps no recurrent states")

    def release(self, sequences: Iterable[Sequence]) -> None:
        """See `KVStorage.release`."""
        for sequence in sequences:
            if sequence in self._lists:
                self._free_lanes.append(self._lanes.pop(sequence))
                for page in reversed(self._lists.pop(sequence)):
                    self._give_back(page)

    def check_integrity(self, *, idle: bool = False) -> None:
        """See `KVStorage.check_integrity`."""
        users = [0] * len(self._users)
        users[NOBODYS_PAGE] = 1
        for page in (*self._kept.values(), *chain.from_iterable(self._lists.values())):
            users[page] += 1
        if users != self._users or sorted(self._free) != [p for p, n in enumerate(users) if not n]:
            raise AssertionError("KV pages: users were miscounted, or pages lost")
        lanes = sorted([*self._free_lanes, *self._lanes.values()])
        if lanes != list(range(self.spare_lane)) or self._lanes.keys() != self._lists.keys():
            raise AssertionError("KV pages: lanes are lost or given twice")
        if idle and self._lists:
            raise AssertionError(f"KV pages: {len(self._lists)} sequences still have some")

    def _ensure(self, sequence: Sequence, tokens: int) -> None:
        """Give a sequence pages for `tokens` tokens."""
        for column in range(len(self._lists.get(sequence, ())), blocks_for(tokens)):
            self._put(sequence, column, self._take())

    def _put(self, sequence: Sequence, column: int, page: int) -> None:
        """Put a page in a sequence's list, at its end or instead of another page."""
        if sequence not in self._lists:
            self._lists[sequence] = []
            self._lanes[sequence] = self._free_lanes.pop()
        pages = self._lists[sequence]
        if column < len(pages):
            self._give_back(pages[column])
            pages[column] = page
        else:
            pages.append(page)
        self._changes[self._lanes[sequence], column] = page

    def _send_changes(self) -> None:
        if self._changes:
            lanes, columns = zip(*self._changes, strict=True)
            sent = to_device((lanes, columns, [*self._changes.values()]), self.tables.device)
            self.tables[sent[0], sent[1]] = sent[2]
            self._changes.clear()

    def _take(self) -> int:
        if not self._free:
            for place in self._vacant():
                self._let_go(place)
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _share(self, page: int) -> int:
        self._users[page] += 1
        return page

    def _give_back(self, page: int) -> None:
        self._users[page] -= 1
        if not self._users[page]:
            self._free.append(page)

    def _let_go(self, place: int) -> None:
        page = self._kept.pop(place, None)
        if page is not None:
            self._give_back(page)
