"""Attention over pages: the reference beside plain attention, Triton's kernel beside that."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from reft_runtime.base.attention import Scoring
from reft_runtime.kv import choice
from reft_runtime.kv.page_attention import GatheredAttention, PageBatch, PageKernel, RowInPages
from reft_runtime.kv.triton_attention import MAX_SPLITS, Tile, Tiles, TritonAttention
from reft_runtime.schedule.blocks import BLOCK_TOKENS, blocks_for
from tests.helpers.attention import HEADS, SCORINGS, SINKS, attention, described

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Lengths = list[tuple[int, int]]
"""Of each row: tokens before, and tokens of the step."""

BATCHES: dict[str, Lengths] = {
    "decodes": [(0, 1), (15, 1), (16, 1), (70, 1), (131, 1)],
    "prompts": [(0, 5), (0, 16), (0, 33)],
    "later chunks": [(7, 9), (64, 20), (16, 3)],
    "mixed": [(40, 1), (3, 1), (0, 70), (30, 12)],
    "long": [(300, 1), (0, 110)],
}


SMALL = Tiles(Tile(16, 16, 4, 1), Tile(16, 32, 4, 1))


def tiles_of(*given: Any) -> Tiles:
    tiles = Tiles.of(*given)
    assert tiles is not None
    return tiles


class Paged:
    """Random keys and values of rows, in pages in any order, and what attention makes of them."""

    def __init__(
        self, lengths: Lengths, heads: int, kv_heads: int, dims: tuple[int, int], dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        self.lengths = lengths
        count = sum(blocks_for(before + own) for before, own in lengths)
        order = (1 + torch.randperm(count, generator=generator)).tolist()
        width = max(blocks_for(before + own) for before, own in lengths)
        # Whatever nobody wrote must not matter.
        self.keys, self.values = (
            torch.full((count + 1, BLOCK_TOKENS, kv_heads, dim), torch.nan, dtype=dtype).to(DEVICE)
            for dim in dims
        )
        self.tables = torch.zeros(len(lengths), width, dtype=torch.long, device=DEVICE)
        self.query = random(sum(own for _, own in lengths), heads, dims[0])
        self.rows: list[tuple[Tensor, Tensor]] = []
        described = []
        for lane, (before, own) in enumerate(lengths):
            pages = [order.pop() for _ in range(blocks_for(before + own))]
            self.tables[lane, : len(pages)] = torch.tensor(pages)
            addresses = [
                pages[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS
                for at in range(before + own)
            ]
            row = random(before + own, kv_heads, dims[0]), random(before + own, kv_heads, dims[1])
            for tensor, part in zip((self.keys, self.values), row, strict=True):
                tensor.flatten(0, 1)[addresses] = part
            self.rows.append(row)
            described.append(RowInPages(before, addresses[before:], lane))
        self.described = described

    def batch(self, query_block: int) -> PageBatch:
        return PageBatch.of(self.described, self.tables, query_block)

    def plain(self, scoring: Scoring) -> Tensor:
        """By rows, over keys that lie one after another."""
        first, out = 0, []
        for (before, own), (keys, values) in zip(self.lengths, self.rows, strict=True):
            query = self.query[first : first + own].cpu()
            out.append(attention(query, keys.cpu(), values.cpu(), before, scoring))
            first += own
        return torch.cat(out).to(self.query)


@pytest.mark.parametrize("scoring", SCORINGS, ids=described)
def test_the_reference_is_plain_attention(scoring: Scoring) -> None:
    paged = Paged(BATCHES["mixed"], HEADS, 2, (8, 6), torch.float32)
    kernel = GatheredAttention()
    rows = paged.batch(kernel.query_block)
    found = kernel(paged.query, paged.keys, paged.values, rows, scoring)
    torch.testing.assert_close(found, paged.plain(scoring))


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("batch", BATCHES)
def test_the_reference_over_other_batches(batch: str, window: int | None) -> None:
    paged = Paged(BATCHES[batch], 4, 2, (8, 6), torch.float32)
    kernel = GatheredAttention()
    rows = paged.batch(kernel.query_block)
    found = kernel(paged.query, paged.keys, paged.values, rows, Scoring(0.3, window))
    torch.testing.assert_close(found, paged.plain(Scoring(0.3, window)))


@pytest.mark.parametrize(
    ("scoring", "processors"),
    [
        (Scoring(0.3, 9, None, 1.5, SINKS), 64),
        (Scoring(0.3, None, 6, None, SINKS), 0),
    ],
)
def test_triton_scores_as_plain_attention(scoring: Scoring, processors: int) -> None:
    paged = Paged([(36, 1), (3, 1), (0, 18)], HEADS, 2, (24, 16), torch.float32)
    kernel = TritonAttention(3, processors, SMALL)
    rows = paged.batch(kernel.query_block)
    sinks = None if scoring.sinks is None else scoring.sinks.to(DEVICE)
    found = kernel(paged.query, paged.keys, paged.values, rows, replace(scoring, sinks=sinks))
    torch.testing.assert_close(found, paged.plain(scoring), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [GatheredAttention(), TritonAttention(4, 0, SMALL)])
def test_values_that_are_the_first_numbers_of_keys(kernel: PageKernel) -> None:
    paged = Paged(BATCHES["mixed"], 4, 1, (24, 16), torch.float32)
    paged.rows = [(keys, keys[..., :16]) for keys, _ in paged.rows]
    values = paged.keys[..., :16]
    batch = paged.batch(kernel.query_block)
    own = torch.cat(
        [keys[-own:] for (keys, _), (_, own) in zip(paged.rows, paged.lengths, strict=True)]
    )
    paged.keys.view(-1, 1, 24)[batch.addresses] = torch.nan  # the step's own are not stored yet
    kernel.store(paged.query, own, own[..., :16], paged.keys, values, batch.addresses)
    found = kernel(paged.query, paged.keys, values, batch, Scoring(0.3))
    torch.testing.assert_close(found, paged.plain(Scoring(0.3)), rtol=1e-4, atol=1e-5)


SHAPES = [(4, 2, (16, 16), 8), (3, 3, (24, 24), None), (8, 1, (32, 16), 8)]
"""Heads, those of keys, widths of keys and values, and the window."""

CASES = [
    (*shape, batch, processors)
    for turn, shape in enumerate(SHAPES)
    for place, batch in enumerate(BATCHES)
    for processors in (0, 64)
    if turn == 0 or (turn + place) % 2 == (processors > 0)
]
"""Every batch whole and split, and of every shape one of the two."""


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dims", "window", "batch", "processors"), CASES, ids=str
)
def test_triton(
    heads: int,
    kv_heads: int,
    dims: tuple[int, int],
    window: int | None,
    batch: str,
    processors: int,
) -> None:
    paged = Paged(BATCHES[batch], heads, kv_heads, dims, torch.float32)
    kernel = TritonAttention(heads // kv_heads, processors, SMALL)
    rows = paged.batch(kernel.query_block)
    if rows.decodes:
        assert (kernel.splits(rows.decodes, kv_heads) > 1) == (processors > 0)
    found = kernel(paged.query, paged.keys, paged.values, rows, Scoring(0.3, window))
    torch.testing.assert_close(found, paged.plain(Scoring(0.3, window)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [BATCHES["mixed"], [(300, 1), (0, 280)]], ids=str)
def test_triton_in_16_bits(lengths: Lengths) -> None:
    """In tiles of devices, of which the longer prompt has several."""
    # Triton's interpreter multiplies no bfloat16.
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    paged = Paged(lengths, 4, 2, (32, 32), dtype)
    kernel = TritonAttention(2, 4, tiles_of(dtype, 32))
    rows = paged.batch(kernel.query_block)
    found = kernel(paged.query, paged.keys, paged.values, rows, Scoring(0.2))
    torch.testing.assert_close(found, paged.plain(Scoring(0.2)), rtol=0.05, atol=0.02)


def test_heads_that_are_columns_of_a_wider_product() -> None:
    paged = Paged(BATCHES["mixed"], 4, 2, (16, 16), torch.float32)
    kernel = TritonAttention(2, 0, tiles_of(torch.float32, 16))
    rows = paged.batch(kernel.query_block)
    wide = torch.cat([paged.query, paged.query[:, :3]], 1)
    turned = paged.query.transpose(0, 1).contiguous().transpose(0, 1)
    for query in (wide[:, :4], turned):
        found = kernel(query, paged.keys, paged.values, rows, Scoring(0.3))
        torch.testing.assert_close(found, paged.plain(Scoring(0.3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [GatheredAttention(), TritonAttention(3, 0, SMALL)])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dims", [(16, 16), (24, 12)])
def test_keys_and_values_are_stored(
    dims: tuple[int, int], rotate: bool, kernel: PageKernel
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    wide = random(5, 6 + 2, dims[0])  # heads are columns of a wider product
    query, key, value = wide[:, :6], wide[:, 6:], random(5, 2, dims[1])
    angles = random(5, dims[0] // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    wanted_query, wanted_key = query.clone(), key.clone()
    if rotate:
        for heads in (wanted_query, wanted_key):
            low, high = heads.chunk(2, -1)
            turned = torch.cat([-high, low], -1)
            heads.copy_(heads * cos[:, None] + turned * sin[:, None])
    keys, values = (torch.zeros(3, BLOCK_TOKENS, 2, dim, device=DEVICE) for dim in dims)
    addresses = torch.tensor([40, 3, 16, 17, 31], device=DEVICE)
    kernel.store(query, key, value, keys, values, addresses, (cos, sin) if rotate else None)
    torch.testing.assert_close(query, wanted_query)
    torch.testing.assert_close(keys.flatten(0, 1)[addresses], wanted_key)
    torch.testing.assert_close(values.flatten(0, 1)[addresses], value)
    assert int((keys.flatten(0, 1) != 0).any(-1).any(-1).sum()) == len(addresses)


def test_the_fewer_rows_the_more_splits() -> None:
    kernel = TritonAttention(4, 132, SMALL)
    splits = [kernel.splits(rows, 8) for rows in (1, 4, 32, 256)]
    assert splits == sorted(splits, reverse=True)
    assert splits[0] == MAX_SPLITS
    assert splits[-1] == 1
    assert all(number & (number - 1) == 0 for number in splits)


T4, ADA, A100, H100 = 64 << 10, 99 << 10, 163 << 10, 227 << 10
"""Shared memory that a program may take."""


def test_tiles_fit_the_shared_memory_of_a_processor() -> None:
    assert tiles_of(torch.bfloat16, 128, 4, H100) == (Tile(16, 64, 2, 2), Tile(128, 128, 8, 3))
    assert tiles_of(torch.bfloat16, 128, 4, A100) == (Tile(16, 64, 2, 2), Tile(128, 128, 8, 3))
    assert tiles_of(torch.bfloat16, 128, 4, ADA) == (Tile(16, 64, 2, 2), Tile(128, 64, 8, 3))
    assert tiles_of(torch.float32, 256, 1, A100).prompt == Tile(64, 32, 4, 2)
    for shared in (T4, ADA, A100, H100):
        for dtype in (torch.float16, torch.float32):
            for dim in (16, 80, 128, 256):
                for group in (1, 8):
                    for tile in tiles_of(dtype, dim, group, shared):
                        sums = shared == T4
                        need = tile.shared_bytes(dtype.itemsize, dim, group, sums=sums)
                        assert need <= shared


@pytest.mark.parametrize(
    ("itemsize", "dim", "group", "tile", "reported"),
    [
        # What Triton's compiler reports for capability 8.0, for 9.0, and for 7.5.
        (2, 128, 4, Tile(16, 64, 2, 2), 38912),
        (2, 128, 4, Tile(64, 32, 4, 2), 36864),
        (2, 128, 4, Tile(128, 128, 8, 3), 99328),
        (2, 128, 71, Tile(16, 64, 2, 2), 66048),
        (4, 128, 4, Tile(32, 32, 4, 2), 53248),
        (4, 256, 4, Tile(64, 32, 4, 2), 139520),
        (4, 256, 4, Tile(16, 32, 4, 2), 84032),
        (2, 128, 4, Tile(128, 128, 8, 3), 164864),
        (2, 256, 4, Tile(64, 32, 4, 2), 98304),
        (4, 128, 4, Tile(32, 32, 4, 2), 36864),
    ],
)
def test_programs_take_no_more_shared_memory_than_is_reckoned(
    itemsize: int, dim: int, group: int, tile: Tile, reported: int
) -> None:
    assert reported <= tile.shared_bytes(itemsize, dim, group)


@pytest.mark.parametrize(
    ("dim", "tile", "reported"),
    [
        (64, Tile(128, 64, 8, 3), 65536),
        (128, Tile(64, 32, 4, 2), 49152),
        (128, Tile(32, 32, 4, 2), 32768),
        (256, Tile(16, 32, 4, 2), 49152),
        (256, Tile(16, 16, 4, 1), 32768),
    ],
)
def test_before_ampere_sums_take_shared_memory_too(dim: int, tile: Tile, reported: int) -> None:
    """What Triton's compiler reports for capability 7.5 and 16 bits."""
    assert reported <= tile.shared_bytes(2, dim, 4, sums=True)


def test_small_tiles_attend_alike() -> None:
    paged = Paged(BATCHES["mixed"], 4, 2, (16, 16), torch.float32)
    kernel = TritonAttention(2, 0, tiles_of(torch.float32, 256, 2, T4))
    found = kernel(
        paged.query, paged.keys, paged.values, paged.batch(kernel.query_block), Scoring(0.3)
    )
    torch.testing.assert_close(found, paged.plain(Scoring(0.3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shared", "fits"), [(H100, True), (16 << 10, False)])
def test_the_reference_attends_where_no_tile_fits(
    shared: int, fits: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = SimpleNamespace(
        shared_memory_per_block_optin=shared,
        shared_memory_per_block=48 << 10,
        multi_processor_count=8,
    )
    monkeypatch.setattr(choice, "has_triton", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    with caplog.at_level(logging.WARNING, choice.__name__):
        kernel = choice.page_kernel(torch.device("cuda"), 4, torch.float32, 128)
    assert isinstance(kernel, TritonAttention if fits else GatheredAttention)
    assert ("heads 128 wide, 4 to a head of keys, do not fit" in caplog.text) is not fits
