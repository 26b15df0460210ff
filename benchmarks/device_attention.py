"""Attention over pages on a CUDA device: which kernel is the fastest, beside the memory's limit.

    python -m benchmarks.device_attention --shape llama-3-8b

One layer's attention of rows that decode, and of one prompt, by torch's gather and dense product
(the reference), by torch's flex_attention over the same pages, and by the Triton kernel. All must
give the same before they are timed. The floor is what must be read, over the bandwidth of a copy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.device import SHAPES, bandwidth, name_of, seconds
from benchmarks.measuring import Figures, measure, median, table
from reft_runtime.base.attention import Scoring
from reft_runtime.kv.choice import page_kernel
from reft_runtime.kv.page_attention import (
    GatheredAttention,
    PageBatch,
    PageKernel,
    RowInPages,
)
from reft_runtime.loading.loader import choose_device, choose_dtype
from reft_runtime.schedule.blocks import BLOCK_TOKENS, blocks_for

GATHER, FLEX, TRITON = "gather", "flex_attention", "Triton"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
QUERY_BLOCK = 128
"""flex_attention computes this many queries in one block."""


class Pages:
    """Rows of `own` tokens each, behind `before` others, whose pages lie in random order."""

    def __init__(
        self, shape: str, rows: int, before: int, own: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        sizes = SHAPES[shape]
        heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        dim = sizes["hidden_size"] // heads
        each = blocks_for(before + own)
        self.rows, self.before, self.own = rows, before, own
        order = random.Random(0).sample(range(1, rows * each + 1), rows * each)
        self.lists = [order[i * each : (i + 1) * each] for i in range(rows)]
        self.tables = torch.tensor(self.lists, device=device)

        def some(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=dtype)

        self.keys, self.values = (
            some(1 + rows * each, BLOCK_TOKENS, kv_heads, dim) for _ in ("keys", "values")
        )
        self.query = some(rows * own, heads, dim)
        self.scale = dim**-0.5

    @property
    def bytes_read(self) -> int:
        """The bytes of the keys and values of all rows."""
        tokens = self.rows * (self.before + self.own)
        return 2 * tokens * self.keys.shape[2] * self.keys.shape[3] * self.keys.itemsize

    def by(self, kernel: PageKernel) -> Callable[[], Tensor]:
        """Attention by one of the engine's kernels."""
        stop = self.before + self.own
        described = [
            RowInPages.of(pages, self.before, stop, lane) for lane, pages in enumerate(self.lists)
        ]
        batch = PageBatch.of(described, self.tables, kernel.query_block)
        return lambda: kernel(self.query, self.keys, self.values, batch, Scoring(self.scale))

    def by_flex(self, attend: Callable[..., Any]) -> Callable[[], Tensor]:
        """Attention by flex_attention: rows are its batch, all pages its keys.

        Its mask knows which block of a row a page is, as in torch's experimental `PagedAttention`.
        """
        device, own, rows = self.query.device, self.own, self.rows
        block_of = torch.full((rows, len(self.keys)), -1, device=device)
        each = self.tables.shape[1]
        block_of.scatter_(1, self.tables, torch.arange(each, device=device).expand(rows, each))

        def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            block = block_of[b, kv // BLOCK_TOKENS]
            return (block >= 0) & (block * BLOCK_TOKENS + kv % BLOCK_TOKENS <= self.before + q)

        blocks = math.ceil(own / QUERY_BLOCK)
        needed = [blocks_for(self.before + min(own, (i + 1) * QUERY_BLOCK)) for i in range(blocks)]
        counts = torch.tensor(needed, dtype=torch.int32, device=device).expand(rows, 1, blocks)
        # There have to be as many columns as pages; those beyond a row's own are not read.
        columns = torch.nn.functional.pad(self.tables, (0, len(self.keys) - each))
        mask = BlockMask.from_kv_blocks(
            counts.contiguous(),
            columns[:, None, None].expand(-1, 1, blocks, -1).int().contiguous(),
            BLOCK_SIZE=(QUERY_BLOCK, BLOCK_TOKENS),
            mask_mod=seen,
            seq_lengths=(own, self.keys.shape[0] * BLOCK_TOKENS),
        )
        query = self.query.view(rows, own, *self.query.shape[1:]).transpose(1, 2)
        keys, values = (
            pool.flatten(0, 1).transpose(0, 1).expand(rows, -1, -1, -1)
            for pool in (self.keys, self.values)
        )

        def run() -> Tensor:
            result: Tensor = attend(
                query, keys, values, block_mask=mask, scale=self.scale, enable_gqa=True
            )
            return result.transpose(1, 2).flatten(0, 1)

        return run


def kernels(pages: Pages) -> dict[str, Callable[[], Tensor]]:
    """The kernels that run on the device of the pages; ends the script where one differs."""
    found = {GATHER: pages.by(GatheredAttention())}
    if pages.query.is_cuda:
        group = pages.query.shape[1] // pages.keys.shape[2]
        query = pages.query
        kernel = page_kernel(query.device, group, query.dtype, query.shape[2])
        found[TRITON] = pages.by(kernel)
        found[FLEX] = pages.by_flex(torch.compile(flex_attention, dynamic=False))
    else:
        found[FLEX] = pages.by_flex(flex_attention)
    wanted = found[GATHER]().float()
    for name, run in found.items():
        error = (run().float() - wanted).abs().max().item()
        if not error < TOLERANCE[pages.query.dtype]:
            raise SystemExit(f"{name} differs from the reference by {error:.2g}.")
    return found


def main(
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}.")] = "llama-3-8b",
    device: Annotated[str, typer.Option(help="As for `reft serve`.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="As for `reft serve`.")] = "auto",
    rows: Annotated[
        str, typer.Option(help="Numbers of rows that decode, comma-separated.")
    ] = "1,32,256",
    contexts: Annotated[
        str, typer.Option(help="Numbers of tokens before them, comma-separated.")
    ] = "160,1024",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Keep the raw figures here.")] = None,
) -> None:
    """Print the table: microseconds, and how many times the floor that is."""
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    speed = bandwidth(place)
    cases = [
        (n, int(before), 1) for n in map(int, rows.split(",")) for before in contexts.split(",")
    ]
    lines = []
    for n, before, own in [*cases, (1, 0, prompt)]:
        pages = Pages(shape, n, before, own, place, kind)

        def case(run: Callable[[], Tensor]) -> Callable[[int], Figures]:
            return lambda _: {"seconds": seconds(run, place)}

        setting: dict[str, str | int] = {"benchmark": "device attention", "shape": shape}
        setting |= {
            "device": name_of(place),
            "rows": n,
            "before": before,
            "own": own,
            "dtype": str(kind),
        }
        found = {name: case(run) for name, run in kernels(pages).items()}
        taken = measure(found, rounds, setting, out)
        for name in found:
            took = median(taken, name)
            over = took * speed / pages.bytes_read
            # The floor of a prompt is its arithmetic; there the kernels are beside each other only.
            floor = round(over, 2) if own == 1 else ""
            lines.append((n, before, own, name, round(1e6 * took, 1), floor))
    print(f"{shape}, {kind} on {place}: copies {speed / 1e12:.2f} TB/s\n")
    print(table(("rows", "tokens before", "tokens", "kernel", "us", "over floor"), lines))


if __name__ == "__main__":
    typer.run(main)
