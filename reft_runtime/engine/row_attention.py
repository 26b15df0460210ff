"""Attention of one packed step over contiguous KV rows."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reft_runtime.engine.native import attends, attends_prompts, kernels
from reft_runtime.engine.scheduler import Chunk
from reft_runtime.engine.sequence import Sequence

if TYPE_CHECKING:
    from reft_runtime.engine.kv_rows import Slab

SHORT_CHUNK = 8
"""Tokens of a prompt up to which each goes over the keys by itself; more do it together. Measured
on 2 cores."""


@dataclass(slots=True)
class _DecodeGroup:
    """Rows of one slab that decode one token each: packed tokens [first, first + rows)."""

    slab: Slab
    first: int
    slots: Tensor  # [rows]
    positions: Tensor  # [rows]
    span: int  # slots [0, span) are attended; more than `rows` where some of them do not decode
    length: int  # tokens attended: the longest row's
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.slots.shape[0]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [span, 1, 1, length]; None where every row sees everything."""
        if window not in self.masks:
            length = self.length
            last = torch.zeros(self.span, 1, dtype=torch.long)
            last[self.slots, 0] = self.positions
            at = torch.arange(length)
            hidden = at > last
            if window is not None:
                hidden |= at <= last - window
            mask = torch.zeros(self.span, length, dtype=dtype)
            mask.masked_fill_(hidden, -torch.inf)
            self.masks[window] = mask[:, None, None] if hidden.any() else None
        return self.masks[window]


@dataclass
class _PromptSegment:
    """Consecutive tokens of one row: packed tokens [first, first + length), row offset `start`."""

    slab: Slab
    slot: int
    first: int
    start: int
    length: int
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    @property
    def short(self) -> bool:
        """Whether one pass a token costs less than going over the keys together."""
        return self.length <= SHORT_CHUNK

    @cached_property
    def slots(self) -> Tensor:
        return torch.full((self.length,), self.slot)

    @cached_property
    def positions(self) -> Tensor:
        return torch.arange(self.start, self.start + self.length)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [length, start + length]; None for a plain causal one."""
        if window not in self.masks:
            stop = self.start + self.length
            mask = None
            if self.start or (window is not None and window < stop):
                rows = torch.arange(self.start, stop)[:, None]
                columns = torch.arange(stop)
                hidden = columns > rows
                if window is not None:
                    hidden |= columns <= rows - window
                mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            self.masks[window] = mask
        return self.masks[window]


class RowAttentionStep:
    """One step's attention over the rows of `RowStorage`, which says `where` they are.

    Decoding chunks must come first, ordered so that those of one slab are together and by slot.
    """

    def __init__(
        self, chunks: SequenceOf[Chunk], where: Callable[[Sequence], tuple[Slab, int]]
    ) -> None:
        self._decodes: list[_DecodeGroup] = []
        self._prompts: list[_PromptSegment] = []
        self._native = kernels()
        first = 0
        at = 0
        while at < len(chunks):
            slab, slot = where(chunks[at].sequence)
            if chunks[at].length > 1:
                chunk = chunks[at]
                self._prompts.append(_PromptSegment(slab, slot, first, chunk.start, chunk.length))
                first += chunk.length
                at += 1
                continue
            slots, positions = [], []
            while at < len(chunks) and chunks[at].length == 1:
                other, slot = where(chunks[at].sequence)
                if other is not slab:
                    break
                slots.append(slot)
                positions.append(chunks[at].start)
                at += 1
            self._decodes.append(
                _DecodeGroup(
                    slab,
                    first,
                    torch.tensor(slots),
                    torch.tensor(positions),
                    span=max(slots) + 1,
                    length=max(positions) + 1,
                )
            )
            first += len(slots)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """See `AttentionStep.attend`."""
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        native = self._native if attends(query, key, value) else None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        for group in self._decodes:
            tokens = slice(group.first, group.first + group.rows)
            rows = query[tokens], key[tokens], value[tokens], out[tokens]
            cache = group.slab.keys[layer], group.slab.values[layer]
            if native is None:
                _attend_decodes(group, *cache, *rows, scale, window)
            else:
                native.attend(*rows, *cache, group.slots, group.positions, scale, window or 0)
        segments = self._prompts
        if native is not None and attends_prompts(query, key):
            for slab, places in self._long_prompts:
                cache = slab.keys[layer], slab.values[layer]
                native.attend_prompts(query, key, value, out, *cache, places, scale, window or 0)
            segments = self._short_prompts
        for segment in segments:
            tokens = slice(segment.first, segment.first + segment.length)
            rows = query[tokens], key[tokens], value[tokens], out[tokens]
            cache = segment.slab.keys[layer], segment.slab.values[layer]
            if native is None or not segment.short:
                _attend_prompt(segment, *cache, *rows, scale, window)
            else:
                native.attend(*rows, *cache, segment.slots, segment.positions, scale, window or 0)
        return out

    @cached_property
    def _short_prompts(self) -> list[_PromptSegment]:
        return [segment for segment in self._prompts if segment.short]

    @cached_property
    def _long_prompts(self) -> list[tuple[Slab, Tensor]]:
        """Those that are not short, by slab: first token, slot, row offset, length."""
        by_slab: dict[int, tuple[Slab, list[tuple[int, int, int, int]]]] = {}
        for s in self._prompts:
            if not s.short:
                place = s.first, s.slot, s.start, s.length
                by_slab.setdefault(id(s.slab), (s.slab, []))[1].append(place)
        return [(slab, torch.tensor(places)) for slab, places in by_slab.values()]


def _attend_decodes(
    group: _DecodeGroup,
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    scale: float,
    window: int | None,
) -> None:
    """Attention of decoding tokens [rows, heads, dim] by torch's own operators."""
    keys[group.slots, :, group.positions] = key
    values[group.slots, :, group.positions] = value
    kv_heads, span, length = key.shape[1], group.span, group.length
    # Query heads that share a KV head become its queries: no repeated keys and values.
    packed = query.reshape(group.rows, kv_heads, -1, query.shape[-1])
    if span != group.rows:
        spread = packed.new_zeros(span, *packed.shape[1:])
        spread[group.slots] = packed
        packed = spread
    result = scaled_dot_product_attention(
        packed,
        keys[:span, :, :length],
        values[:span, :, :length],
        attn_mask=group.mask(window, query.dtype),
        scale=scale,
    )
    if span != group.rows:
        result = result[group.slots]
    out.copy_(result.reshape(out.shape))


def _attend_prompt(
    segment: _PromptSegment,
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    scale: float,
    window: int | None,
) -> None:
    """Attention of a prompt's tokens [length, heads, dim] by torch's own operators."""
    stop = segment.start + segment.length
    row_keys, row_values = keys[segment.slot, :, :stop], values[segment.slot, :, :stop]
    row_keys[:, segment.start :] = key.transpose(0, 1)
    row_values[:, segment.start :] = value.transpose(0, 1)
    mask = segment.mask(window, query.dtype)
    result = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        row_keys[None],
        row_values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    out.copy_(result[0].transpose(0, 1))
