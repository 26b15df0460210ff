"""The memory of keys and values on a CPU: rows of tokens, and a pool of kept blocks."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from reft_runtime.base.attention import LayerShape
from reft_runtime.machine.memory import MappedMemory
from reft_runtime.schedule.blocks import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Part:
    """The keys or the values of one layer; earlier parts take `before` numbers of each token."""

    before: int
    heads: int
    dim: int

    @property
    def numbers(self) -> int:
        """Numbers that one token takes in this part."""
        return self.heads * self.dim


def parts_of(shapes: SequenceOf[LayerShape]) -> tuple[Part, ...]:
    """The parts of a row in order: keys and values of the first layer, of the second, and so on."""
    parts: list[Part] = []
    before = 0
    for shape in shapes:
        for dim in (shape.key_dim, shape.value_dim):
            parts.append(Part(before, shape.kv_heads, dim))
            before += parts[-1].numbers
    return tuple(parts)


class Row:
    """A KV row with room for `capacity` tokens: part after part, each [heads, capacity, dim]."""

    def __init__(self, parts: tuple[Part, ...], capacity: int, dtype: torch.dtype) -> None:
        self.capacity = capacity
        self._parts = parts
        self._memory = MappedMemory(_numbers(parts) * capacity, dtype)
        self._views = [
            self._memory.numbers.narrow(0, part.before * capacity, part.numbers * capacity).view(
                part.heads, capacity, part.dim
            )
            for part in parts
        ]

    @property
    def address(self) -> int:
        """The memory address of the first number."""
        return self._memory.numbers.data_ptr()

    def part(self, index: int) -> Tensor:
        """Part number `index`, [heads, capacity, dim]."""
        return self._views[index]

    def keys(self, layer: int) -> Tensor:
        """Keys of a layer, [heads, capacity, dim]."""
        return self._views[2 * layer]

    def values(self, layer: int) -> Tensor:
        """Values of a layer, [heads, capacity, dim]."""
        return self._views[2 * layer + 1]

    def drop(self, index: int) -> None:
        """Free a part's memory; what it held is lost."""
        part = self._parts[index]
        start = part.before * self.capacity
        self._memory.drop(start, start + part.numbers * self.capacity)


class BlockPool:
    """The kept blocks, place after place: each is laid out like a `Row` of one block."""

    def __init__(self, parts: tuple[Part, ...], blocks: int, dtype: torch.dtype) -> None:
        self._parts = parts
        self._size = _numbers(parts) * BLOCK_TOKENS
        self._memory = MappedMemory(self._size * blocks, dtype)

    def part(self, index: int, place: int, count: int) -> Tensor:
        """Part number `index` of `count` places, [count, heads, BLOCK_TOKENS, dim]."""
        part = self._parts[index]
        numbers = self._memory.numbers[place * self._size : (place + count) * self._size]
        own = numbers.view(count, self._size).narrow(
            1, part.before * BLOCK_TOKENS, part.numbers * BLOCK_TOKENS
        )
        return own.view(count, part.heads, BLOCK_TOKENS, part.dim)

    def drop(self, places: Iterable[int]) -> None:
        """Free the memory of places; what they held is lost."""
        for place in places:
            self._memory.drop(place * self._size, (place + 1) * self._size)


def rounding_bytes(shapes: SequenceOf[LayerShape], page: int) -> int:
    """Most bytes that a KV row takes beyond its tokens: each head takes whole pages of memory."""
    return sum(part.heads for part in parts_of(shapes)) * page


def _numbers(parts: tuple[Part, ...]) -> int:
    """Numbers that one token takes in all parts."""
    return sum(part.numbers for part in parts)
