"""Products by matrix tiles, beside those of float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from reft_runtime.kernels.cpu import Kernels

SHAPES = [
    *((rows, 48, 32) for rows in range(1, 18)),
    (1, 1, 1),
    (5, 50, 33),
    (12, 576, 577),
    (12, 576, 96),
    (32, 352, 64),
    (48, 640, 128),
    (13, 7, 3),
    (33, 50, 33),
    (70, 1000, 100),
    (129, 130, 65),
    (400, 1536, 40),
    (800, 800, 70),
]
"""Rows, inner width and outputs: below and above every bound of the operator, and tails of each."""
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def tiles(operators: Kernels) -> None:
    if not operators.multiplies(torch.ones(1, 1)):
        pytest.skip("this CPU has no matrix tiles")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def exact(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    made = rows.double() @ weight.double().T
    return made if bias is None else made + bias.double()


def made_of(dtype: torch.dtype, count: int, width: int, outs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weight and bias."""
    torch.manual_seed(0)
    shapes = (count, width), (outs, width), (outs,)
    rows, weight, bias = (torch.randn(shape).to(dtype) for shape in shapes)
    return rows, weight, bias


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("count", "width", "outs"), SHAPES)
def test_they_are_as_exact_as_float32(
    operators: Kernels, count: int, width: int, outs: int, with_bias: bool
) -> None:
    """One of the six products missing makes an error four times the bound."""
    rows, weight, some = made_of(torch.float32, count, width, outs)
    bias = some if with_bias else None
    error = operators.multiply(rows, weight, bias).double() - exact(rows, weight, bias)
    assert error.pow(2).mean().sqrt() < 6e-7 * (width + 1) ** 0.5


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("count", "width", "outs"), SHAPES)
def test_those_of_bfloat16_are_rounded_once(
    operators: Kernels, count: int, width: int, outs: int, with_bias: bool
) -> None:
    rows, weight, some = made_of(torch.bfloat16, count, width, outs)
    bias = some if with_bias else None
    made, wanted = operators.multiply(rows, weight, bias).double(), exact(rows, weight, bias)
    torch.testing.assert_close(made, wanted, rtol=2**-8, atol=3e-6 * width)


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e15, 1e30])
def test_numbers_of_any_size(operators: Kernels, count: int, scale: float) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(count, 96) * scale, torch.randn(50, 96) / scale
    made = operators.multiply(rows, weight, None).double()
    torch.testing.assert_close(made, exact(rows, weight), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [5, 12, 13, 40, 70])
@pytest.mark.parametrize("width", [80, 96])
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other(
    operators: Kernels, dtype: torch.dtype, count: int, width: int, spoiled: float
) -> None:
    rows, weight, _ = made_of(dtype, count, width, 40)
    wanted = operators.multiply(rows, weight, None)
    rows[2, 7] = spoiled
    made = operators.multiply(rows, weight, None)
    others = [row for row in range(count) if row != 2]
    assert torch.equal(made[others], wanted[others])
    assert not made[2].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("outs", [64, 40])
@pytest.mark.parametrize("count", [1, 12, 37])
def test_what_lies_around_the_weight_is_not_used(
    operators: Kernels, dtype: torch.dtype, width: int, outs: int, count: int
) -> None:
    rows, weight, bias = made_of(dtype, count, width, outs)
    around = torch.full((outs + 64, width), float("nan"), dtype=dtype)
    around[32 : 32 + outs] = weight
    made = operators.multiply(rows, around[32 : 32 + outs], bias)
    torch.testing.assert_close(made, operators.multiply(rows, weight, bias), rtol=0, atol=0)


def test_a_row_of_bfloat16_is_the_same_in_any_company(operators: Kernels) -> None:
    rows, weight, bias = made_of(torch.bfloat16, 430, 1536, 96)
    together = operators.multiply(rows, weight, bias)
    for first, last in ((0, 1), (3, 20), (5, 37), (40, 104), (10, 429)):
        assert torch.equal(operators.multiply(rows[first:last], weight, bias), together[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_shape_and_layout(operators: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 24).to(dtype)
    rows = torch.randn(4, 24, 5).transpose(1, 2).to(dtype)
    made = operators.multiply(rows, weight, None)
    assert made.shape == (4, 5, 20)
    assert made.dtype == dtype
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(made.double(), exact(rows, weight), rtol=rounding, atol=1e-4)
    assert operators.multiply(rows[:0], weight, None).shape == (0, 5, 20)
    bias = torch.arange(40).to(dtype)[::2]
    with_bias = operators.multiply(rows, weight, bias).double()
    torch.testing.assert_close(with_bias, exact(rows, weight, bias), rtol=rounding, atol=1e-4)


def test_what_is_refused(operators: Kernels) -> None:
    weight, rows = torch.ones(4, 6), torch.ones(2, 6)
    for wrong in (weight.T, weight.half(), weight.double(), weight[:0], weight.to("meta")):
        assert not operators.multiplies(wrong)
    with pytest.raises(ValueError, match="rows"):
        operators.multiply(rows[:, :5], weight, None)
    with pytest.raises(ValueError, match="rows"):
        operators.multiply(rows.double(), weight, None)
    with pytest.raises(ValueError, match="bias"):
        operators.multiply(rows, weight, torch.ones(6))
