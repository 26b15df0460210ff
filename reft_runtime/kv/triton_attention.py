"""Attention over pages by Triton kernels: FlashAttention-2's online softmax (arXiv 2307.08691).

The query heads that share a head of keys are rows of one product, so that keys and values are read
once for all of them. Few decoding rows would leave most of the device idle: their keys are split
among programs, and a second kernel puts the parts together (flash decoding).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from reft_runtime.base.attention import Scoring
from reft_runtime.kernels.cuda import attention_kernels as kernels
from reft_runtime.kernels.cuda.products import LEAST, early
from reft_runtime.kv.page_attention import PageBatch
from reft_runtime.schedule.blocks import BLOCK_TOKENS

H100_BYTES = 232448
"""Shared memory that a program may take on an H100."""

TURING_BYTES = 64 << 10
"""The same on devices before Ampere. There float32 sums of 16-bit products pass through it, too."""

WORKING_BYTES = 2048
"""What a program takes at most beside its operands, for sums over warps."""

TENSOR_ROWS = 64
"""From this many rows on, products of 16 bits read both operands from shared memory (Hopper)."""


class Tile(NamedTuple):
    """The work of a program: `rows` (queries times heads) attend to `keys` keys at once."""

    rows: int
    keys: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int, dim: int, group: int, *, sums: bool = False) -> int:
        """Shared memory that a program takes at most, by what Triton's compiler reports.

        It holds its queries, a block of keys and values and, where a product reads them from there,
        the weights or the next block; or, with `sums`, those of a product. All `group` heads that
        share keys are rows of one program.
        """
        lanes: int = triton.next_power_of_2(group)
        rows, width = max(self.rows, lanes), _width(dim)
        block = 2 * self.keys * width
        more = block if itemsize == 2 and rows >= TENSOR_ROWS else rows * self.keys
        if itemsize == 2 and sums:
            more = max(more, 2 * rows * width)
        return (rows * width + block + more) * itemsize + WORKING_BYTES


_WIDE = Tile(64, 32, 4, 2)
_SMALL = Tile(32, 32, 4, 2), Tile(32, 16, 4, 2), Tile(LEAST, 16, 4, 1)


class Tiles(NamedTuple):
    """The tiles for sequences that decode, and for prompts. Those first asked for are measured on
    an H100; the others are for devices with less shared memory.
    """

    decode: Tile
    prompt: Tile

    @classmethod
    def of(
        cls, dtype: torch.dtype, dim: int, group: int = 1, shared_bytes: int = H100_BYTES
    ) -> Tiles | None:
        """The tiles for heads `dim` wide that fit a program's shared memory; None if none do.

        At most `group` query heads share a key head.
        """
        decode, prompt = [Tile(LEAST, 32, 4, 2), *_SMALL[-1:]], [_WIDE, *_SMALL]
        if dtype.itemsize == 2 and dim <= 128:
            decode.insert(0, Tile(LEAST, 64, 2, 2))
            prompt = [Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), *prompt]

        def fitting(tiles: list[Tile]) -> Tile | None:
            sums = shared_bytes <= TURING_BYTES
            need = ((t, t.shared_bytes(dtype.itemsize, dim, group, sums=sums)) for t in tiles)
            return next((tile for tile, size in need if size <= shared_bytes), None)

        first, second = fitting(decode), fitting(prompt)
        return None if first is None or second is None else cls(first, second)


WIDEST = 256
"""Largest width of a head: tiles of wider ones may not fit a processor's memory."""

PROGRAMS_PER_PROCESSOR = 4
MAX_SPLITS = 32


