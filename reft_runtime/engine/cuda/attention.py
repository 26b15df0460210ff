"""Attention over pages by Triton kernels: FlashAttention-2's online softmax (arXiv 2307.08691).

The query heads that share a head of keys are rows of one product, so that keys and values are read
once for all of them. Few decoding rows would leave most of the device idle: their keys are split
among programs, and a second kernel puts the parts together (flash decoding).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from reft_runtime.engine.blocks import BLOCK_TOKENS
from reft_runtime.engine.cuda import kernels
from reft_runtime.engine.page_attention import PageBatch

KEYS_AT_ONCE = 64
WIDE_BYTES = 256
"""Of a head: of wider ones half as many keys fit into a processor's memory at once."""
LEAST = 16
"""Rows and columns of a matrix product (`tl.dot`)."""

PROMPT_ROWS = 64
"""Queries times heads that a program of a prompt's attention works on."""

PROGRAMS_PER_PROCESSOR = 4
MAX_SPLITS = 32


class TritonAttention:
    """A `PageKernel` for layers of at most `group` query heads a head of keys."""

    def __init__(self, group: int, processors: int) -> None:
        self._group: int = triton.next_power_of_2(group)
        self._processors = processors
        self.query_block = max(1, PROMPT_ROWS // self._group)

    def splits(self, rows: int, kv_heads: int) -> int:
        """Parts in which the keys of a decoding row are read; the same for any length of context.

        So a captured graph can be replayed for every step of as many rows.
        """
        wanted = PROGRAMS_PER_PROCESSOR * self._processors // max(1, rows * kv_heads)
        splits: int = max(1, min(MAX_SPLITS, triton.next_power_of_2(wanted + 1) // 2))
        return splits

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: PageBatch,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """See `PageKernel`."""
        out = query.new_empty(*query.shape[:-1], values.shape[-1])
        if query.stride()[1:] != (query.shape[2], 1):
            query = query.contiguous()
        if batch.decodes:
            splits = self.splits(batch.decodes, keys.shape[2])
            _launch(query, keys, values, out, batch, scale, window, tokens=1, splits=splits)
        if len(batch.blocks):
            tokens = self.query_block
            _launch(query, keys, values, out, batch, scale, window, tokens=tokens, splits=None)
        return out


def _launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    batch: PageBatch,
    scale: float,
    window: int | None,
    *,
    tokens: int,
    splits: int | None,
) -> None:
    """Attention of the decoding rows, in `splits` parts, or (None) of the pieces of prompts."""
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
    lanes = triton.next_power_of_2(group)
    kernels.attend[(count, kv_heads, parts_of_a_row)](
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
        scale,
        query.stride(0),
        batch.tables.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        LANES=lanes,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_WIDTH=_width(key_dim),
        VALUE_WIDTH=_width(value_dim),
        TOKENS=max(tokens, -(-LEAST // lanes)),
        KEYS=KEYS_AT_ONCE // (2 if key_dim * keys.itemsize > WIDE_BYTES else 1),
        PAGE=BLOCK_TOKENS,
        SPLITS=parts_of_a_row,
        WINDOW=window or 0,
        DECODES=decodes,
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
        )


def _width(dim: int) -> int:
    width: int = max(LEAST, triton.next_power_of_2(dim))
    return width
