"""What the ranks of a model agree on: the processes that compute it together, a shard each.

Every rank makes the same calls in the same order, as it makes the same forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed


def smallest(number: int, device: torch.device) -> int:
    """The smallest of the numbers that the ranks give."""
    return int(_reduced([number], device, distributed.ReduceOp.MIN)[0])


def alike(numbers: Sequence[int], device: torch.device) -> list[bool]:
    """Whether all ranks give the same, for each of the numbers; they fit into 64 bits, signed."""
    low = _reduced(numbers, device, distributed.ReduceOp.MIN)
    high = _reduced(numbers, device, distributed.ReduceOp.MAX)
    return (low == high).tolist()


def _reduced(numbers: Sequence[int], device: torch.device, how: Any) -> Tensor:
    values = torch.tensor(numbers, dtype=torch.int64, device=device)
    distributed.all_reduce(values, how)
    return values.cpu()
