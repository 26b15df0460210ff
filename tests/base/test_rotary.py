"""Fused rotary positions: of whole heads, and of the first numbers of each head."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as of_whole_heads
from transformers.models.qwen3_5.modeling_qwen3_5 import apply_rotary_pos_emb as of_first_numbers

from reft_runtime.base.rotary import rotary_width, rotating
from reft_runtime.base.trial import Operator, angles
from reft_runtime.kernels.operators import cpu_operators
from tests.helpers.models import tiny

CPU = torch.device("cpu")
LIKE = torch.empty(0)


class Counted:
    """The CPU's operators; `calls` are those of `rotate_`."""

    def __init__(self) -> None:
        self.own: Any = cpu_operators()
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def rotate_(self, *given: Tensor) -> None:
        """Counts."""
        self.calls += 1
        self.own.rotate_(*given)


def heads(head: int) -> tuple[Tensor, Tensor]:
    """Queries and keys [1, heads, 3, head], columns of one product."""
    both = torch.randn(1, 3, 6, head, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    return both[:, :4], both[:, 4:]


def rotated(own: Operator, query: Tensor, key: Tensor) -> int:
    """Check what is rotated by 8 angles; return how often the operators did it."""
    operators = Counted()
    rotate = rotating(own, operators, CPU)
    assert rotate is not None
    operators.calls = 0
    wanted = own(query, key, *angles(8, LIKE))
    for found, right in zip(rotate(query, key, *angles(8, LIKE)), wanted, strict=True):
        torch.testing.assert_close(found, right)
    return operators.calls


@pytest.mark.parametrize("head", [8, 12, 32])
def test_the_first_numbers_of_heads(head: int) -> None:
    assert rotated(of_first_numbers, *heads(head)) == 1


def test_heads_that_are_cut_before() -> None:
    query, key = heads(20)
    behind = query[..., 8:].clone()
    assert rotated(of_whole_heads, query[..., :8], key[..., :8]) == 1
    assert torch.equal(query[..., 8:], behind)


def test_heads_that_share_numbers_stay_with_the_own_code() -> None:
    query, key = heads(8)
    assert rotated(of_whole_heads, query, key[:, :1].expand(1, 2, 3, 8)) == 0


def test_a_function_that_changes_the_other_numbers_is_not_replaced_for_them() -> None:
    own: Operator = of_first_numbers

    def doubling(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        width = cos.shape[-1]
        return tuple(
            torch.cat((one[..., :width], 2 * one[..., width:]), -1)
            for one in own(query, key, cos, sin)
        )

    assert rotated(doubling, *heads(16)) == 0
    assert rotated(doubling, *heads(8)) == 1


def test_how_many_numbers_a_model_rotates() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert rotary_width(tiny("llama"), 8) == 8
    assert rotary_width(tiny("stablelm", rope_parameters=rope), 8) == 4
    assert rotary_width(nn.Linear(2, 2), 8) == 8
