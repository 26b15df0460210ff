"""Small numbers on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device; for one to a CUDA device nobody waits."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_device(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """An int64 tensor of each list, by one copy."""
    packed = torch.tensor([number for numbers in lists for number in numbers], dtype=torch.long)
    return torch.split(send(packed, device), [len(numbers) for numbers in lists])
