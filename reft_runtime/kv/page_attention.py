"""Attention of one packed step over pages of keys and values."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from reft_runtime.base.attention import Scoring, attend_causally
from reft_runtime.kernels.staging import to_device
from reft_runtime.schedule.blocks import BLOCK_TOKENS, blocks_for


# Not frozen: there is one for every token, and a frozen one takes five times as long to make.
@dataclass(slots=True)
class RowInPages:
    """Consecutive tokens of one sequence from offset `start` on, and the addresses of their keys.

    An address is page * BLOCK_TOKENS + the offset in the page. `lane` is the index of the
    sequence's pages in the table of all sequences' pages.
    """

    start: int
    addresses: SequenceOf[int]
    lane: int

    @classmethod
    def of(cls, pages: SequenceOf[int], start: int, stop: int, lane: int) -> RowInPages:
        """Tokens [start, stop) of the sequence that has these pages."""
        addresses = [
            pages[offset // BLOCK_TOKENS] * BLOCK_TOKENS + offset % BLOCK_TOKENS
            for offset in range(start, stop)
        ]
        return cls(start, addresses, lane)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.addresses)

    @property
    def stop(self) -> int:
        """Number of tokens that the last one attends to."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class PageBatch:
    """The `RowInPages` of a step as a kernel needs them: int64 tensors on the device.

    The first `decodes` rows have one token each. `addresses` [T] are those of each packed token's
    key and value, `firsts` [rows + 1] the first packed token of each row, `stops` [rows] how many
    tokens its last one attends to, and `tables[lanes]` [rows, pages] are its pages. `blocks` [n, 2]
    are pieces of the rows that do not decode: the row, and the first token of the piece in it.
    """

    decodes: int
    addresses: Tensor
    firsts: Tensor
    stops: Tensor
    lanes: Tensor
    blocks: Tensor
    tables: Tensor

    @classmethod
    def of(cls, rows: SequenceOf[RowInPages], tables: Tensor, query_block: int) -> PageBatch:
        """The rows in packed order, in pieces of `query_block` tokens."""
        decodes = sum(row.length == 1 for row in rows)
        blocks = [
            number
            for index, row in enumerate(rows[decodes:], decodes)
            for begin in range(0, row.length, query_block)
            for number in (index, begin)
        ]
        addresses, firsts, stops, lanes, pieces = to_device(
            (
                [address for row in rows for address in row.addresses],
                [0, *accumulate(row.length for row in rows)],
                [row.stop for row in rows],
                [row.lane for row in rows],
                blocks,
            ),
            tables.device,
        )
        return cls(decodes, addresses, firsts, stops, lanes, pieces.view(-1, 2), tables)


class PageKernel(Protocol):
    """Attention over pages."""

    query_block: int
    """Tokens of a piece in `PageBatch.blocks`."""

    def store(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        addresses: Tensor,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Put a step's keys and values [T, kv_heads, dim] at their `addresses` in a layer's pages.

        With `angles`, cosines and sines [T, dim], the stored keys and, in place, the queries are
        first rotated as by `Operators.rotate_`. The given `key` itself may stay unrotated.
        """

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: PageBatch,
        scoring: Scoring,
    ) -> Tensor:
        """Attend with queries [T, heads, dim]; returns [T, heads, dim of the values].

        `keys` and `values` of a layer are [pages, BLOCK_TOKENS, kv_heads, dim]; the step's own are
        stored there already.
        """


@dataclass(frozen=True, slots=True)
class PageAttentionStep:
    """One step's attention over all layers' pages."""

    keys: SequenceOf[Tensor]
    values: SequenceOf[Tensor]
    batch: PageBatch
    kernel: PageKernel

    rotates: ClassVar[bool] = True
    """See `RotatingStep`."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """See `AttentionStep.attend`."""
        return self.attend_rotated(layer, query, key, value, None, scoring)

    def attend_rotated(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        scoring: Scoring,
    ) -> Tensor:
        """See `RotatingStep.attend_rotated`; without angles nothing is rotated."""
        keys, values = self.keys[layer], self.values[layer]
        self.kernel.store(query, key, value, keys, values, self.batch.addresses, angles)
        return self.kernel(query.to(keys.dtype), keys, values, self.batch, scoring)


class GatheredAttention:
    """The reference `PageKernel`: it gathers the pages of each row, and uses torch's operators."""

    query_block = BLOCK_TOKENS

    def store(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        addresses: Tensor,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """See `PageKernel`."""
        if angles is not None:
            query.copy_(_rotated(query, angles))
            key = _rotated(key, angles)
        for pool, own in ((keys, key), (values, value)):
            pool.flatten(0, 1).index_copy_(0, addresses, own.to(pool.dtype))

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: PageBatch,
        scoring: Scoring,
    ) -> Tensor:
        """See `PageKernel`."""
        out = query.new_empty(*query.shape[:-1], values.shape[-1])
        stops, lanes = batch.stops.tolist(), batch.lanes.tolist()
        for (first, end), stop, lane in zip(
            pairwise(batch.firsts.tolist()), stops, lanes, strict=True
        ):
            pages = batch.tables[lane, : blocks_for(stop)]
            row_keys, row_values = (t[pages].flatten(0, 1)[:stop] for t in (keys, values))
            out[first:end] = attend_causally(query[first:end], row_keys, row_values, scoring)
        return out


def _rotated(heads: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (each.reshape(-1, 1, heads.shape[2]) for each in angles)
    low, high = heads.chunk(2, -1)
    return heads * cos + torch.cat([-high, low], -1) * sin
