"""Small numbers on their way to the device, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to the device; a copy to a CUDA device is not waited for."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_device(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Send each list to the device as an int64 tensor, all in one copy."""
    packed = torch.tensor([number for numbers in lists for number in numbers], dtype=torch.long)
    return torch.split(send(packed, device), [len(numbers) for numbers in lists])


class Fetch:
    """Tensors on their way to the CPU, after the work that their device has been given so far."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._arrived: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._tensors = tuple(
                torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors
            )
            for here, there in zip(self._tensors, tensors, strict=True):
                here.copy_(there, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def lists(self) -> list[list[Any]]:
        """Wait for the tensors; returns each as nested lists of numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [tensor.tolist() for tensor in self._tensors]