class TritonAttention:
    """A `PageKernel` for layers in which at most `group` query heads share a key head."""

    def __init__(self, group: int, processors: int, tiles: Tiles) -> None:
        self._tiles = tiles
        self._processors = processors
        self.query_block = max(1, tiles.prompt.rows // triton.next_power_of_2(group))

    def splits(self, rows: int, kv_heads: int) -> int:
        """Number of parts in which the keys of a decoding sequence are read.

        It does not depend on the context's length, so that a captured graph can be replayed for
        every step of as many rows.
        """
        wanted = PROGRAMS_PER_PROCESSOR * self._processors // max(1, rows * kv_heads)
        splits: int = max(1, min(MAX_SPLITS, triton.next_power_of_2(wanted + 1) // 2))
        return splits

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
        key, value = _packed(key), _packed(value)
        cos, sin = angles or (key, key)
        kv_heads, key_dim, value_dim = key.shape[1], key.shape[2], value.shape[2]
        group = query.shape[1] // kv_heads
        kernels.store[(len(key), kv_heads)](
            query,
            key,
            value,
            cos,
            sin,
            keys,
            values,
            addresses,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            KV_HEADS=kv_heads,
            GROUP=group,
            LANES=triton.next_power_of_2(group),
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            VALUE_ROW=values.stride(2),
            HALF_WIDTH=triton.next_power_of_2(max(1, key_dim // 2)),
            KEY_WIDTH=_width(key_dim),
            VALUE_WIDTH=_width(value_dim),
            ROTATE=angles is not None,
            num_warps=2,
            **early(),
        )

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
        query = _packed(query)
        step = _Step(query, keys, values, out, batch, scoring)
        if batch.decodes:
            splits = self.splits(batch.decodes, keys.shape[2])
            _launch(step, self._tiles.decode, tokens=1, splits=splits)
        if len(batch.blocks):
            _launch(step, self._tiles.prompt, tokens=self.query_block, splits=None)
        return out


class _Step(NamedTuple):
    """Arguments of `PageKernel`, and where the result goes."""

    query: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor
    batch: PageBatch
    scoring: Scoring


def _launch(step: _Step, tile: Tile, *, tokens: int, splits: int | None) -> None:
    """Attend for the decoding rows, in `splits` parts, or (None) for the pieces of prompts."""
    query, keys, values, out, batch, scoring = step
    decodes = splits is not None
    parts_of_a_row = splits or 1
    count = batch.decodes if decodes else len(batch.blocks)
    heads, kv_heads = query.shape[1], keys.shape[2]
    key_dim, value_dim = keys.shape[3], values.shape[3]
    parts = sums = out
    if parts_of_a_row > 1:
        shape = count, heads, parts_of_a_row
        parts = torch.empty((*shape, value_dim), dtype=torch.float32, device=out.device)
        sums = parts.new_empty(*shape, 2)
    group = heads // kv_heads
    scale, cap = scoring.scale(key_dim), math.log2(math.e)
    if scoring.softcap is None:
        scale *= cap
    else:
        scale /= scoring.softcap
        cap *= scoring.softcap
    sinks = scoring.sinks
    lanes = triton.next_power_of_2(group)
    kernels.attend[(kv_heads, count, parts_of_a_row)](
        query,
        keys,
        values,
        out,
        parts,
        sums,
        batch.firsts if decodes else batch.blocks,
        batch.firsts,
        batch.stops,
        batch.lanes,
        batch.tables,
        query if sinks is None else sinks,
        scale,
        cap,
        query.stride(0),
        batch.tables.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        LANES=lanes,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        VALUE_ROW=values.stride(2),
        KEY_WIDTH=_width(key_dim),
        VALUE_WIDTH=_width(value_dim),
        TOKENS=max(tokens, -(-LEAST // lanes)),
        KEYS=tile.keys,
        PAGE=BLOCK_TOKENS,
        SPLITS=parts_of_a_row,
        WINDOW=scoring.window or 0,
        CHUNK=scoring.chunk or 0,
        CAPPED=scoring.softcap is not None,
        SINKS=sinks is not None,
        DECODES=decodes,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **early(),
    )
    if parts_of_a_row > 1:
        kernels.combine[(count, heads)](
            parts,
            sums,
            out,
            HEADS=heads,
            SPLITS=parts_of_a_row,
            DIM=value_dim,
            WIDTH=_width(value_dim),
            **early(),
        )


def _packed(heads: Tensor) -> Tensor:
    """[T, heads, dim] with the heads of each token side by side; tokens may lie apart."""
    _, count, dim = heads.shape
    _, between, within = heads.stride()
    return heads if within == 1 and (between == dim or count == 1) else heads.contiguous()


def _width(dim: int) -> int:
    width: int = max(LEAST, triton.next_power_of_2(dim))
    return width
