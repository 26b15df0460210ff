"""Triton's small operators give what torch's do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from reft_runtime.edits import tables
from reft_runtime.edits.triton import TritonEdits
from reft_runtime.kernels.cuda.operators import TritonOperators
from reft_runtime.kernels.cuda.products import tile_for
from reft_runtime.kernels.norms import NormForm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]
OPERATORS = TritonOperators()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    tolerance = 1e-5 if found.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=tolerance, atol=tolerance)


def norm(rows: Tensor, weight: Tensor) -> Tensor:
    wide = rows.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return weight * normal.to(rows.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 57])
def test_norms(width: int, dtype: torch.dtype) -> None:
    rows, more = random(3, width, dtype=dtype), random(3, width, dtype=dtype, seed=1)
    weight = random(width, dtype=dtype, seed=2)
    close(OPERATORS.rms_norm(rows, weight, 1e-5), norm(rows, weight))
    once = OPERATORS.rms_norm(rows, weight, 1e-5, NormForm.OLMO2)
    # Triton's interpreter rounds to bfloat16 by cutting off.
    exact = norm(rows.float(), weight.float())
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(once.float(), exact, rtol=tolerance, atol=1e-6)
    one = torch.ones_like(weight, dtype=torch.float32)
    from_one = OPERATORS.rms_norm(rows, weight, 1e-5, NormForm.GEMMA)
    close(from_one, norm(rows.float(), one + weight.float()).to(dtype))
    total, normal = OPERATORS.add_rms_norm(rows, more, weight, 1e-5)
    close(total, rows + more)
    close(normal, norm(rows + more, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 1500])
def test_gated_silu(width: int, dtype: torch.dtype) -> None:
    both = random(3, 2 * width, dtype=dtype)
    close(OPERATORS.silu_mul(both), silu(both[:, :width]) * both[:, width:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "head"), [(16, 16), (24, 24), (16, 40)])
def test_rotary_positions(dim: int, head: int, dtype: torch.dtype) -> None:
    wide = random(3, 4 + 2 + 1, head, dtype=dtype)
    (query, key, rest), behind = torch.split(wide[..., :dim], [4, 2, 1], 1), wide[..., dim:]
    assert OPERATORS.rotates(query, key)
    assert not OPERATORS.rotates(wide[..., ::2])
    assert not OPERATORS.rotates(key[:, :1].expand_as(key))
    angles = random(3, dim // 2, seed=1).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    wanted = []
    for heads in (query, key):
        low, high = heads.chunk(2, -1)
        turned = torch.cat([-high, low], -1)
        wanted.append(heads * cos[:, None] + turned * sin[:, None])
    untouched = rest.clone(), behind.clone()
    OPERATORS.rotate_(query, key, cos, sin)
    close(query, wanted[0])
    close(key, wanted[1])
    assert torch.equal(rest, untouched[0])
    assert torch.equal(behind, untouched[1])


def test_what_is_supported() -> None:
    rows = random(2, 8)
    assert OPERATORS.supports(rows, rows)
    assert not OPERATORS.supports(rows, rows.to(torch.bfloat16))
    assert not OPERATORS.supports(rows.T)
    assert not OPERATORS.supports(rows.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("ranks", [[0, 3, 8], [2, 1, 16], [2, 1, 19]])
def test_rows_are_edited_from_tables(dtype: torch.dtype, ranks: list[int], together: bool) -> None:
    if together and max(ranks) > tables.PIECE_RANKS:
        pytest.skip("these are edited one by one")
    rows, width = random(30, 200, dtype=dtype), 200
    held = [(random(r, width, seed=r), random(r, width, seed=9), random(r, seed=3)) for r in ranks]
    offset = random(width, seed=4)
    places = torch.zeros(3, tables.PLACE, dtype=torch.long)
    for entry, (V, U, b) in enumerate(held):
        offsets = offset.data_ptr() if entry == 1 else -1
        places[entry] = torch.tensor([V.data_ptr(), U.data_ptr(), b.data_ptr(), offsets, len(b)])
    pieces = [(2, 1.0, [6, 1, 29]), (0, 1.0, [2]), (1, 0.5, list(range(9, 25))), (2, -2.0, [3])]
    wanted = rows.clone()
    for entry, strength, index in pieces:
        V, U, b = held[entry]
        for row in index:
            change = (V @ rows[row].float() + b) @ U + (offset if entry == 1 else 0)
            wanted[row] = rows[row] + strength * change
    found, edits = rows.clone(), TritonEdits()
    numbers = torch.tensor([row for *_, index in pieces for row in index], device=DEVICE)
    entries = torch.tensor([entry for entry, _, index in pieces for _ in index], device=DEVICE)
    strengths = torch.tensor([s for _, s, index in pieces for _ in index], device=DEVICE)
    if together:
        sizes = [len(index) for *_, index in pieces]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = torch.tensor(list(zip(starts, sizes, strict=True)), device=DEVICE)
        edits.pieces(found, numbers, parts, places.to(DEVICE), entries, strengths)
    else:
        edits.rows(found, numbers, places.to(DEVICE), entries, strengths)
    untouched = [0, 4, 5, 7, 8, 25, 28]
    assert torch.equal(found[untouched], rows[untouched])
    size = wanted.float().abs().max()
    close((found / size).to(dtype), (wanted / size).to(dtype))


PRODUCTS = [(1, 96, 128), (5, 160, 1024), (33, 64, 128), (2, 64, 100)]
"""Rows, width and depth; the last two are left to torch."""


@pytest.mark.parametrize(("rows", "width", "depth"), PRODUCTS)
def test_products(rows: int, width: int, depth: int) -> None:
    # Triton's interpreter multiplies no bfloat16.
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    inputs = random(rows, depth, dtype=dtype, seed=1) * 0.1
    weight = random(2 * width, depth, dtype=dtype, seed=2) * 0.1
    both = inputs.float() @ weight.float().t()
    gated = silu(both[:, :width]) * both[:, width:]
    close(OPERATORS.gated_product(inputs, weight), gated)

    before = random(rows, width, dtype=dtype, seed=3)
    wanted = before.float() + both[:, :width]
    found = before.clone()
    assert OPERATORS.add_product_(found, inputs, weight[:width]) is found
    close(found, wanted)
    factors = random(width, dtype=dtype, seed=4)
    again = before.clone()
    normal = OPERATORS.add_product_and_norm(again, inputs, weight[:width], factors, 1e-5)
    assert torch.equal(again, found)
    close(normal, norm(found, factors))


def test_tiles_of_products() -> None:
    assert tile_for(4096, 4096, gated=False) == (64, 128, 2)
    assert tile_for(4096, 14336, gated=False) == (64, 128, 2)
    assert tile_for(1536, 8960, gated=False) == (64, 64, 4)
    assert tile_for(14336, 4096, gated=True) == (32, 128, 1)
    assert tile_for(64, 96, gated=False) is None
