"""The memory of keys and values on a CPU: rows of tokens, and a pool of kept blocks."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of a row in order, and for each layer the indices of its keys and its values.

    A layer that has no keys and values of its own has the parts of its source. Values that are the
    first numbers of keys lie in the part of the keys; `value_dims` are the widths of the values.
    `before`, int64 [layers, 2], are the numbers of each token before a layer's keys and values, and
    `heads` how many there are and how wide they are, None where keys and values differ or are one.
    """

    parts: tuple[Part, ...]
    layers: tuple[tuple[int, int], ...]
    value_dims: tuple[int, ...]
    before: Tensor = field(compare=False)
    heads: tuple[tuple[int, int] | None, ...]

    @classmethod
    def of(cls, shapes: SequenceOf[LayerShape]) -> Layout:
        """The layout for layers of these shapes: keys and values of the first, the second, ..."""
        parts: list[Part] = []
        layers: list[tuple[int, int]] = []
        before = 0
        for shape in shapes:
            if shape.source is not None:
                layers.append(layers[shape.source])
                continue
            layers.append((len(parts), len(parts) + (0 if shape.values_in_keys else 1)))
            dims = (shape.key_dim,) if shape.values_in_keys else (shape.key_dim, shape.value_dim)
            for dim in dims:
                parts.append(Part(before, shape.kv_heads, dim))
                before += parts[-1].numbers
        both = [(parts[keys], parts[values]) for keys, values in layers]
        numbers = [(keys.before, values.before) for keys, values in both]
        heads = [
            (keys.heads, keys.dim)
            if keys is not values and (keys.heads, keys.dim) == (values.heads, values.dim)
            else None
            for keys, values in both
        ]
        return cls(
            tuple(parts),
            tuple(layers),
            tuple(shape.value_dim for shape in shapes),
            torch.tensor(numbers, dtype=torch.int64).view(-1, 2),
            tuple(heads),
        )


class Row:
    """A KV row with room for `capacity` tokens: part after part, each [heads, capacity, dim]."""

    def __init__(self, layout: Layout, capacity: int, dtype: torch.dtype) -> None:
        self.capacity = capacity
        self._layout = layout
        self._memory = MappedMemory(_numbers(layout.parts) * capacity, dtype)
        self.address = self._memory.numbers.data_ptr()
        """The memory address of the first number."""
        self._views = [
            self._memory.numbers.narrow(0, part.before * capacity, part.numbers * capacity).view(
                part.heads, capacity, part.dim
            )
            for part in layout.parts
        ]

    def part(self, index: int) -> Tensor:
        """Part number `index`, [heads, capacity, dim]."""
        return self._views[index]

    def keys(self, layer: int) -> Tensor:
        """Keys of a layer, [heads, capacity, dim]."""
        return self._views[self._layout.layers[layer][0]]

    def values(self, layer: int) -> Tensor:
        """Values of a layer, [heads, capacity, dim]."""
        width = self._layout.value_dims[layer]
        return self._views[self._layout.layers[layer][1]][..., :width]

    def drop(self, index: int) -> None:
        """Free a part's memory; what it held is lost."""
        part = self._layout.parts[index]
        start = part.before * self.capacity
        self._memory.drop(start, start + part.numbers * self.capacity)


class BlockPool:
    """The kept blocks, place after place: each is laid out like a `Row` of one block."""

    def __init__(self, layout: Layout, blocks: int, dtype: torch.dtype) -> None:
        self._parts = layout.parts
        self._size = _numbers(layout.parts) * BLOCK_TOKENS
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
    return sum(part.heads for part in Layout.of(shapes).parts) * page


def _numbers(parts: tuple[Part, ...]) -> int:
    """Numbers that one token takes in all parts."""
    return sum(part.numbers for part in parts)
