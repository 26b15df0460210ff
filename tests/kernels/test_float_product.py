"""Products of float32 by pieces of bfloat16, beside those of float64."""

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
    (13, 7, 3),
    (33, 50, 33),
    (70, 1000, 100),
    (129, 130, 65),
    (400, 1536, 40),
    (800, 800, 70),
]
"""Rows, inner width and outputs: below and above every bound of the operator, and tails of each."""


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


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("count", "width", "outs"), SHAPES)
def test_they_are_as_exact_as_float32(
    operators: Kernels, count: int, width: int, outs: int, with_bias: bool
) -> None:
    """One of the six products missing makes an error four times the bound."""
    torch.manual_seed(0)
    rows, weight = torch.randn(count, width), torch.randn(outs, width)
    bias = torch.randn(outs) if with_bias else None
    error = operators.multiply(rows, weight, bias).double() - exact(rows, weight, bias)
    assert error.pow(2).mean().sqrt() < 6e-7 * (width + 1) ** 0.5


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e15, 1e30])
def test_numbers_of_any_size(operators: Kernels, count: int, scale: float) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(count, 96) * scale, torch.randn(50, 96) / scale
    made = operators.multiply(rows, weight, None).double()
    torch.testing.assert_close(made, exact(rows, weight), rtol=0, atol=2e-5)


@pytest.mark.parametrize("count", [5, 12, 13, 70])
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other(
    operators: Kernels, count: int, spoiled: float
) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(count, 80), torch.randn(40, 80)
    wanted = operators.multiply(rows, weight, None)
    rows[2, 7] = spoiled
    made = operators.multiply(rows, weight, None)
    others = [row for row in range(count) if row != 2]
    assert torch.equal(made[others], wanted[others])
    assert not made[2].isfinite().any()


def test_rows_of_any_shape_and_layout(operators: Kernels) -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 24)
    rows = torch.randn(4, 24, 5).transpose(1, 2)
    made = operators.multiply(rows, weight, None)
    assert made.shape == (4, 5, 20)
    torch.testing.assert_close(made.double(), exact(rows, weight), rtol=1e-5, atol=1e-5)
    assert operators.multiply(rows[:0], weight, None).shape == (0, 5, 20)


def test_what_is_refused(operators: Kernels) -> None:
    weight, rows = torch.ones(4, 6), torch.ones(2, 6)
    for wrong in (weight.T, weight.bfloat16(), weight.double(), weight[:0], weight.to("meta")):
        assert not operators.multiplies(wrong)
    with pytest.raises(ValueError, match="rows"):
        operators.multiply(rows[:, :5], weight, None)
    with pytest.raises(ValueError, match="rows"):
        operators.multiply(rows.double(), weight, None)
    with pytest.raises(ValueError, match="bias"):
        operators.multiply(rows, weight, torch.ones(6))
