"""Whole decoder layers as one function, against torch's operators and its own parts."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import linear, rms_norm, silu

from reft_runtime.base import linears
from reft_runtime.base.attention import Scoring, attend_causally
from reft_runtime.base.linears import product_of
from reft_runtime.kernels.cpu import Kernels
from reft_runtime.kernels.cpu.decoder_layer import (
    LayerRun,
    LayerWeights,
    Norm,
    PackedLinear,
    StepPlaces,
)
from reft_runtime.kernels.cpu.low_rank import RowEdit, RowEdits
from reft_runtime.kernels.cpu.torch_functions import row_blocks, torch_functions
from tests.helpers.packing import needs_packing

HEADS, KEY_HEADS, WIDTH, INNER, CAPACITY = 4, 2, 48, 80, 320
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 0.1}


class Plain:
    """The weights of a layer with heads `dim` wide, and the layer by torch's own operators."""

    def __init__(self, dim: int, dtype: torch.dtype, scoring: Scoring, *, bias: bool) -> None:
        torch.manual_seed(0)
        self.dim, self.scoring = dim, scoring
        wide = (HEADS + 2 * KEY_HEADS) * dim
        shapes = [(wide, WIDTH), (WIDTH, HEADS * dim), (2 * INNER, WIDTH), (WIDTH, INNER)]
        self.linears: list[tuple[Tensor, Tensor | None]] = [
            (
                (torch.randn(shape) / shape[1] ** 0.5).to(dtype),
                torch.randn(shape[0]).to(dtype) if bias else None,
            )
            for shape in shapes
        ]
        self.norms = [torch.rand(WIDTH).add(0.5).to(dtype) for _ in range(2)]

    def packed(self) -> LayerWeights:
        qkv, o, gate_up, down = (PackedLinear(product_of(w, b)[1], b) for w, b in self.linears)
        return LayerWeights(
            Norm(self.norms[0], 1e-5),
            qkv,
            o,
            Norm(self.norms[1], 1e-6),
            gate_up,
            down,
            KEY_HEADS,
            self.dim,
            self.scoring.of_heads(self.dim),
        )

    def output(self, rows: Tensor, cos: Tensor, sin: Tensor, kept: Tensor) -> Tensor:
        """Of a sequence's rows [n, d]; `kept` [2, kv heads, m, dim] are keys and values before."""
        dim, heads = self.dim, (HEADS, KEY_HEADS, KEY_HEADS)
        every = linear(rms_norm(rows, (WIDTH,), self.norms[0], 1e-5), *self.linears[0])
        query, key, value = torch.split(every.view(len(rows), -1, dim), list(heads), 1)
        query, key = (self._rotated(each, cos, sin) for each in (query, key))
        key, value = (
            torch.cat([kept[i].transpose(0, 1), each]) for i, each in enumerate((key, value))
        )
        mixed = attend_causally(query, key, value, self.scoring).flatten(1)
        rows = rows + linear(mixed, *self.linears[1])
        both = linear(rms_norm(rows, (WIDTH,), self.norms[1], 1e-6), *self.linears[2])
        gate, up = both.chunk(2, -1)
        return rows + linear(silu(gate) * up, *self.linears[3])

    def _rotated(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = self.dim // 2
        turned = torch.cat([-heads[..., half:], heads[..., :half]], -1)
        return heads * cos[:, None] + turned * sin[:, None]


def run_of(operators: Kernels, *layers: Plain) -> LayerRun:
    made = [operators.decoder_layer(plain.packed()) for plain in layers]
    return LayerRun([layer for layer in made if layer is not None])


@pytest.fixture
def threads() -> Iterator[int]:
    """Two threads, between which blocks of rows are divided."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def test_blocks_of_rows() -> None:
    assert [row_blocks(rows, 2) for rows in (1, 255, 256, 768, 769, 1537)] == [1, 1, 2, 2, 4, 6]
    assert [row_blocks(rows, 16) for rows in (255, 2047, 2048)] == [1, 1, 16]
    assert [row_blocks(rows, 1) for rows in (64, 384, 385)] == [1, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "torchs"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("prompt", [21, 271, 300])
@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(),
        Scoring(0.2, window=5),
        Scoring(chunk=7),
        Scoring(softcap=3.0, sinks=torch.linspace(-1, 1, HEADS)),
    ],
)
def test_layer(
    operators: Kernels,
    threads: int,
    dtype: torch.dtype,
    bias: bool,
    torchs: bool,
    prompt: int,
    scoring: Scoring,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two sequences that decode behind 9 and 30 tokens, and a prompt behind 4.

    Long prompts are computed in blocks, the last of which has padded rows. Products are torch's own
    where there are no others, or with `torchs`.
    """
    needs_packing(dtype)
    if torchs:
        monkeypatch.setattr(linears, "_multiplying", lambda weight: None)
    dim = 32
    plain = Plain(dim, dtype, scoring, bias=bias)
    run = run_of(operators, plain)
    lengths, behind = [1, 1, prompt], [9, 30, 4]
    tokens = sum(lengths)
    assert row_blocks(tokens, threads) == (2 if prompt > 21 else 1)
    rows = torch.randn(tokens, WIDTH).to(dtype)
    angles = torch.rand(tokens, dim // 2).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    before = 3  # the numbers of other layers come first
    kept = [torch.randn(before + 2 * KEY_HEADS * dim, CAPACITY).to(dtype) for _ in lengths]
    parts = [
        one[before:].view(-1)[: 2 * KEY_HEADS * CAPACITY * dim].view(2, KEY_HEADS, CAPACITY, dim)
        for one in kept
    ]
    firsts = [0, 1, 2]
    wanted = torch.cat(
        [
            plain.output(
                rows[first : first + length],
                cos[first : first + length],
                sin[first : first + length],
                part[:, :, :old],
            )
            for first, length, old, part in zip(firsts, lengths, behind, parts, strict=True)
        ]
    )
    single = [(one.data_ptr(), CAPACITY, old) for one, old in zip(kept[:2], behind, strict=False)]
    segments = [(kept[2].data_ptr(), CAPACITY, 2, behind[2], lengths[2])]
    halves = torch.tensor([(before, before + KEY_HEADS * dim)])
    places = StepPlaces(torch.tensor(single), torch.tensor(segments), halves)
    given = rows.clone()
    room = torch.full((run.room_for(tokens),), math.nan, dtype=dtype)
    found = run.compute(given, cos, sin, places, room)
    assert found is not None
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(found, wanted[None], rtol=tolerance, atol=tolerance)
    assert torch.equal(given, rows), "the layer's input is left as it is"


def test_what_a_layer_does_not_take(operators: Kernels) -> None:
    plain = Plain(10, torch.float32, Scoring(), bias=False)
    layer = run_of(operators, plain)
    rows, angles = torch.randn(2, WIDTH), torch.randn(2, 10)
    kept = torch.zeros(2 * KEY_HEADS * 10 * CAPACITY)
    room = torch.empty(layer.room_for(2))
    before = torch.tensor([(0, KEY_HEADS * 10)])
    single = torch.tensor([(kept.data_ptr(), CAPACITY, 3)] * 2)
    none = torch.tensor([])
    fine = StepPlaces(single, none, before)
    assert layer.compute(rows, angles, angles, fine, room) is not None
    beyond = StepPlaces(torch.tensor([(kept.data_ptr(), CAPACITY, CAPACITY)] * 2), none, before)
    assert layer.compute(rows, angles, angles, beyond, room) is None
    together = StepPlaces(none, torch.tensor([(kept.data_ptr(), CAPACITY, 0, 0, 2)]), before)
    assert layer.compute(rows, angles, angles, together, room) is None, "heads 10 wide: one by one"
    half = rows.bfloat16(), angles.bfloat16(), angles.bfloat16()
    assert layer.compute(*half, fine, room.bfloat16()) is None
    assert layer.compute(rows[:, :40], angles, angles, fine, room) is None
    assert layer.compute(rows, angles[:1], angles[:1], fine, room) is None
    assert layer.compute(rows, angles, angles, fine, room[1:]) is None
    two = run_of(operators, plain, plain)
    assert two.compute(rows, angles, angles, fine, room) is None, "places of one layer"
    with pytest.raises(AssertionError):
        run_of(operators, plain, Plain(16, torch.float32, Scoring(), bias=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edited", [False, True])
def test_layers_of_one_call_are_those_of_several(
    operators: Kernels, dtype: torch.dtype, edited: bool
) -> None:
    needs_packing(dtype)
    V, b, U = torch.randn(2, WIDTH), torch.randn(2), torch.randn(2, WIDTH)
    edits = RowEdits([RowEdit(row, V, b, U, 0.5) for row in (0, 2)]) if edited else None
    dim, numbers = 16, KEY_HEADS * 16
    layers = [Plain(dim, dtype, scoring, bias=False) for scoring in (Scoring(), Scoring(window=3))]
    layers[1].norms = [norm.flip(0) for norm in layers[1].norms]
    rows, angles = torch.randn(3, WIDTH).to(dtype), torch.rand(3, dim).to(dtype)
    before = torch.tensor([(0, numbers), (3 * numbers, 2 * numbers)])

    def of(*runs: LayerRun) -> tuple[list[Tensor], Tensor]:
        """The outputs of all layers, and the keys and values that they wrote."""
        torch.manual_seed(1)
        kept = torch.randn(4 * numbers * CAPACITY).to(dtype)
        single = torch.tensor([(kept.data_ptr(), CAPACITY, 7 + i) for i in range(3)])
        outs: list[Tensor] = []
        last, first = rows, 0
        for run in runs:
            room = torch.empty(run.room_for(3), dtype=dtype)
            places = StepPlaces(single, torch.tensor([]), before[first:])
            made = [edits, None] if len(run) == 2 else ()
            found = run.compute(last, angles, angles, places, room, made)
            assert found is not None
            outs += found.unbind()
            if edits is not None and not first and len(run) == 1:
                assert operators.edit_rows_(outs[0], edits)
            last, first = outs[-1], first + len(run)
        return outs, kept

    one_by_one, their_kept = of(*(run_of(operators, layer) for layer in layers))
    together, kept = of(run_of(operators, *layers))
    assert len(together) == len(one_by_one) == 2
    assert all(map(torch.equal, together, one_by_one))
    assert not torch.equal(*together)
    assert torch.equal(kept, their_kept)


def test_edits_that_do_not_fit_the_rows(operators: Kernels) -> None:
    run = run_of(operators, Plain(16, torch.float32, Scoring(), bias=False))
    rows, angles, room = torch.randn(2, WIDTH), torch.randn(2, 16), torch.empty(run.room_for(2))
    kept = torch.zeros(2 * KEY_HEADS * 16 * CAPACITY)
    single = torch.tensor([(kept.data_ptr(), CAPACITY, i) for i in range(2)])
    places = StepPlaces(single, torch.tensor([]), torch.tensor([(0, KEY_HEADS * 16)]))

    def computed(row: int, width: int) -> Tensor | None:
        edit = RowEdit(row, torch.ones(1, width), torch.ones(1), torch.ones(1, width), 1.0)
        return run.compute(rows, angles, angles, places, room, [RowEdits([edit])])

    assert computed(1, WIDTH) is not None
    assert computed(2, WIDTH) is None
    assert computed(1, WIDTH + 1) is None


def test_weights_that_no_layer_is_made_of(operators: Kernels) -> None:
    weights = Plain(16, torch.float32, Scoring(), bias=False).packed()
    assert operators.decoder_layer(weights) is not None
    narrow = PackedLinear(product_of(torch.randn(WIDTH, INNER - 8), None)[1], None)
    plain = PackedLinear(torch.randn(INNER, WIDTH).T, None)
    other = PackedLinear(product_of(torch.randn(WIDTH, INNER).bfloat16(), None)[1], None)
    for down in (narrow, plain, other):
        assert operators.decoder_layer(replace(weights, down=down)) is None
    assert operators.decoder_layer(replace(weights, key_heads=3)) is None
    assert operators.decoder_layer(replace(weights, head_dim=15)) is None
    short = replace(weights.scoring, sinks=torch.ones(HEADS - 1))
    assert operators.decoder_layer(replace(weights, scoring=short)) is None
    half = Norm(torch.ones(WIDTH // 2), 1e-5)
    assert operators.decoder_layer(replace(weights, second_norm=half)) is None


def test_torch_that_lacks_a_function_makes_no_layer(
    operators: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Plain(16, torch.float32, Scoring(), bias=False).packed()
    monkeypatch.setattr("reft_runtime.kernels.cpu.decoder_layer.torch_functions", lambda _: None)
    assert operators.decoder_layer(weights) is None


def test_this_torch_has_the_functions() -> None:
    assert torch_functions("float32") is not None
    assert torch_functions("float16_of_another_world") is None


def test_weights_are_freed_with_their_layer(operators: Kernels) -> None:
    plain = Plain(16, torch.float32, Scoring(), bias=True)
    bias = plain.linears[0][1]
    assert bias is not None
    weak: Any = StorageWeakRef
    kept = weak(bias.untyped_storage())
    made = run_of(operators, plain)
    del plain, bias
    gc.collect()
    assert not kept.expired()
    del made
    gc.collect()
    assert kept.expired()
