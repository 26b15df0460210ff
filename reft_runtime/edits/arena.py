"""One piece of a device's memory, given out in parts, so that no part waits for the driver."""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

ALIGNED = 256


def whole(size: int) -> int:
    """Bytes that a part of `size` bytes takes."""
    return max(1, -(-size // ALIGNED)) * ALIGNED


class Arena:
    """`size` bytes; parts begin at multiples of `ALIGNED`."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._free = [(0, size)] if size else []
        """Begin and end of each free piece, in bytes and in order; no two pieces touch."""

    def take(self, size: int) -> Tensor | None:
        """Return a part, uint8 [`whole(size)`]; None if no free piece is large enough."""
        size = whole(size)
        for number, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                rest = (begin + size, end)
                self._free[number : number + 1] = [rest] if rest[0] < end else []
                return self._memory[begin : begin + size]
        return None

    def give_back(self, part: Tensor) -> None:
        """Free a part, given as the whole tensor that `take` returned."""
        begin = part.data_ptr() - self._memory.data_ptr()
        end = begin + len(part)
        number = bisect_left(self._free, (begin, end))
        before = self._free[number - 1] if number else None
        after = self._free[number] if number < len(self._free) else None
        first = last = number
        if before is not None and before[1] == begin:
            begin, first = before[0], number - 1
        if after is not None and after[0] == end:
            end, last = after[1], number + 1
        self._free[first:last] = [(begin, end)]
