"""Attention over pages by Triton kernels: FlashAttention-2's online softmax (arXiv 2307.08691).

The query heads that share a head of keys are rows of one product, so that keys and values are read
once for all of them. Few decoding rows would leave most of the device idle: their keys are split
among programs, and a second kernel puts the parts together (flash decoding).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from reft_runtime.engine.blocks import BLOCK_TOKENS
from reft_runtime.engine.cuda import kernels
from reft_runtime.engine.page_attention import PageBatch

KEYS_AT_ONCE = 64
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
        launch = self._launcher(query, keys, values, out, batch, scale, window or 0)
        if batch.decodes:
            splits = self.splits(batch.decodes, keys.shape[2])
            launch(None, batch.decodes, 1, splits)
        if len(batch.blocks):
            launch(batch.blocks, len(batch.blocks), self.query_block, 1)
        return out

    def _launcher(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        batch: PageBatch,
        scale: float,
        window: int,
    ) -> Callable[[Tensor | None, int, int, int], None]:
        heads, kv_heads = query.shape[1], keys.shape[2]
        group = heads // kv_heads
        key_dim, value_dim = keys.shape[3], values.shape[3]

        def launch(blocks: Tensor | None, count: int, tokens: int, splits: int) -> None:
            parts = sums = out
            if splits > 1:
                parts = torch.empty(
                    (count, heads, splits, value_dim), dtype=torch.float32, device=out.device
                )
                sums = parts.new_empty(count, heads, splits, 2)
            lanes = triton.next_power_of_2(group)
            tokens = max(tokens, -(-LEAST // lanes))
            kernels.attend[(count, kv_heads, splits)](
                query,
                keys,
                values,
                out,
                parts,
                sums,
                batch.firsts if blocks is None else blocks,
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
                TOKENS=tokens,
                KEYS=KEYS_AT_ONCE,
                PAGE=BLOCK_TOKENS,
                SPLITS=splits,
                WINDOW=window,
                DECODES=blocks is None,
            )
            if splits > 1:
                kernels.combine[(count, heads)](
                    parts,
                    sums,
                    out,
                    HEADS=heads,
                    SPLITS=splits,
                    DIM=value_dim,
                    WIDTH=_width(value_dim),
                )

        return launch


def _width(dim: int) -> int:
    return max(LEAST, triton.next_power_of_2(dim))
