"""Attention of one packed step over contiguous KV rows."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reft_runtime.base.attention import Scoring, attend_causally
from reft_runtime.base.compiled_layer import LayersAhead
from reft_runtime.kernels.operators import LayerRun, RowEdits, StepPlaces, cpu_operators
from reft_runtime.kv.slabs import Layout, Row
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.sequence import Sequence

TOGETHER_FROM = 9
"""Least tokens of a chunk that go over the keys together; those of a shorter chunk attend one by
one. Measured on 2 cores."""

PIECE = 256
"""Most tokens of a prompt for which torch's own operators attend at once: their mask is as wide as
the context."""


@dataclass(slots=True)
class _Segment:
    """Packed tokens [first, first + length) of one sequence, from offset `start` in its KV row."""

    row: Row
    first: int
    start: int
    length: int


class RowAttentionStep:
    """One step's attention over the KV rows of `RowStorage`.

    `where` returns the row of a sequence, and `layout` says where in it a layer's parts are. Chunks
    of fewer than `TOGETHER_FROM` tokens must come first.
    """

    def __init__(
        self,
        chunks: SequenceOf[Chunk],
        where: Callable[[Sequence], Row],
        layout: Layout,
    ) -> None:
        self._layout = layout
        self._native = cpu_operators()
        self._segments: list[_Segment] = []
        self._single = 0  # tokens that attend one by one
        first = 0
        for chunk in chunks:
            self._segments.append(_Segment(where(chunk.sequence), first, chunk.start, chunk.length))
            first += chunk.length
            if chunk.length < TOGETHER_FROM:
                self._single = first
        self._tokens = first
        self._room: Tensor | None = None
        self.ahead = LayersAhead()

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """See `AttentionStep.attend`; raises ValueError for heads that do not fit the rows."""
        keys, values = (self._layout.parts[index] for index in self._layout.layers[layer])
        width = self._layout.value_dims[layer]
        if (
            key.shape != (self._tokens, keys.heads, keys.dim)
            or value.shape != (self._tokens, values.heads, width)
            or len(query) != self._tokens
        ):
            raise ValueError(
                f"attention of layer {layer}: {tuple(query.shape)}, {tuple(key.shape)} and"
                f" {tuple(value.shape)} do not fit {self._tokens} tokens of {keys} and {values}"
            )
        out = query.new_empty(*query.shape[:-1], width)
        native, inside = self._native, keys is values
        segments = self._segments
        if native is not None and native.attends(query, key, value):
            before, scored = (keys.before, values.before), scoring.of_heads(query.shape[-1])
            query, key = _packed(query), _packed(key)
            value = value if inside else _packed(value)
            if self._single:
                few = slice(self._single)
                heads = query[few], key[few], value[few], out[few]
                native.attend(*heads, self._places, before, scored)
            segments = self._long
            if segments and native.attends_prompts(key, value, values_in_keys=inside):
                native.attend_prompts(query, key, value, out, self._long_places, before, scored)
                return out
        for segment in segments:
            own = slice(segment.first, segment.first + segment.length)
            _attend(segment, layer, query[own], key[own], value[own], out[own], scoring)
        return out

    def whole_layers(
        self,
        first: int,
        run: LayerRun,
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        edits: SequenceOf[RowEdits | None],
    ) -> Tensor | None:
        """See `base.compiled_layer.LayerStep.whole_layers`."""
        heads = run.kind.key_heads, run.kind.head_dim
        kept = self._layout.heads[first : first + len(run)]
        if len(rows) != self._tokens or any(one != heads for one in kept):
            return None
        numbers = run.room_for(self._tokens)
        if self._room is None or self._room.numel() < numbers:
            self._room = rows.new_empty(numbers)
        places = StepPlaces(self._places, self._long_places, self._layout.before[first:])
        return run.compute(rows, cos, sin, places, self._room, edits)

    @cached_property
    def _places(self) -> Tensor:
        """The row's address and capacity, and the position, of each token that attends alone.

        int64 [tokens, 3], for `Kernels.attend`.
        """
        return torch.tensor(
            [
                (segment.row.address, segment.row.capacity, segment.start + offset)
                for segment in self._segments
                if segment.first < self._single
                for offset in range(segment.length)
            ]
        )

    @cached_property
    def _long(self) -> list[_Segment]:
        return [segment for segment in self._segments if segment.first >= self._single]

    @cached_property
    def _long_places(self) -> Tensor:
        """The row's address and capacity, first packed token, row offset and length of `_long`.

        int64 [segments, 5], for `Kernels.attend_prompts`.
        """
        return torch.tensor(
            [(s.row.address, s.row.capacity, s.first, s.start, s.length) for s in self._long]
        )


def _packed(heads: Tensor) -> Tensor:
    """[T, heads, dim] with the heads of each token side by side; tokens may lie apart."""
    _, count, dim = heads.shape
    _, between, within = heads.stride()
    return heads if within == 1 and (between == dim or count == 1) else heads.contiguous()


def _attend(
    segment: _Segment,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    scoring: Scoring,
) -> None:
    """Attention of a segment's tokens [length, heads, dim] by torch's own operators."""
    keys, values = segment.row.keys(layer), segment.row.values(layer)
    start, stop = segment.start, segment.start + segment.length
    keys[:, start:stop] = key.transpose(0, 1)
    values[:, start:stop] = value.transpose(0, 1)
    if segment.length == 1 and scoring.is_softmax:
        first = scoring.first(start)
        # Query heads that share a KV head become its queries: no repeated keys and values.
        result = scaled_dot_product_attention(
            query.reshape(1, len(keys), -1, query.shape[-1]),
            keys[None, :, first:stop],
            values[None, :, first:stop],
            scale=scoring.scale(query.shape[-1]),
        )
        out.copy_(result.reshape(out.shape))
        return
    for at in range(0, segment.length, PIECE):
        piece = slice(at, min(at + PIECE, segment.length))
        seen_keys = keys[:, : start + piece.stop].transpose(0, 1)
        seen_values = values[:, : start + piece.stop].transpose(0, 1)
        out[piece] = attend_causally(query[piece], seen_keys, seen_values, scoring)
