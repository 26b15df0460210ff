"""Small numbers on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """An int64 tensor of each list, by one copy; for one to a CUDA device nobody waits."""
    packed = torch.tensor([number for numbers in lists for number in numbers], dtype=torch.long)
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return torch.split(packed, [len(numbers) for numbers in lists])
