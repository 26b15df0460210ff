"""Attention of one packed step over contiguous KV rows, registered with transformers.

The model's own code runs unchanged: it calls this function, by the name `ATTENTION`, with the
packed queries, keys and values [1, heads, T, dim] of all scheduled tokens, and `step`, which it
passes through from the call of the model.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from reft_runtime.engine.kv_rows import LayerShape, RowStorage, Slab
from reft_runtime.engine.native import attends, attends_prompts, kernels
from reft_runtime.engine.scheduler import Chunk
from reft_runtime.errors import UnsupportedModel

ATTENTION = "reft_packed"

SHORT_CHUNK = 8
"""Tokens of a prompt up to which each goes over the keys by itself; more do it together. Measured
on 2 cores."""


class AttentionStep(Protocol):
    """What attention needs to know about the step."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """Store the step's keys and values [T, kv_heads, dim], attend; [T, heads, dim]."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: AttentionStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: hands one layer's work to the step."""
    if softcap is not None or s_aux is not None:
        raise UnsupportedModel("logit soft-capping and attention sinks are not supported")
    layer: int = module.layer_idx  # type: ignore[assignment]
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))
    return step.attend(layer, query, key, value, scaling, sliding_window)[None], None


AttentionInterface.register(ATTENTION, packed_attention)


@dataclass(frozen=True, slots=True)
class ProbedLayer:
    """What one layer asked of attention."""

    shape: LayerShape
    scaling: float | None
    window: int | None


@dataclass(slots=True)
class ShapeProbe:
    """An `AttentionStep` for one short prompt that stores nothing; notes what every layer asks."""

    layers: dict[int, ProbedLayer] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """Note the layer, and attend as the engine does: causally, within the window."""
        if layer in self.layers:
            raise UnsupportedModel("a layer attends more than once")
        shape = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        self.layers[layer] = ProbedLayer(shape, scaling, window)
        at = torch.arange(query.shape[0])
        seen = at <= at[:, None]
        if window is not None:
            seen &= at > at[:, None] - window
        result = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=seen,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return result[0].transpose(0, 1)


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
    """One step's attention over `RowStorage`.

    Decoding chunks must come first, ordered so that those of one slab are together and by slot;
    `order_for_rows` does that.
    """

    def __init__(self, storage: RowStorage, chunks: SequenceOf[Chunk]) -> None:
        self._decodes: list[_DecodeGroup] = []
        self._prompts: list[_PromptSegment] = []
        self._native = kernels()
        first = 0
        at = 0
        while at < len(chunks):
            slab, slot = storage.where(chunks[at].sequence)
            if chunks[at].length > 1:
                chunk = chunks[at]
                self._prompts.append(_PromptSegment(slab, slot, first, chunk.start, chunk.length))
                first += chunk.length
                at += 1
                continue
            slots, positions = [], []
            while at < len(chunks) and chunks[at].length == 1:
                other, slot = storage.where(chunks[at].sequence)
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


def order_for_rows(storage: RowStorage, chunks: SequenceOf[Chunk]) -> list[Chunk]:
    """The chunks in the order that `RowAttentionStep` wants."""

    def place(chunk: Chunk) -> tuple[bool, int, int]:
        slab, slot = storage.where(chunk.sequence)
        return chunk.length > 1, slab.capacity, slot

    return sorted(chunks, key=place)


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
