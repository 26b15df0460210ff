"""Attention over KV rows, compiled and by torch's operators, beside plain float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from reft_runtime.base.attention import LayerShape, Scoring
from reft_runtime.kv.row_attention import RowAttentionStep
from reft_runtime.kv.rows import RowStorage
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.prefix_cache import BlockCopy
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.sequence import Sequence, sequences_of
from tests.helpers.attention import HEADS, SCORINGS, attention, described

SHAPES = (
    LayerShape(2, 16, 16),
    LayerShape(3, 24, 8),
    LayerShape(2, 16, 16, source=0),
    LayerShape(1, 24, 16, values_in_keys=True),
)
STEPS = ((70, 3), (1, 1, 9, 2), (1, 1, 30, 1))
"""Of each step: how many tokens of each sequence."""


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def operators(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the compiled operators, and as on a machine without a compiler."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        if request.param == "torch":
            patch.setattr("reft_runtime.kernels.operators.kernels", lambda: None)
        yield


class Sequences:
    """Sequences of random queries, keys and values, in the rows of one storage."""

    def __init__(self, count: int) -> None:
        self.storage = RowStorage(SHAPES, torch.float32, 256, max_blocks=8)
        self.generator = torch.Generator().manual_seed(0)
        self.sequences = [
            sequences_of(Request(str(i), (0,) * 200, SamplingParams(), 0), 0) for i in range(count)
        ]
        self.held: dict[tuple[Sequence, int], tuple[Tensor, Tensor]] = {}

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def step(self, lengths: tuple[int, ...], scoring: Scoring) -> None:
        """Compute `lengths` tokens of the sequences, and compare every layer."""
        found = [
            Chunk(sequence, sequence.computed, length)
            for sequence, length in zip(self.sequences, lengths, strict=False)
        ]
        chunks = self.storage.prepare(found)
        step = self.storage.attention(chunks)
        for layer, shape in enumerate(SHAPES):
            self.attend(step, chunks, layer, shape, scoring)
        for chunk in chunks:
            chunk.sequence.computed = chunk.stop

    def attend(
        self,
        step: RowAttentionStep,
        chunks: list[Chunk],
        layer: int,
        shape: LayerShape,
        scoring: Scoring,
    ) -> None:
        queries, wanted = [], []
        for chunk in chunks:
            place = chunk.sequence, layer if shape.source is None else shape.source
            if shape.source is None:
                keys = self.random(chunk.length, shape.kv_heads, shape.key_dim)
                values = keys[..., : shape.value_dim]
                if not shape.values_in_keys:
                    values = self.random(chunk.length, shape.kv_heads, shape.value_dim)
                known = self.held.get(place, (keys[:0], values[:0]))
                self.held[place] = torch.cat([known[0], keys]), torch.cat([known[1], values])
            queries.append(self.random(chunk.length, HEADS, shape.key_dim))
            wanted.append(attention(queries[-1], *self.held[place], chunk.start, scoring))
        own = [
            self.held[c.sequence, layer if shape.source is None else shape.source] for c in chunks
        ]
        key, value = (
            torch.cat([held[i][c.start :] for held, c in zip(own, chunks, strict=True)])
            for i in (0, 1)
        )
        if shape.values_in_keys:  # numbers that do not lie side by side
            key = torch.stack([key, key], -1)[..., 0]
            value = key[..., : shape.value_dim]
        else:  # heads that do not lie side by side
            value = value.transpose(0, 1).contiguous().transpose(0, 1)
        given = step.attend(layer, torch.cat(queries), key, value, scoring)
        torch.testing.assert_close(given.double(), torch.cat(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scoring", SCORINGS, ids=described)
def test_prompts_chunks_and_decoding_sequences(scoring: Scoring) -> None:
    sequences = Sequences(4)
    for lengths in STEPS:
        sequences.step(lengths, scoring)


def test_rows_that_move_fork_and_return_keep_every_layer() -> None:
    """A layer without keys of its own, and values in keys, are copied with their sources."""
    sequences = Sequences(3)
    first, second, child = sequences.sequences
    sequences.step((130, 1), Scoring(0.2))
    storage = sequences.storage
    storage.ensure(second, 250)  # moves
    storage.fork(first, child, 130)
    child.computed = 130
    for layer in range(len(SHAPES)):
        if (first, layer) in sequences.held:
            sequences.held[child, layer] = sequences.held[first, layer]
    sequences.step((1, 1, 3), Scoring(0.2))
    storage.keep([BlockCopy(first, block, block) for block in range(8)])
    storage.release([first])
    first.computed = 128
    for layer in range(len(SHAPES)):
        if (first, layer) in sequences.held:
            keys, values = sequences.held[first, layer]
            sequences.held[first, layer] = keys[:128], values[:128]
    storage.ensure(first, 200)
    storage.reuse([BlockCopy(first, block, block) for block in range(8)])
    sequences.step((1, 1, 3), Scoring(0.2))


def test_whole_layers_are_computed_only_where_their_parts_lie() -> None:
    """Compiled layers check no address: they would write elsewhere."""
    shapes = (LayerShape(2, 16, 16), LayerShape(2, 16, 16), LayerShape(3, 24, 8))
    storage = RowStorage(shapes, torch.float32, 256)
    chunk = Chunk(sequences_of(Request("a", (0,) * 9, SamplingParams(), 0), 0), 0, 9)
    step = storage.attention(storage.prepare([chunk]))

    def computed(first: int, layers: int, tokens: int = 9, heads: int = 2, room: int = 7) -> Any:
        run = MagicMock()
        run.__len__.return_value = layers
        run.kind.key_heads, run.kind.head_dim = heads, 16
        run.room_for.side_effect = lambda asked: room * asked
        rows = torch.zeros(tokens, 16)
        if step.whole_layers(first, run, rows, rows, rows, ()) is None:
            run.compute.assert_not_called()
            return None
        _, _, _, places, given, _ = run.compute.call_args.args
        assert given.numel() >= room * tokens
        assert torch.equal(places.before, storage._layout.before[first:])
        return given

    room = computed(0, 2)
    assert computed(1, 1) is room
    assert computed(0, 1, room=8) is not room
    for wrong in (
        computed(0, 3),
        computed(2, 1),
        computed(0, 1, heads=1),
        computed(0, 1, tokens=8),
        computed(0, 1, tokens=10),
    ):
        assert wrong is None


def test_what_is_shared_takes_no_memory() -> None:
    numbers = 2 * (16 + 16) + 3 * (24 + 8) + 24
    assert sum(shape.numbers for shape in SHAPES) == numbers
    storage = RowStorage(SHAPES, torch.float32, 256)
    assert sum(part.numbers for part in storage._layout.parts) == numbers
